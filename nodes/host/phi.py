"""Phi-3.5 as the host's CLIP: our decoder on the host's operations, so that it can be offloaded in part."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.ops
import comfy.sd
import torch
from comfy.supported_models_base import ClipTarget
from torch import Tensor, nn

from ...mimir_core import memory, weights
from ...mimir_core.config import PhiConfig
from ...mimir_core.llm import Sampling, encode_prompt, sample
from ...mimir_core.phi import Phi3ForCausalLM
from ...mimir_core.scaled import dequantised, is_scaled, quantise
from ...mimir_core.text import PhiTokenizer, require_whole
from ...mimir_core.tokens import LlmTokens
from .attention import text_attention
from .conditioning import origin_of
from .fp8 import CANNOT_KEEP, Weights, as_they_are, keep, keep_fine_parts
from .patcher import build_clip
from .report import naming, progress, require_finite

log = logging.getLogger(__name__)

NAME = "phi"
DEFAULT, FP8 = "default", "fp8_e4m3fn"
DEVICES = [DEFAULT, "cpu"]
# What Phi-3.5 may be stored in: name in the combo -> dtype, None where it is not one for all weights.
DTYPES: dict[str, torch.dtype | None] = {
    DEFAULT: None,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    FP8: None,
}
NOT_CONDITIONING = (
    "This CLIP is Phi-3.5, which makes MIMIR_TOKENS, not CONDITIONING. Connect it to Phi-3.5 Encode."
)
NOT_PHI = (
    "Phi-3.5 Encode needs Phi-3.5, but this CLIP is another encoder. "
    "Connect Load Phi-3.5 here, and T5 to T5 Encode."
)


def load_phi(
    path: Path, dtype: str = DEFAULT, device: str = DEFAULT, disable_dynamic: bool = False
) -> comfy.sd.CLIP:
    """Phi-3.5 from a Hugging Face folder, or from a file with its tokenizer files beside it.

    `dtype` is a key of DTYPES: how the weights are stored; `device` is one of DEVICES. ValueError, in one
    sentence, when the file is something else.
    """
    source = weights.read_phi(path, own=True)
    place = torch.device("cpu") if device == "cpu" else None
    found = stored_as(dtype, source.config, source.state, place or management.text_encoder_device())
    with naming(path):
        tokenizer = PhiTokenizer.from_folder(path if path.is_dir() else path.parent)
    target = ClipTarget(partial(PhiTokens, tokenizer), partial(PhiModel, source.config, tokenizer.stop_ids))
    clip = build_clip(target, found.state, disable_dynamic, _plain_dtype(found), found.operations, place)
    stored = FP8 if found.layers else str(_plain_dtype(found)).removeprefix("torch.")
    clip.cond_stage_model.origin = {**source.origin, "dtype": stored}
    clip.patcher.cached_patcher_init = (_reload, (path, dtype, device))
    return clip


def _reload(path: Path, dtype: str, device: str, disable_dynamic: bool = False) -> Any:
    return load_phi(path, dtype, device, disable_dynamic).patcher


def stored_as(dtype: str, config: PhiConfig, state: dict[str, Tensor], device: torch.device) -> Weights:
    """The weights in the form that `dtype` names. fp8 is scaled: each of a block's matrices has its scale."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is '{dtype}', expected one of {', '.join(DTYPES)}")
    wide = DTYPES[dtype]
    if wide is not None:
        return Weights(dequantised(state, wide), None, {})
    compute = compute_dtype(config, device)
    if dtype == FP8 and not is_scaled(state):
        layers = tuple(name.removesuffix(".weight") for name in state if _is_matrix_of_block(name, state))
        wide_layers = tuple(layer for layer in layers if state[f"{layer}.weight"].dtype.itemsize > 1)
        found = keep(quantise(state, wide_layers), compute)
        if found is not None:
            return found
        log.warning("Mimir: %s", CANNOT_KEEP)
        return Weights(dict(state), None, {}, CANNOT_KEEP)
    return as_they_are(state, compute, torch.bfloat16)


def _is_matrix_of_block(name: str, state: Mapping[str, Tensor]) -> bool:
    return name.startswith("model.layers.") and state[name].ndim == 2


def _plain_dtype(found: Weights) -> torch.dtype:
    """The dtype of what is not scaled fp8: most of it."""
    sizes: dict[torch.dtype, int] = {}
    scaled_layers = {f"{layer}.weight" for layer in found.layers}
    for name, tensor in found.state.items():
        if name not in scaled_layers and tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])


def is_phi(clip: comfy.sd.CLIP) -> bool:
    return isinstance(clip.cond_stage_model, PhiModel)


