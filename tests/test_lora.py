"""LoRA files: written by PEFT and diffusers themselves, merged there, and read back under every name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimir_core.config import DIT_PRESETS
from mimir_core.dit import CogVideoXTransformer
from mimir_core.lora import Adapter, match_lora
from mimir_core.lora_names import Modules
from mimir_core.recognise import to_comfy

CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "time_embed_dim": 32,
    "text_embed_dim": 24,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 16,
    "use_rotary_positional_embeddings": True,
}
EVERY = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"]
EVERY += ["patch_embed.proj", "text_proj", "norm_out.linear", "proj_out", "linear_1", "linear_2"]
RANK = 4


def transformer(**changes: Any) -> Any:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    torch.manual_seed(1)
    return CogVideoXTransformer3DModel(**{**CONFIG, **changes}).requires_grad_(False)


def trained(model: Any, **options: Any) -> Any:
    """PEFT's model around `model`, as it is after training: every tensor of the LoRA is random."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": RANK, "lora_alpha": RANK, "target_modules": EVERY, **options})
    adapted = get_peft_model(model, config)
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


PARAMETERS = shapes(transformer())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """PEFT's LoRA on every linear layer: {"transformer_blocks.0.attn1.to_q.lora_A.weight": tensor}."""
    folder = tmp_path_factory.mktemp("plain")
    trained(transformer()).save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


@pytest.fixture
def lora(tmp_path: Path) -> Callable[..., Path]:
    """lora(tensors) -> a file with them; lora(metadata={...}) adds to its header."""

    def write(tensors: Mapping[str, Tensor], **metadata: Any) -> Path:
        path = tmp_path / "some_lora.safetensors"
        notes = {key: json.dumps(value) for key, value in metadata.items()}
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, notes)
        return path

    return write


def loaded(path: Path, parameters: Any = PARAMETERS) -> dict[str, Adapter]:
    match = match_lora(path, parameters)
    assert not match.left and "; unmatched: none" in match.summary, match.report
    return match.load()


def change(adapter: Adapter, shape: tuple[int, ...]) -> Tensor:
    """What a LoRA adds to its weight, by its definition."""
    up, down = adapter.tensors["lora_up.weight"], adapter.tensors["lora_down.weight"]
    scale = 1.0 if adapter.alpha is None else adapter.alpha / down.shape[0]
    return scale * (up.flatten(1).double() @ down.flatten(1).double()).reshape(shape)


def same(found: dict[str, Adapter], expected: dict[str, Adapter]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].alpha == adapter.alpha
        and found[name].tensors.keys() == adapter.tensors.keys()
        and all(torch.equal(found[name].tensors[part], adapter.tensors[part]) for part in adapter.tensors)
        for name, adapter in expected.items()
    )


OPTIONS = {
    "alpha": {"lora_alpha": 6},
    "patterns": {
        "lora_alpha": 3,
        "alpha_pattern": {"to_q": 8, r"1\.ff\.net\.\d": 1},
        "rank_pattern": {"to_q": 2},
    },
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "bias": {"lora_alpha": 6, "lora_bias": True},
}


@pytest.mark.filterwarnings("ignore:.*invalid shape")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_peft_saves_is_what_peft_merges(tmp_path, options):
    model = transformer()
    before = state(model)
    adapted = trained(model, **options)
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload().state_dict()
    found = loaded(tmp_path / "adapter_model.safetensors")
    for name in before:
        module, _, kind = name.rpartition(".")
        added = (merged[name] - before[name]).double()
        if kind == "weight" and module in found:
            expected = change(found[module], before[name].shape)
        elif kind == "bias" and "diff_b" in found.get(module, Adapter({}, None)).tensors:
            expected = found[module].tensors["diff_b"].double()
        else:
            expected = torch.zeros_like(added)
        assert (added - expected).abs().max() < 1e-6, name
    assert len(found) == 8 * 2 + 6


def test_the_linear_patches_of_one_and_a_half(tmp_path):
    model = transformer(patch_size_t=2, patch_bias=False)
    before = state(model)
    adapted = trained(model)
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()
    found = loaded(tmp_path / "adapter_model.safetensors", shapes(merged))
    added = merged.state_dict()["patch_embed.proj.weight"] - before["patch_embed.proj.weight"]
    assert torch.allclose(added.double(), change(found["patch_embed.proj"], added.shape), atol=1e-6)


