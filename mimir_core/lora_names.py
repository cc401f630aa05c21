"""What LoRA files call the modules of a CogVideoX transformer, and what only other models' LoRAs contain.

Layouts: diffusers, PEFT and finetrainers (`transformer.`, `base_model.model.`, `lora_A`), kohya and
VideoX-Fun (`lora_unet_` and `lora_unet__`, underscores for dots), core's trainer (`diffusion_model.`),
ComfyUI's native CogVideoX (`blocks.0.q`), CogVideoX's own SAT code (`matrix_A.0`); q, k and v apart or fused.
"""

import re
from collections.abc import Iterator, Mapping

from .recognise import to_comfy

Shape = tuple[int, ...]

UP, DOWN, UP_BIAS = "lora_up.weight", "lora_down.weight", "lora_up.bias"
DIFF, DIFF_BIAS, ALPHA, WHOLE = "diff", "diff_b", "alpha", "whole"
_NAMED = r"(?:\.(?!weight|bias)\w+)?"  # the adapter's name, which PEFT puts in while it trains: `.default`
_ENDINGS = tuple(
    (re.compile(pattern + "$"), part)
    for pattern, part in (
        (rf"\.lora_A{_NAMED}(?:\.weight)?", DOWN),
        (rf"\.lora_B{_NAMED}(?:\.weight)?", UP),
        (rf"\.lora_B{_NAMED}\.bias", UP_BIAS),
        (r"(?:[._]lora[._]|\.lora_linear_layer\.)down\.weight", DOWN),
        (r"(?:[._]lora[._]|\.lora_linear_layer\.)up\.weight", UP),
        (r"[._]lora[._]up\.bias", UP_BIAS),
        (r"\.alpha", ALPHA),
        (r"\.diff", DIFF),
        (r"\.diff_b", DIFF_BIAS),
        (r"\.(hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)", ""),  # "": the part is what the group caught
    )
)
UNSUPPORTED = {
    "a DoRA (with magnitudes)": re.compile(rf"\.(?:dora_scale|lora_magnitude_vector{_NAMED}(?:\.weight)?)$"),
    "a LoRA in Tucker form": re.compile(r"\.(?:lora_mid\.weight|hada_t[12]|lokr_t2)$"),
    "an OFT": re.compile(rf"\.(?:oft_blocks|oft_diag|oft_[rR]{_NAMED}(?:\.weight)?)$"),
    "a GLoRA": re.compile(r"\.[ab][12]\.weight$"),
}
_SAT = re.compile(r"\.(query_key_value|dense)\.matrix_([AB])\.(\d)$")
_SAT_NAMES = {
    ".attn1.to_q": ".attention.q",
    ".attn1.to_k": ".attention.k",
    ".attn1.to_v": ".attention.v",
    ".attn1.to_qkv": ".attention.query_key_value",
    ".attn1.to_out.0": ".attention.dense",
    ".ff.net.0.proj": ".mlp.dense_h_to_4h",
    ".ff.net.2": ".mlp.dense_4h_to_h",
}
_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "module.",
)
_FLAT = re.compile(r"(?:lora_unet|lora_transformer|lycoris)_+")
_TEXT = re.compile(
    r"lora_te\d*_|text_encoders?[._\d]|te\d?\.|t5xxl\.|clip_[lgh]\.|text_model\.|cond_stage_model\."
)
# Modules that CogVideoX does not have, with underscores for dots; the first that is found names the model.
_FOREIGN = {
    "Stable Diffusion XL or 1.5": r"(?:down|up|input|output)_blocks_\d|mid_block_|middle_block_",
    "Flux or Hunyuan Video": r"single_transformer_blocks_\d|(?:double|single)_blocks_\d",
    "Mochi": r"attn1_(?:add_[qkv]_proj|to_add_out)|attn_qkv_[xy]$",
    "Flux, Stable Diffusion 3 or Qwen-Image": r"joint_blocks_\d|transformer_blocks_\d+_(?:attn|img|txt)_",
    "Wan": r"blocks_\d+_(?:self_attn|cross_attn)_|(?<!transformer_)blocks_\d+_attn[12]_to_",
    "LTX Video or another model with cross-attention": r"transformer_blocks_\d+_attn2_",
}