def encode(
    clip: comfy.sd.CLIP,
    prompt: str,
    instructions: tuple[str, ...],
    answer_tokens: int,
    temperature: float,
    seed: int,
    layer: int,
) -> LlmTokens:
    """Hidden states of the prompt, of an answer to it and of the instructions, on the intermediate device."""
    if not is_phi(clip):
        raise ValueError(NOT_PHI)
    for name, text in (("prompt", prompt), *(("instruction", text) for text in instructions)):
        require_whole(name, text)
    network: PhiModel = clip.cond_stage_model
    device = clip.patcher.load_device
    expected = len(prompt) // 3 + answer_tokens + 512  # tokens, roughly, with template and instructions
    needed = memory.phi(network.config, expected, compute_dtype(network.config, device).itemsize, stored=1)
    management.load_models_gpu([clip.patcher], memory_required=needed)
    tokens = encode_prompt(
        network.phi,
        clip.tokenizer.tokenizer,
        prompt,
        instructions,
        answer_tokens,
        temperature,
        seed=seed,
        layer=layer,
        on_token=progress(),
        device=device,
        dtype=compute_dtype(network.config, device),
    )
    require_finite(tokens.sequence(), "Phi-3.5 Encode", "Use the bfloat16 files of Phi-3.5-mini-instruct.")
    place = management.intermediate_device()
    states = {
        name: getattr(tokens, name).to(place, torch.float32) for name in ("query", "answer", "instruction")
    }
    settings = {"answer_length": answer_tokens, "temperature": temperature, "seed": seed}
    computed = str(compute_dtype(network.config, device)).removeprefix("torch.")
    settings |= {"prompt_cut": True} if _is_cut(tokens, prompt) else {}
    return replace(tokens, **states, made={**origin_of(clip), "computed": computed, **settings})


def _is_cut(tokens: LlmTokens, text: str) -> bool:
    return len(tokens.prompt) < len(text.strip())


def report(tokens: LlmTokens, text: str) -> str:
    """What the model answered, and whether it could read all of `text`."""
    answer = f"Phi-3.5 answered: {tokens.answer_text}" if tokens.answer_text else "Phi-3.5 gave no answer."
    if not _is_cut(tokens, text):
        return answer
    stop = "" if answer.endswith((".", "!", "?")) else "."
    return f"{answer}{stop} The prompt was too long for it: it read up to '...{tokens.prompt[-40:]}'."


def compute_dtype(config: PhiConfig, device: torch.device) -> torch.dtype:
    """bfloat16 as Phi-3.5 was made, where the device computes in it and the model is not a toy; else float32.

    Never float16, which its activations overflow.
    """
    large = config.hidden_size >= 1024
    return torch.bfloat16 if large and management.should_use_bf16(device) else torch.float32


class PhiTokens:
    """The tokenizer half of the CLIP; extra arguments are those of core's text generation nodes."""

    def __init__(
        self, tokenizer: PhiTokenizer, embedding_directory: Any = None, tokenizer_data: Any = None
    ) -> None:
        self.tokenizer = tokenizer

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, skip_template: bool = False, **_: Any
    ) -> dict[str, Any]:
        ids = self.tokenizer.tokenizer(text)["input_ids"] if skip_template else self.tokenizer.turn(text).ids
        return {
            NAME: [
                [(token, 1.0, index) if return_word_ids else (token, 1.0) for index, token in enumerate(ids)]
            ]
        }

    def state_dict(self) -> dict[str, Any]:
        return {}

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(ids))


class PhiModel(nn.Module):
    """The network half of the CLIP."""

    def __init__(
        self,
        config: PhiConfig,
        stop_ids: frozenset[int],
        device: Any = "cpu",
        dtype: Any = None,
        model_options: Any = None,
    ) -> None:
        super().__init__()
        operations = (model_options or {}).get("custom_operations") or comfy.ops.manual_cast
        self.config, self.stop_ids, self.dtypes = config, stop_ids, {dtype}
        self.phi = Phi3ForCausalLM(
            config, ops=operations, attention=text_attention, device=device, dtype=dtype
        ).eval()
        self.execution_device: Any = None
        self.origin: dict[str, str] | None = None  # which weights: {"file", "fingerprint"}
        self.note = ""  # for the person who loads it

    def set_clip_options(self, options: dict[str, Any]) -> None:
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self) -> None:
        self.execution_device = None

    def encode_token_weights(self, tokens: Any) -> Any:
        raise ValueError(NOT_CONDITIONING)

    @torch.no_grad()
    def generate(
        self,
        tokens: dict[str, Any],
        do_sample: bool = True,
        max_length: int = 256,
        temperature: float = 1.0,
        top_p: float = 0.95,
        seed: int | None = None,
        **_: Any,
    ) -> list[int]:
        """For core's Generate Text (0.33); its top_k, min_p and penalties are not applied."""
        device, step = self.execution_device, progress()
        dtype, cache = compute_dtype(self.config, device), self.phi.new_cache()
        generator = torch.Generator().manual_seed(seed or 0)
        settings = Sampling(temperature if do_sample else 0.0, top_p)
        new, answer = [entry[0] for entry in tokens[NAME][0]], []
        while len(answer) < max_length:
            (hidden,) = self.phi(torch.tensor([new], device=device), cache, dtype=dtype)
            token = sample(self.phi.logits(hidden[:, -1:])[0, -1], settings, generator)
            if token in self.stop_ids:
                break
            new = [token]
            answer.append(token)
            step(len(answer), max_length)
        return answer

    def load_sd(self, state: dict[str, Tensor]) -> Any:
        """Plain weights become the model's own, in its precision: none is there twice."""
        keep_fine_parts(self.phi, state, cast=False)
        later = getattr(self, "can_assign_sd", False)  # 0.33's dynamic patcher casts by itself
        plain = not is_scaled(state)
        if plain and not later:
            dtypes = {name: parameter.dtype for name, parameter in self.phi.named_parameters()}
            state = {name: tensor.to(dtypes.get(name)) for name, tensor in state.items()}
        return self.phi.load_state_dict(state, strict=False, assign=plain or later)