def named(prefix: str, old: str = "", new: str = "") -> Callable[[str], str]:
    return lambda name: prefix + name.replace(old, new)


def flat(prefix: str) -> Callable[[str], str]:
    def rename(name: str) -> str:
        module, _, side = name.removesuffix(".weight").rpartition(".")
        return f"{prefix}{module.replace('.', '_')}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"

    return rename


def lora_down(name: str, style: str) -> str:
    return name.replace("lora_A", style.format("down")).replace("lora_B", style.format("up"))


def native(name: str) -> str:
    module, _, side = name.removesuffix(".weight").rpartition(".")
    return f"diffusion_model.{to_comfy(module + '.')[:-1]}.{side}.weight"


FORMS: dict[str, Callable[[str], str]] = {  # from PEFT's name to the file's
    "no prefix": named(""),
    "diffusers": named("transformer."),
    "PEFT": named("base_model.model."),
    "PEFT of a pipeline": named("base_model.model.transformer."),
    "core": named("diffusion_model."),
    "core checkpoint": named("model.diffusion_model."),
    "DiffSynth": named("pipe.dit."),
    "adapter name": lambda name: "transformer." + name.replace(".weight", ".default.weight"),
    "no .weight": lambda name: "transformer." + name.removesuffix(".weight"),
    "lora.down": lambda name: "transformer." + lora_down(name, "lora.{}"),
    "lora_down": lambda name: "diffusion_model." + lora_down(name, "lora_{}"),
    "lora_linear_layer": lambda name: "transformer." + lora_down(name, "lora_linear_layer.{}"),
    "kohya": flat("lora_unet_"),
    "VideoX-Fun": flat("lora_unet__"),
    "OneTrainer": flat("lora_transformer_"),
    "LyCORIS": flat("lycoris_"),
    "native": native,
    "native, flat": lambda name: flat("lora_unet_")(native(name).removeprefix("diffusion_model.")),
    "to_out": named("transformer.", "to_out.0", "to_out"),
    "processor": lambda name: "transformer." + lora_down(name, "X{}")
    .replace("attn1.to_", "attn1.processor.to_").replace(".X", "_lora."),
}  # fmt: skip


@pytest.mark.parametrize("rename", FORMS.values(), ids=FORMS)
def test_every_form_is_the_plain_form_bit_for_bit(plain, lora, rename):
    expected = loaded(lora(plain))
    assert same(loaded(lora({rename(name): tensor for name, tensor in plain.items()})), expected)
    alphas = {
        rename(name).split(".lora")[0].split("_lora.")[0] + ".alpha" for name in plain if "lora_A" in name
    }
    with_alpha = {rename(name): tensor for name, tensor in plain.items()}
    with_alpha.update({name: torch.tensor(6.0) for name in alphas})
    found = loaded(lora(with_alpha))
    assert {adapter.alpha for adapter in found.values()} == {6.0}
    assert same({name: Adapter(adapter.tensors, None) for name, adapter in found.items()}, expected)


def attention(plain: Mapping[str, Tensor], side: str, module: str) -> Tensor:
    return plain[f"transformer_blocks.0.attn1.{module}.{side}.weight"]


@pytest.mark.parametrize(
    "module",
    [
        "transformer.transformer_blocks.0.attn1.to_qkv",
        "transformer_blocks.0.attn1.qkv",
        "lora_unet__transformer_blocks_0_attn1_to_qkv",
        "diffusion_model.blocks.0.qkv",
        "model.diffusion_model.transformer.layers.0.attention.query_key_value",
    ],
)
def test_fused_projections_are_taken_apart(plain, lora, module):
    down = attention(plain, "lora_A", "to_q")
    ups = {name: attention(plain, "lora_B", f"to_{name}") for name in "qkv"}
    apart = {f"transformer_blocks.0.attn1.to_{name}.lora_A.weight": down for name in "qkv"}
    apart.update({f"transformer_blocks.0.attn1.to_{name}.lora_B.weight": up for name, up in ups.items()})
    together = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": torch.cat(list(ups.values()))}
    assert same(loaded(lora(together)), loaded(lora(apart)))
    bias = torch.arange(3 * 64.0)
    found = loaded(lora({**together, f"{module}.lora_B.bias": bias, f"{module}.alpha": torch.tensor(2.0)}))
    assert torch.equal(found["transformer_blocks.0.attn1.to_k"].tensors["diff_b"], bias[64:128] / 2)


