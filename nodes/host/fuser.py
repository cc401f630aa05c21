"""The Token Fuser on the host's devices, and CONDITIONING in and out of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...mimir_core import weights
from ...mimir_core.config import FUSER_PRESETS, FuserConfig, to_dict
from ...mimir_core.fuser import TokenFuser
from ...mimir_core.headers import fingerprint
from ...mimir_core.inspect.gain import idle_gain
from ...mimir_core.provenance import NO_ORIGIN, UNKNOWN, current, require_unfused, unlike_training
from ...mimir_core.tokens import LlmTokens
from .conditioning import fused_options
from .files import SUFFIXES
from .names import checked
from .patcher import module_patcher

UNTRAINED = "untrained (identity)"
AS_TRAINED = "as trained"
PRESETS = [AS_TRAINED, *FUSER_PRESETS]
MASK = "attention_mask"  # the host's option that says which tokens a model is to read, (B, n)
SWITCHES = ("use_llm", "norm", "zero_conv", "stabilizer")
IDENTITY_NOTE = "This fuser is untrained: T5's condition passes unchanged, bit for bit."
STRENGTH_0_NOTE = "Strength 0: T5's condition passes unchanged, bit for bit."


@dataclass(frozen=True)
class Fuser:
    """What travels on a MIMIR_FUSER wire. An untrained one may have no network: it fits any size."""

    name: str
    trained: bool
    module: TokenFuser | None = None
    patcher: ModelPatcher | None = None
    origin: dict[str, str] | None = None  # which weights: {"file": name, "fingerprint": hexadecimal}
    training: Mapping[str, Any] = field(default_factory=dict)  # its file's header: what it was trained on

    @property
    def config(self) -> FuserConfig | None:
        return None if self.module is None else self.module.config


def untrained_fuser() -> Fuser:
    return Fuser(UNTRAINED, trained=False)


def load_fuser(path: Path) -> Fuser:
    """A fuser from its safetensors file, whose header holds its configuration."""
    source = weights.read_fuser(path)
    training = source.header.get("training")
    known = training if isinstance(training, Mapping) else {}
    return build_fuser(path.name, source.config, source.state, source.origin, known)


def build_fuser(
    name: str,
    config: FuserConfig,
    state: dict[str, Tensor],
    origin: dict[str, str] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Fuser:
    module = TokenFuser(config, ops=comfy.ops.manual_cast, dtype=next(iter(state.values())).dtype)
    module.load_state_dict(state)
    module.eval().requires_grad_(False)
    return Fuser(name, is_trained(config, state), module, module_patcher(module), origin, training or {})


def save_fuser(fuser: Fuser, folder: Path, name: str) -> Path:
    """A file for Load Token Fuser, with what the fuser was trained on in its header; the file's path.

    Nothing is overwritten: where another fuser has the name, a number is added.
    """
    if fuser.module is None:
        raise ValueError("This fuser is 'untrained (identity)' and has no weights: there is nothing to save.")
    below = checked(name.removesuffix(SUFFIXES[0]))
    folder = folder / below.parent
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{below.name}.partial"
    header: dict[str, Any] = {"config": to_dict(fuser.module.config)}
    if fuser.training:
        header["training"] = dict(fuser.training)
    weights.save(partial, fuser.module.state_dict(), None, **header)
    numbers = chain([""], (f"_{number}" for number in count(2)))
    files = (folder / f"{below.name}{number}{SUFFIXES[0]}" for number in numbers)
    file = next(file for file in files if not _is_another(file, partial))
    partial.replace(file)
    return file


def _is_another(path: Path, partial: Path) -> bool:
    return path.exists() and fingerprint(path) != fingerprint(partial)


def is_trained(config: FuserConfig, state: dict[str, Tensor]) -> bool:
    """Zero convolutions move with the first training step; while all are zero, nothing has been learnt."""
    if not config.zero_conv:
        return True
    return any(
        bool(tensor.any()) for name, tensor in state.items() if name.startswith(("encoder_conv", "llm_conv"))
    )


def require_range(start: float | None, end: float | None) -> bool:
    """True, or a ValueError: the part of the sampling that is fused must be one. None: not known yet."""
    known = (0.0 if start is None else start, 1.0 if end is None else end)
    if not all(0 <= value <= 1 for value in known):
        raise ValueError(f"start is {known[0]:g} and end is {known[1]:g}: both must be from 0 to 1.")
    if start is not None and end is not None and start >= end:
        raise ValueError(
            f"start is {start:g} and end is {end:g}: start must come before end "
            "(0 to 1 for the whole sampling)."
        )
    return True


def fuse(
    fuser: Fuser,
    conditioning: list[Any],
    tokens: LlmTokens,
    preset: str,
    strength: float,
    window: tuple[float, float],
) -> tuple[list[Any], str]:
    """The fused CONDITIONING, active inside `window` with T5 alone outside, and what was done in words.

    ValueError where the condition is fused already: its appended tokens would be taken for T5's.
    """
    require_range(*window)
    require_unfused(conditioning)
    made = {"llm": _made_llm(tokens), "fuser": _made_fuser(fuser, preset, strength, window)}
    if strength == 0 or not fuser.trained or fuser.module is None or fuser.patcher is None:
        passed = [[entry[0], fused_options(entry, entry[0], **made)] for entry in conditioning]
        return passed, IDENTITY_NOTE if strength else STRENGTH_0_NOTE
    module = with_preset(fuser, preset)
    management.load_models_gpu([fuser.patcher])
    parts = module.config.llm_tokens
    added = tokens.sequence(parts), tokens.instruction, tokens.weights(parts)
    fused: list[Any] = []
    read = added[0].shape[1] if module.config.use_llm else 0
    for entry in conditioning:
        joined = _run(module, fuser.patcher.load_device, entry[0], *added, strength)
        joined, masked = _with_mask(joined, entry, read)
        fused += _in_window([joined, fused_options(masked, joined, **made)], entry, window)
    lengths = conditioning[0][0].shape[1], fused[0][0].shape[1]
    words = _report(module.config, tokens, lengths, preset) + _strange(fuser, conditioning[0], tokens)
    return fused, f"{words} {idle_gain(tokens, module.config, lengths[0])}".rstrip()


def with_preset(fuser: Fuser, preset: str) -> TokenFuser:
    """The fuser's network used as another row of the ablation. ValueError where its weights lack a part."""
    if preset not in PRESETS:
        raise ValueError(f"preset is '{preset}', expected one of {', '.join(PRESETS)}")
    module = fuser.module
    if module is None:
        raise RuntimeError(f"{fuser.name} has no network to set a preset on")
    if preset == AS_TRAINED:
        return module
    switches = {name: getattr(FUSER_PRESETS[preset], name) for name in SWITCHES}
    try:
        return module.variant(replace(module.config, **switches))
    except ValueError as error:
        raise ValueError(f"The preset '{preset}' does not fit {fuser.name}: {error}") from error