def split(key: str) -> tuple[str, str]:
    """(module's name, part) of a tensor's name; the part is kohya's or LyCORIS' name for it, a key of
    UNSUPPORTED, or `whole ...` for what is no part of an adapter."""
    sat = _SAT.search(key)
    if sat:
        name = "qkv"[int(sat[3]) % 3] if sat[1] == "query_key_value" else sat[1]
        return f"{key[: sat.start()]}.{name}", DOWN if sat[2] == "A" else UP
    for ending, part in _ENDINGS:
        match = ending.search(key)
        if match:
            return key[: match.start()], part or match[1]
    for kind, ending in UNSUPPORTED.items():
        match = ending.search(key)
        if match:
            return key[: match.start()], kind
    stem, _, kind = key.rpartition(".")
    return stem, f"{WHOLE} {kind}"


def of_text_encoder(stem: str) -> bool:
    return _TEXT.match(stem) is not None


def foreign_model(stems: list[str]) -> str | None:
    """The model whose LoRA has such modules, told from names that are not CogVideoX's."""
    flat = [_stripped(stem).replace(".", "_") for stem in stems]
    for model, pattern in _FOREIGN.items():
        if any(re.search(pattern, stem) for stem in flat):
            return model
    return None


class Modules:
    """The modules of a CogVideoX transformer under every name that a file may have for them."""

    def __init__(self, parameters: Mapping[str, Shape]) -> None:
        """parameters: {diffusers' name: shape} of the whole model."""
        self.parameters = parameters
        modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
        joint = [f"{module}kv" for module in modules if module.endswith(".attn1.to_q")]
        self._dotted = {alias: module for module in [*modules, *joint] for alias in _aliases(module)}
        self._flat = {alias.replace(".", "_"): module for alias, module in self._dotted.items()}

    def resolve(self, stem: str) -> str | None:
        """Our module of a module's name in a file, `...attn1.to_qkv` where q, k and v are one there."""
        flat = _FLAT.match(stem)
        if flat:
            return self._flat.get(stem[flat.end() :])
        return self._dotted.get(_stripped(stem))

    def shape(self, module: str, kind: str = "weight") -> Shape | None:
        """(3 * D, D) of `...attn1.to_qkv`, whose parts are apart in our model. None: there is no such one."""
        if not fused(module):
            return self.parameters.get(f"{module}.{kind}")
        one = self.parameters.get(f"{module[:-2]}.{kind}")
        return one and (3 * one[0], *one[1:])

    def beyond(self, stem: str) -> int | None:
        """The number of a block that this model is too short for."""
        block = re.search(r"(?<=blocks[._])\d+|(?<=layers\.)\d+", stem)
        if block and self.resolve(f"{stem[: block.start()]}0{stem[block.end() :]}"):
            return int(block[0])
        return None

    @property
    def width(self) -> int:
        return self.parameters["transformer_blocks.0.attn1.to_q.weight"][0]

    @property
    def depth(self) -> int:
        blocks = (re.match(r"transformer_blocks\.(\d+)\.", name) for name in self.parameters)
        return 1 + max(int(block[1]) for block in blocks if block)


def fused(module: str) -> bool:
    return module.endswith(".attn1.to_qkv")


def parts_of(module: str) -> list[str]:
    """The modules of our model that a file's module stands for."""
    return [f"{module[:-3]}{name}" for name in "qkv"] if fused(module) else [module]


def _stripped(stem: str) -> str:
    """A dotted name without what stands before the transformer's own names."""
    prefix = next((prefix for prefix in _PREFIXES if stem.startswith(prefix)), None)
    return stem if prefix is None else _stripped(stem[len(prefix) :])


def _aliases(module: str) -> Iterator[str]:
    yield module
    yield to_comfy(f"{module}.").removesuffix(".")
    if module.endswith(".attn1.to_out.0"):
        yield module.removesuffix(".0")
    if ".attn1.to_" in module:
        yield module.replace(".attn1.to_", ".attn1.processor.to_")
    if fused(module):
        yield module.replace(".to_qkv", ".qkv")
        yield to_comfy(module.replace(".attn1.to_qkv", ".qkv."))[:-1]
    for ours, theirs in _SAT_NAMES.items():
        if module.endswith(ours):
            yield module.replace("transformer_blocks.", "layers.").replace(ours, theirs)