def test_the_authors_own_layout(plain, lora):
    tensors, expected = {}, {}
    for side in "AB":
        for index, name in enumerate(["to_q", "to_k", "to_v", "to_out.0"]):
            tensor = attention(plain, f"lora_{side}", name)
            kind, number = ("query_key_value", index) if index < 3 else ("dense", 0)
            layer = "model.diffusion_model.transformer.layers.0.attention"
            tensors[f"{layer}.{kind}.matrix_{side}.{number}"] = tensor
            expected[f"transformer_blocks.0.attn1.{name}.lora_{side}.weight"] = tensor
    found = loaded(lora(tensors))
    assert same(found, loaded(lora(expected))) and len(found) == 4


@pytest.mark.parametrize("preset", ["2b", "5b", "1.5-5b"])
def test_flat_names_are_unique(preset):
    with torch.device("meta"):
        modules = Modules(shapes(CogVideoXTransformer(DIT_PRESETS[preset])))
    names = {name.rpartition(".")[0] for name in modules.parameters}
    assert all(modules.resolve("lora_unet_" + name.replace(".", "_")) == name for name in names)
    assert all(modules.resolve("diffusion_model." + to_comfy(name + ".")[:-1]) == name for name in names)


HEADERS = {
    "diffusers": {"lora_adapter_metadata": {"transformer.r": 4, "transformer.lora_alpha": 6}},
    "finetrainers": {"lora_config": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_alpha_from_the_header(plain, lora, header):
    path = lora(plain, **header)
    assert {adapter.alpha for adapter in loaded(path).values()} == {6.0}
    assert match_lora(path, PARAMETERS).summary == (
        "matched 22 of 22 modules (rank 4, alpha 6, scale 1.5); unmatched: none"
    )
    some = "transformer_blocks.1.attn1.to_v"
    own = loaded(lora({**plain, f"{some}.alpha": torch.tensor(1.0)}, **header))
    assert {name for name, adapter in own.items() if adapter.alpha == 1.0} == {some}


def test_what_diffusers_saves(plain, tmp_path):
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline

    settings = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"to_q": 8}, "rank_pattern": {}}
    CogVideoXPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=plain, transformer_lora_adapter_metadata=settings
    )
    found = loaded(tmp_path / "pytorch_lora_weights.safetensors")
    alphas = {name: adapter.alpha for name, adapter in found.items()}
    assert all(alpha == (8 if name.endswith("to_q") else 2) for name, alpha in alphas.items())


@pytest.mark.parametrize("broken", [{"lora_alpha": "much"}, {"lora_alpha": 1, "alpha_pattern": {"*": 2}}])
def test_a_header_that_cannot_be_read_is_no_scale_of_one(plain, lora, broken):
    with pytest.raises(ValueError, match="The LoRA settings of some_lora.safetensors cannot be read"):
        match_lora(lora(plain, lora_config=broken), PARAMETERS)


def test_settings_of_another_file_are_left_alone(plain, lora, tmp_path):
    path = lora({f"base_model.model.{name}": tensor for name, tensor in plain.items()})
    assert (
        "adapter_config.json, which has its alpha, is not beside it" in match_lora(path, PARAMETERS).summary
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 8}')
    assert "alpha 8, scale 2" in match_lora(path, PARAMETERS).summary
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "several files share its folder" in match_lora(path, PARAMETERS).summary
    (tmp_path / "adapter_config.json").write_text("{not json")
    path.rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="settings of adapter_model.safetensors cannot be read"):
        match_lora(tmp_path / "adapter_model.safetensors", PARAMETERS)


