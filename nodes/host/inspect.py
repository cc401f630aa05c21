"""Inspect Tokens, Token Map and the gains: mimir_core.inspect on the host's devices."""

from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor

from ...mimir_core import __version__
from ...mimir_core.inspect import cloud, draw_map, draw_tokens, gain
from ...mimir_core.inspect.dissect import Fusion, dissect
from ...mimir_core.inspect.pieces import t5_pieces
from ...mimir_core.inspect.report import Settings, summary, token_report
from ...mimir_core.provenance import Record, current, require_unfused
from ...mimir_core.tokens import LlmTokens
from . import phi, t5
from .fuser import Fuser, with_preset
from .report import progress, require_finite

METHODS = cloud.METHODS
PARTS = list(gain.PARTS)
FIRST_ENTRY = "The condition has {} parts: this is the first."
FIRST_OF_BATCH = "There are {} prompts in the batch: this is the first."


def inspect_tokens(
    fuser: Fuser, conditioning: list[Any], tokens: LlmTokens, preset: str, strength: float
) -> tuple[Tensor, dict[str, Any], str]:
    """(picture, report as plain JSON types, one sentence). ValueError where it is fused already."""
    text, record, notes = _text_of(conditioning)
    settings = Settings(fuser.name, preset, strength, fuser.trained)
    fusion = _dissected(fuser, text, tokens, settings)
    report = token_report(fusion, tokens, record, settings, notes)
    return draw_tokens.draw(report), report, summary(report)


def _text_of(conditioning: list[Any]) -> tuple[Tensor, Record | None, list[str]]:
    """T5's tokens (B, n, D) of the first entry, what is known about them, and what is left out."""
    if not conditioning or conditioning[0][0] is None:
        raise ValueError("The condition is empty: connect T5 Encode.")
    text, options = conditioning[0]
    require_unfused(conditioning[:1])
    record = current(options, text)
    require_finite(text, "Inspect Tokens", "Encode the prompt again with an fp16 or bf16 file of T5.")
    notes = [FIRST_ENTRY.format(len(conditioning))] if len(conditioning) > 1 else []
    notes += [FIRST_OF_BATCH.format(text.shape[0])] if text.shape[0] > 1 else []
    return text, record, notes


def _dissected(fuser: Fuser, text: Tensor, tokens: LlmTokens, settings: Settings) -> Fusion:
    """The fusion on the fuser's device. An untrained fuser leaves T5 as it is, whatever its network is."""
    if settings.passes or fuser.module is None or fuser.patcher is None:
        return dissect(None, text, tokens, settings.preset)
    module = with_preset(fuser, settings.preset)
    management.load_models_gpu([fuser.patcher])
    return dissect(module, text, tokens, strength=settings.strength, device=fuser.patcher.load_device)


def token_map(
    t5_clip: Any,
    phi_clip: Any,
    fuser: Fuser,
    prompts: str,
    method: str,
    runs: int,
    answer_length: int,
    temperature: float,
    seed: int,
) -> tuple[Tensor, dict[str, Any], str]:
    """(picture, numbers as plain JSON types, one sentence) of a list of prompts and of runs of the first."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    cloud.require_map(lines, method, runs)
    settings = (answer_length, temperature)
    step, total = progress(), len(lines) + runs
    over_prompts, over_runs = [], []
    for index, line in enumerate(lines):
        over_prompts.append(_reading(t5_clip, phi_clip, fuser, line, *settings, seed))
        step(index + 1, total)
    for run in range(runs):
        over_runs.append(_reading(t5_clip, phi_clip, fuser, lines[0], *settings, seed + run))
        step(len(lines) + run + 1, total)
    found = cloud.token_map(over_prompts, over_runs, method, seed)
    numbers = {"prompts": lines, "temperature": temperature, "seed": seed, **found.numbers}
    return draw_map.draw(found, lines), numbers, cloud.summary(numbers)


def _reading(
    t5_clip: Any, phi_clip: Any, fuser: Fuser, prompt: str, answer: int, temperature: float, seed: int
) -> cloud.Reading:
    conditioning, _ = t5.encode(t5_clip, prompt)
    tokens = phi.encode(phi_clip, prompt, (), answer, temperature, seed % 2**64, _layer(fuser))
    text = conditioning[0][0]
    kinds = [piece["kind"] for piece in t5_pieces(current(conditioning[0][1], text), text.shape[1])]
    read = [place for place, kind in enumerate(kinds) if kind in ("text", "unk", "end")]
    module, device = None, torch.device("cpu")
    if fuser.trained and fuser.module is not None and fuser.patcher is not None:
        management.load_models_gpu([fuser.patcher])
        module, device = fuser.module, fuser.patcher.load_device
    return cloud.reading(module, text, tokens, read, device)


def _layer(fuser: Fuser) -> int:
    return -1 if fuser.config is None else fuser.config.llm_layer


def gain_t5(conditioning: list[Any], piece: str, occurrence: int, value: float) -> tuple[list[Any], str]:
    """CONDITIONING with the tokens of a piece times `value`, and what was changed."""
    changed, words = gain.gain_t5(conditioning, piece, occurrence, value, __version__)
    return changed, f"T5's {words}."


def gain_phi(
    tokens: LlmTokens, part: str, piece: str, occurrence: int, value: float
) -> tuple[LlmTokens, str]:
    """MIMIR_TOKENS in which a piece adds `value` times as much to the condition, and what was changed."""
    changed, words = gain.gain_llm(tokens, part, piece, occurrence, value)
    return changed, f"Phi-3.5's {words}. {gain.prompt_gain(changed)}".rstrip()
