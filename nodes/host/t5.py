"""T5 as the host's CLIP, without mask and without weights in the prompt: CogVideoX reads plain, padded text.

The network is the host's own (fp8 files, LoRA, offloading); the tokenizer cuts and pads to the text length.
"""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.text_encoders.sd3_clip as host_t5
import torch
from comfy import sd1_clip
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders.t5 import T5
from torch import Tensor

from ...mimir_core import weights
from ...mimir_core.config import T5_PRESETS, T5Config
from ...mimir_core.text import Cut, Piece, load_tokenizer, require_whole, t5_pieces, t5_tokens
from .conditioning import record_text
from .fp8 import Weights, as_they_are
from .patcher import build_clip
from .report import naming, require_finite

NAME = "t5xxl"  # the key of T5 tokens in every CLIP of the host, whatever the size
TEXT_LENGTH = 226  # CogVideoX's; Mimir Tiny has its own
PAD, EOS, UNKNOWN = 0, 1, 2
MASK = "attention_mask"
HOST_TOKENIZER = Path(str(host_t5.__file__)).parent / "t5_tokenizer"


def load_t5(path: Path, length: int = TEXT_LENGTH, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """A T5 encoder from a safetensors file or a Hugging Face folder.

    T5 v1.1 XXL uses the tokenizer that ComfyUI ships; any other size needs its own files beside its weights.
    """
    source = weights.read_t5(path)
    own = path if path.is_dir() else path.parent
    folder = HOST_TOKENIZER if source.config == T5_PRESETS["xxl"] else own
    state = dict(source.state)
    embedding = state.pop("encoder.embed_tokens.weight", None)  # the same tensor under its second name
    if embedding is not None:
        state.setdefault("shared.weight", embedding)
    found, options = _options(state)
    with naming(path):
        tokens = partial(T5Tokens, load_tokenizer(folder), length)
    target = ClipTarget(tokens, partial(T5Model, source.config, options))
    clip = build_clip(target, found.state, disable_dynamic)
    clip.cond_stage_model.origin, clip.cond_stage_model.note = source.origin, found.note
    clip.patcher.cached_patcher_init = (_reload, (path, length))
    return clip


def _reload(path: Path, length: int, disable_dynamic: bool = False) -> Any:
    return load_t5(path, length, disable_dynamic).patcher


def encode(clip: comfy.sd.CLIP, text: str) -> tuple[list[Any], str]:
    """CONDITIONING (1, n, D) of the prompt, and a sentence that says what T5 had to cut.

    Takes our CLIP, or any other that holds the host's T5-XXL, of whatever type and operations (fp8, GGUF):
    its tokens are cut and padded to 226, its mask is left out, other encoders in it are not asked.
    """
    require_whole("prompt", text)
    tokens = clip.tokenize(text, disable_weights=True)
    if NAME not in tokens:
        raise ValueError(_not_t5(tokens))
    pieces = _pieces(clip.tokenizer, tokens[NAME], text)
    if isinstance(clip.tokenizer, T5Tokens):
        cut, length = clip.tokenizer.read(text)[1], clip.tokenizer.length
    else:
        (tokens[NAME], cut), length = _fit(tokens[NAME]), TEXT_LENGTH
        clip = _alone(clip)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    _check(conditioning, length)
    conditioning = [[entry[0], {**entry[1], MASK: _all_read(entry[0])}] for entry in conditioning]
    return record_text(conditioning, clip, text, length, cut, pieces), _report(cut)


def _pieces(tokenizer: Any, sections: list[list[Any]], text: str) -> list[Piece]:
    """What T5's tokens stand for; those of other loaders are of T5-XXL's vocabulary."""
    if isinstance(tokenizer, T5Tokens):
        ids = tokenizer.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return t5_pieces(tokenizer.tokenizer, ids, text, tokenizer.length)
    ids = [token[0] if isinstance(token[0], int) else UNKNOWN for token in _real(sections)]
    return t5_pieces(_host_tokenizer(), [*ids, EOS], text, TEXT_LENGTH)


@cache
def _host_tokenizer() -> Any:
    return load_tokenizer(HOST_TOKENIZER)


def _all_read(tokens: Tensor) -> Tensor:
    """The mask (B, n) of CogVideoX, which reads padding too; LTXV and Mochi do not run without one."""
    return torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)