def _run(
    module: TokenFuser,
    device: torch.device,
    text: Tensor,
    llm: Tensor,
    instruction: Tensor,
    gain: Tensor | None,
    strength: float,
) -> Tensor:
    """Computed in float32 on `device`, returned where the host keeps such things."""
    text, llm, instruction = (tensor.to(device, torch.float32) for tensor in (text, llm, instruction))
    gain = None if gain is None else gain.to(device, torch.float32)
    return module(text, llm, instruction, gain, strength).to(management.intermediate_device())


def _with_mask(fused: Tensor, entry: list[Any], read: int) -> tuple[Tensor, list[Any]]:
    """The fused tokens, and `entry` with its attention mask, if it has one, for them.

    The mask now reads what was added as well: at the first `read` tokens, and all that were appended. Tokens
    that it reads are put first, since some models (Mochi) only count them.
    """
    text, options = entry[0], entry[1]
    if options.get(MASK) is None:
        return fused, entry
    live = options[MASK].to(fused.device)[:, : text.shape[1]] != 0  # (1 or B, n)
    live = F.pad(live, (0, fused.shape[1] - live.shape[1]), value=True)
    live[:, : min(read, text.shape[1])] = True
    order = (~live).byte().argsort(dim=1, stable=True)
    places = order[..., None].expand(fused.shape[0], -1, fused.shape[2])
    mask = live.gather(1, order).to(options[MASK].dtype)
    return fused.gather(1, places), [text, {**options, MASK: mask}]


def _made_llm(tokens: LlmTokens) -> dict[str, Any]:
    return {
        **(tokens.made or NO_ORIGIN),
        "prompt": tokens.prompt,
        "instructions": "\n".join(tokens.instructions),
        "answer": tokens.answer_text,
        "layer": tokens.layer,
    }


def _made_fuser(fuser: Fuser, preset: str, strength: float, window: tuple[float, float]) -> dict[str, Any]:
    origin = fuser.origin or {
        "file": fuser.name,
        "fingerprint": "none" if fuser.module is None else UNKNOWN,
    }
    made = {**origin, "preset": preset, "strength": strength, "start": window[0], "end": window[1]}
    base = fuser.training.get("base")
    return {**made, "base": dict(base)} if isinstance(base, Mapping) else made


def _in_window(fused: list[Any], alone: list[Any], window: tuple[float, float]) -> list[Any]:
    """CONDITIONING entries: fused inside the window, T5 alone in what is left of the entry's own range."""
    options = alone[1]
    first, last = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
    start, end = max(first, window[0]), min(last, window[1])
    if start >= end:
        return [alone]
    if (start, end) == (first, last):
        return [fused]
    parts = [(fused, start, end), (alone, first, start), (alone, end, last)]
    return [[part[0], {**part[1], "start_percent": a, "end_percent": b}] for part, a, b in parts if a < b]


def _report(config: FuserConfig, tokens: LlmTokens, lengths: tuple[int, int], preset: str) -> str:
    """`lengths` of the condition before and after."""
    used = _used(config, tokens, lengths[0])
    found = f"Fused as '{preset}': {used}; the condition has {lengths[1]}."
    if tokens.layer == config.llm_layer or not (config.use_llm or config.stabilizer):
        return found
    return (
        f"{found} Careful: it was trained on layer {config.llm_layer}, these tokens are layer {tokens.layer}."
    )


def _strange(fuser: Fuser, entry: list[Any], tokens: LlmTokens) -> str:
    """A warning when encoders are known not to be those the fuser was trained with."""
    record = current(entry[1], entry[0]) or {}
    found = unlike_training(fuser.training, {"t5": record.get("t5"), "phi": tokens.made})
    if not found:
        return ""
    return f" Careful: {'; '.join(found)} (the same model in another precision is no harm)."


def _used(config: FuserConfig, tokens: LlmTokens, room: int) -> str:
    """Which of the language model's tokens are in the condition: as many as its `room` tokens can take."""
    counts: list[str] = []
    for part in config.llm_tokens.split("+") if config.use_llm else ():
        count = min(getattr(tokens, part).shape[1], room)
        room -= count
        counts.append(f"{count} {'prompt' if part == 'query' else part}")
    if counts:
        return f"{' and '.join(counts)} tokens"
    if config.stabilizer:
        return f"{config.num_instructions} instruction tokens and nothing else of the language model"
    return "no language model tokens are used"
