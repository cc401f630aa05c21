"""Phi-3.5 as the host's CLIP: our decoder on the host's operations, so that it can be offloaded in part."""

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

from ...mimir_core import weights
from ...mimir_core.config import PhiConfig
from ...mimir_core.llm import Sampling, encode_prompt, sample
from ...mimir_core.phi import Phi3ForCausalLM
from ...mimir_core.text import PhiTokenizer
from ...mimir_core.tokens import LlmTokens
from .attention import text_attention
from .conditioning import origin_of
from .patcher import build_clip, plain_weights
from .report import naming, progress, require_finite

NAME = "phi"
NOT_CONDITIONING = (
    "This CLIP is Phi-3.5, which makes MIMIR_TOKENS, not CONDITIONING. Connect it to Phi-3.5 Encode."
)
NOT_PHI = (
    "Phi-3.5 Encode needs Phi-3.5, but this CLIP is another encoder. "
    "Connect Load Phi-3.5 here, and T5 to T5 Encode."
)


def load_phi(path: Path, disable_dynamic: bool = False) -> comfy.sd.CLIP:
    """Phi-3.5 from a Hugging Face folder, or from a file with its tokenizer files beside it.

    The weights keep the dtype they have on disk. ValueError, in one sentence, when it is something else.
    """
    source = weights.read_phi(path)
    state = plain_weights(source.state)
    with naming(path):
        tokenizer = PhiTokenizer.from_folder(path if path.is_dir() else path.parent)
    target = ClipTarget(partial(PhiTokens, tokenizer), partial(PhiModel, source.config, tokenizer.stop_ids))
    clip = build_clip(target, state, disable_dynamic, dtype=next(iter(state.values())).dtype)
    clip.cond_stage_model.origin = source.origin
    clip.patcher.cached_patcher_init = (_reload, (path,))
    return clip


def _reload(path: Path, disable_dynamic: bool = False) -> Any:
    return load_phi(path, disable_dynamic).patcher


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
    network: PhiModel = clip.cond_stage_model
    device = clip.patcher.load_device
    expected = len(prompt) // 3 + answer_tokens  # tokens, roughly
    management.load_models_gpu([clip.patcher], memory_required=_memory(network.config, expected))
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
        dtype=compute_dtype(network, device),
    )
    require_finite(tokens.sequence(), "Phi-3.5 Encode", "Use the bfloat16 files of Phi-3.5-mini-instruct.")
    place = management.intermediate_device()
    states = {
        name: getattr(tokens, name).to(place, torch.float32) for name in ("query", "answer", "instruction")
    }
    settings = {"answer_length": answer_tokens, "temperature": temperature, "seed": seed}
    dtype = str(compute_dtype(network, device)).removeprefix("torch.")
    return replace(tokens, **states, made={**origin_of(clip), "dtype": dtype, **settings})


def report(tokens: LlmTokens, text: str) -> str:
    """What the model answered, and whether it could read all of `text`."""
    answer = f"Phi-3.5 answered: {tokens.answer_text}" if tokens.answer_text else "Phi-3.5 gave no answer."
    if len(tokens.prompt) >= len(text.strip()):
        return answer
    stop = "" if answer.endswith((".", "!", "?")) else "."
    return f"{answer}{stop} The prompt was too long for it: it read up to '...{tokens.prompt[-40:]}'."


def compute_dtype(network: "PhiModel", device: torch.device) -> torch.dtype:
    """bfloat16 as Phi-3.5 was made, where the device computes in it and the model is not a toy; else float32.

    Never float16, which its activations overflow.
    """
    large = network.config.hidden_size >= 1024
    return torch.bfloat16 if large and management.should_use_bf16(device) else torch.float32


def _memory(config: PhiConfig, tokens: int) -> int:
    """Bytes besides the weights: keys, values and hidden states of every layer, in 32 bit, and the mask."""
    tokens += 512  # template and instructions
    return 4 * tokens * (3 * config.num_hidden_layers * config.hidden_size + tokens)


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
        dtype, cache = compute_dtype(self, device), self.phi.new_cache()
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
        return self.phi.load_state_dict(state, strict=False, assign=getattr(self, "can_assign_sd", False))