def _alone(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    """`clip` with nothing but its T5; unchanged where that is no network of the host's."""
    for part in clip.cond_stage_model.modules():
        if isinstance(part, sd1_clip.SDClipModel) and isinstance(part.transformer, T5):
            found = clip.clone()  # patches, hooks and layer go with it
            found.cond_stage_model = T5Alone(part)
            return found
    return clip


def _not_t5(tokens: Mapping[str, Any]) -> str:
    if "phi" in tokens:
        return "T5 Encode got Phi-3.5. Connect Load T5 here, and Phi-3.5 to Phi-3.5 Encode."
    if "umt5xxl" in tokens:
        return (
            "T5 Encode got UMT5 (Wan's), which is as wide as T5-XXL but another text space. Connect Load T5 "
            "with a t5xxl file."
        )
    return f"T5 Encode needs a T5 encoder, but this CLIP is of kind {', '.join(tokens)}. Connect Load T5."


def _report(cut: Cut | None) -> str:
    if cut is None:
        return "T5 read the whole prompt."
    words = cut.text.split()
    quote = f", beginning with '{' '.join(words[:8])}'" if words else ""
    return f"The prompt is too long for T5: the last {cut.tokens} tokens are cut off{quote}."


def _fit(sections: list[list[Any]]) -> tuple[list[list[Any]], Cut | None]:
    """The host's (id, weight) tokens as one section of 226, and what did not fit."""
    found = _real(sections)
    kept = found[: TEXT_LENGTH - 1]
    section = [*kept, (EOS, 1.0)]
    cut = Cut(len(found) - len(kept), "") if len(found) > len(kept) else None
    return [section + [(PAD, 1.0)] * (TEXT_LENGTH - len(section))], cut


def _real(sections: list[list[Any]]) -> list[Any]:
    return [token for section in sections for token in section if not _is(token, (EOS, PAD))]


def _is(token: Any, ids: tuple[int, ...]) -> bool:
    return isinstance(token[0], int) and token[0] in ids  # an embedding is a tensor in the id's place


def _check(conditioning: list[Any], length: int) -> None:
    for tokens, _ in conditioning:
        require_finite(tokens, "T5 Encode", "Use an fp16 or bf16 file of T5 v1.1.")
        if tokens.shape[1] != length:
            raise ValueError(
                f"This CLIP joins T5 with others: {tokens.shape[1]} tokens, but CogVideoX reads {length}. "
                "Load T5 alone: Load T5, or core's Load CLIP with one T5 file."
            )


class T5Alone:
    """Stands for the network half of another loader's CLIP: its T5 as CogVideoX reads it, without a mask."""

    def __init__(self, network: sd1_clip.SDClipModel) -> None:
        self.network = network
        self.set_clip_options, self.reset_clip_options = network.set_clip_options, network.reset_clip_options

    def encode_token_weights(self, tokens: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """(1, n, D) of the T5 tokens among `tokens`, and nothing pooled."""
        switches = dict.fromkeys(
            ("enable_attention_masks", "return_attention_masks", "zero_out_masked"), False
        )
        before = {name: getattr(self.network, name) for name in switches}
        try:
            vars(self.network).update(switches)
            return self.network.encode_token_weights(tokens[NAME])[0], None
        finally:
            vars(self.network).update(before)


class T5Tokens:
    """The tokenizer half of the CLIP: {"t5xxl": [[(id, 1.0), ...]]}, always `length` tokens."""

    def __init__(
        self, tokenizer: Any, length: int, embedding_directory: Any = None, tokenizer_data: Any = None
    ) -> None:
        self.tokenizer, self.length = tokenizer, length

    def read(self, text: str) -> tuple[list[int], Cut | None]:
        """Token ids and what was cut off."""
        ids, cut = t5_tokens(self.tokenizer, [text], self.length)
        return ids[0].tolist(), cut[0]

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, Any]:
        ids, _cut = self.read(text)
        return {
            NAME: [
                [(token, 1.0, index) if return_word_ids else (token, 1.0) for index, token in enumerate(ids)]
            ]
        }

    def state_dict(self) -> dict[str, Any]:
        return {}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class T5Model(sd1_clip.SD1ClipModel):
    """The network half: the host's T5 at our sizes."""

    def __init__(
        self,
        config: T5Config,
        weights_are: Mapping[str, Any],
        device: Any = "cpu",
        dtype: Any = None,
        model_options: Any = None,
    ) -> None:
        options = {**(model_options or {}), **weights_are, f"{NAME}_model_config": _host_config(config)}
        dtype = options.pop("dtype_t5", dtype)
        super().__init__(
            device=device, dtype=dtype, name=NAME, clip_model=host_t5.T5XXLModel, model_options=options
        )


def _host_config(config: T5Config) -> dict[str, Any]:
    names = ("d_model", "num_layers", "num_heads", "d_kv", "d_ff", "vocab_size")
    return {name: getattr(config, name) for name in names}


def _options(state: Mapping[str, Tensor]) -> tuple[Weights, dict[str, Any]]:
    """The state as this host wants it, and what its T5 must be told: dtype, operations for scaled fp8."""
    dtype = state["encoder.final_layer_norm.weight"].dtype
    found = as_they_are(state, dtype, torch.float16)
    options: dict[str, Any] = {"dtype_t5": dtype}
    if found.kept:
        options["custom_operations"] = found.operations
    return found, options