def test_differences_and_biases(lora):
    norm, query = torch.randn(64), torch.randn(64, 64)
    final = "diffusion_model.norm_final"
    tensors = {f"{final}.diff": norm, f"{final}.diff_b": -norm}
    found = loaded(lora({**tensors, "transformer_blocks.0.attn1.to_q.diff": query}))
    assert torch.equal(found["norm_final"].tensors["diff"], norm)
    assert torch.equal(found["norm_final"].tensors["diff_b"], -norm)
    assert torch.equal(found["transformer_blocks.0.attn1.to_q"].tensors["diff"], query)


def test_loha_and_lokr_are_measured(lora):
    name = "lora_unet_transformer_blocks_0_ff_net_2"
    rows, columns = torch.ones(64, 2), torch.ones(2, 256)
    both = {f"{name}.hada_w{i}_{side}": part for i in (1, 2) for side, part in (("a", rows), ("b", columns))}
    assert list(loaded(lora(both))) == ["transformer_blocks.0.ff.net.2"]
    kron = {f"{name}.lokr_w1": torch.ones(8, 16), f"{name}.lokr_w2_a": torch.ones(8, 2)}
    kron[f"{name}.lokr_w2_b"] = torch.ones(2, 16)
    assert list(loaded(lora(kron))) == ["transformer_blocks.0.ff.net.2"]
    kron[f"{name}.lokr_w1"] = torch.ones(8, 8)
    with pytest.raises(ValueError, match=r"none of which fits .*64x128, here 64x256"):
        match_lora(lora(kron), PARAMETERS)


# --- what does not fit ---


def pair(module: str, inner: int = 3072, outer: int | None = None) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": torch.zeros(1, inner),
        f"{module}.lora_B.weight": torch.zeros(outer or inner, 1),
    }


def flux() -> dict[str, Tensor]:
    """ai-toolkit's names. Every feed-forward and proj_out has the very shape of CogVideoX-5B's."""
    tensors: dict[str, Tensor] = {}
    for block in range(19):
        base = f"transformer.transformer_blocks.{block}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj"):
            tensors.update(pair(f"{base}.attn.{name}"))
        tensors.update(pair(f"{base}.ff.net.0.proj", 3072, 12288))
        tensors.update(pair(f"{base}.ff.net.2", 12288, 3072))
    for block in range(38):
        tensors.update(pair(f"transformer.single_transformer_blocks.{block}.attn.to_q"))
    return {**tensors, **pair("transformer.proj_out", 3072, 64)}


def kohya(*modules: str) -> dict[str, Tensor]:
    names = {name: tensor for module in modules for name, tensor in pair(module).items()}
    return {lora_down(name, "lora_{}"): tensor for name, tensor in names.items()}


QUERY = pair("transformer_blocks.0.attn1.to_q")
SDXL = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
SDXL_TEXT = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
FOREIGN: dict[str, tuple[dict[str, Tensor], str]] = {
    "Flux": (flux(), "a LoRA for Flux or Hunyuan Video: CogVideoX lacks 133 of its 172 modules, but"),
    "Flux, kohya": (kohya("lora_unet_double_blocks_0_img_attn_qkv"), "Flux .* 1 of its 1 module,"),
    "SDXL": (kohya(SDXL, SDXL_TEXT), "Stable Diffusion XL or 1.5: CogVideoX lacks 1 of its 1 module"),
    "Wan": (pair("diffusion_model.blocks.0.cross_attn.q"), "for Wan"),
    "Wan, diffusers": (pair("transformer.blocks.0.attn1.to_q", 1536), "for Wan"),
    "LTX": (QUERY | pair("transformer_blocks.0.attn2.to_q"), "LTX"),
    "Mochi": (QUERY | pair("transformer_blocks.0.attn1.add_q_proj"), "for Mochi: CogVideoX lacks 1 of its 2"),
    "48 blocks": (QUERY | pair("transformer_blocks.47.attn1.to_q"), "of 48 blocks, and this one has 42"),
    "SD3": (pair("transformer.transformer_blocks.0.attn.to_q"), "Stable Diffusion 3"),
    "unknown": (pair("backbone.q"), r"1 module, none of which fits \(the first, backbone.q"),
    "text encoder": (kohya("lora_te1_a", "lora_te1_b"), "2 modules of a text encoder"),
    "2B": (
        pair("transformer.transformer_blocks.0.attn1.to_q", 1920),
        r"width 1920 \(CogVideoX-2B\), and this one has 3072 \(CogVideoX-5B or 1.5\)",
    ),
    "2B feed-forward": (pair("transformer_blocks.0.ff.net.0.proj", 1920, 7680), "width 1920"),
    "2B norm": (pair("transformer_blocks.0.norm1.linear", 512, 11520), "width 1920"),
    "OFT": ({"transformer_blocks.0.attn1.to_q.oft_blocks": torch.zeros(2, 4, 4)}, "is an OFT for 1"),
    "a checkpoint": ({"decoder.conv_in.conv.weight": torch.zeros(1)}, "another model's video VAE"),
    "twice": (QUERY | pair("diffusion_model.blocks.0.q"), "two LoRAs for transformer_blocks.0.attn1.to_q"),
}


@pytest.fixture(scope="module")
def five() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes(CogVideoXTransformer(DIT_PRESETS["5b"]))


@pytest.mark.parametrize(("tensors", "words"), FOREIGN.values(), ids=FOREIGN)
def test_other_loras_are_refused_in_one_sentence(five, lora, tensors, words):
    with pytest.raises(ValueError, match=words) as refused:
        match_lora(lora(tensors), five)
    message = str(refused.value)
    assert message.startswith("some_lora.safetensors is ") and "\n" not in message
    assert message.endswith(".") and ("choose one that was trained" in message or "merge it" in message)


def test_dora_is_refused(tmp_path):
    trained(transformer(), use_dora=True, target_modules=["to_q"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a DoRA \(with magnitudes\) for 2 modules, which cannot"):
        match_lora(tmp_path / "adapter_model.safetensors", PARAMETERS)


def test_other_adapters_of_peft_are_refused(tmp_path):
    from peft import LoHaConfig, get_peft_model

    config = LoHaConfig(r=2, alpha=4, target_modules=["to_q"])
    get_peft_model(transformer(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="PEFT's LOHA, which cannot be applied exactly"):
        match_lora(tmp_path / "adapter_model.safetensors", PARAMETERS)


def test_a_part_is_matched_and_the_rest_named(five, lora):
    tensors = {
        **pair("transformer.transformer_blocks.0.attn1.to_q"),
        **pair("transformer.patch_embed.proj", 32 * 4, 3072),
        **pair("transformer.perceiver_cross_attention.0.to_q"),
        **kohya("lora_te_text_model_encoder_layers_0_mlp_fc1"),
        "transformer.transformer_blocks.0.attn1.to_k.lora_B.weight": torch.zeros(3072, 1),
        "transformer.transformer_blocks.1.norm1.norm.weight": torch.zeros(3072),
        "transformer.patch_embed.text_proj.lora_A.weight": torch.zeros(1, 4096),
        "transformer.patch_embed.text_proj.lora_B.weight": torch.zeros(3072, 1),
        "transformer.patch_embed.text_proj.lora_B.bias": torch.zeros(8),
    }
    match = match_lora(lora(tensors), five)
    assert match.summary.startswith("matched 2 of 7 modules (rank 1, no alpha, so scale 1); unmatched: ")
    for line in (
        "transformer.patch_embed.proj: for the patches of another CogVideoX, image-to-video or 1.5 "
        "(3072x128, here 3072x64)",
        "transformer.perceiver_cross_attention.0.to_q: not in this model",
        "lora_te_text_model_encoder_layers_0_mlp_fc1: of a text encoder, which stays as it is",
        "transformer.transformer_blocks.0.attn1.to_k: incomplete, since one of its tensors is missing",
        "transformer.transformer_blocks.1.norm1.norm.weight: replaced whole, not by a LoRA",
        "transformer.patch_embed.text_proj: of another shape (8x1, here 3072x1)",
    ):
        assert line in match.report.splitlines(), match.report
    assert set(match.load()) == {"transformer_blocks.0.attn1.to_q", "patch_embed.text_proj"}
