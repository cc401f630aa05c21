"""LoRA files for a CogVideoX transformer: what fits which module of ours, and how strong it is.

Read are LoRA, LoHa and LoKr, full differences and trained biases, under every name in `lora_names`. Their
strength is alpha / rank; alpha comes from the file's tensors, from its header, or from PEFT's
adapter_config.json beside it. Sources: arXiv 2106.09685 (LoRA), 2309.14859 (LoHa, LoKr), 2312.03732 (rsLoRA).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .headers import Checkpoint, Wanted, open_checkpoint, refusal
from .lora_names import (
    ALPHA,
    DIFF,
    DIFF_BIAS,
    DOWN,
    UNSUPPORTED,
    UP,
    UP_BIAS,
    WHOLE,
    Modules,
    Shape,
    foreign_model,
    fused,
    of_text_encoder,
    parts_of,
    split,
)
from .recognise import recognise

LORA = Wanted(
    "a LoRA for CogVideoX", "choose one that was trained on the CogVideoX model that it is connected to"
)
PLAIN = Wanted(
    "a plain LoRA, LoHa or LoKr",
    "merge it into its transformer with the tool that trained it and load the result with Load Mimir DiT",
)
PEFT_SETTINGS = "adapter_config.json"
WIDTHS = {1920: "CogVideoX-2B", 3072: "CogVideoX-5B or 1.5"}
NO_EFFECT = "; alpha is 0, so it has no effect"
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
# The changes that a file can make to a module: name -> its parts.
_CHANGES = {
    "lora": (UP, DOWN),
    "loha": _LOHA,
    "lokr": _LOKR,
    "diff": (DIFF,),
    "up bias": (UP_BIAS,),
    "diff bias": (DIFF_BIAS,),
}


class Unfit(ValueError):
    """A LoRA for a CogVideoX of another size: `found` says of which, "a LoRA for a transformer of ..."."""

    def __init__(self, path: Path, found: str, here: str) -> None:
        super().__init__(str(refusal(path, f"{found}, and this one has {here}", LORA)))
        self.found = found


class Left(NamedTuple):
    """Something of the file that is not applied."""

    name: str  # as in the file
    reason: str  # fits behind a count: "3 not in this model"


@dataclass(frozen=True)
class Adapter:
    """What one module of ours gets, its parts named as kohya and LyCORIS do."""

    tensors: dict[
        str, Tensor
    ]  # lora_up.weight (out, r), lora_down.weight (r, in), diff, diff_b, hada_*, lokr_*
    alpha: float | None  # over the rank, the strength; None is a strength of 1


@dataclass(frozen=True)
class Match:
    """A LoRA file beside the model that it is for."""

    checkpoint: Checkpoint
    places: dict[str, dict[str, str]]  # module of ours, or `...attn1.to_qkv` -> {part: name in the file}
    alphas: dict[str, float]
    total: int  # modules in the file
    left: tuple[Left, ...]
    note: str  # on where alpha was looked for, or empty

    def load(self) -> dict[str, Adapter]:
        """{module of ours: what it gets}, tensors in the dtype on disk, on the CPU.

        ValueError when one of them holds NaN or infinity, which would make the whole video so.
        """
        wanted = {(module, part): key for module, parts in self.places.items() for part, key in parts.items()}
        state = self.checkpoint.load({key: key for key in wanted.values()})
        self._require_finite(state)
        loaded: dict[str, Adapter] = {}
        for module, parts in self.places.items():
            tensors = {part: state[key] for part, key in parts.items() if part != ALPHA}
            adapter = _with_bias(Adapter(tensors, self.alphas.get(module)))
            loaded.update(_unfused(module, adapter))
        return loaded

    def _require_finite(self, state: Mapping[str, Tensor]) -> None:
        broken = [key for key, tensor in state.items() if not bool(tensor.float().isfinite().all())]
        broken = broken or [f"alpha of {name}" for name, alpha in self.alphas.items() if not isfinite(alpha)]
        if broken:
            others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            raise ValueError(
                f"{self.checkpoint.path.name} is a LoRA with NaN or infinity in {broken[0]}{others}: the "
                "file is damaged or its training failed; download it again or choose another."
            )

    @property
    def idle(self) -> bool:
        """Whether alpha is 0 in every module, and nothing but a scaled change is in the file."""
        changes = {part for parts in self.places.values() for part in parts} & {DIFF, DIFF_BIAS}
        return not changes and all(self.alphas.get(module) == 0 for module in self.places)

    @property
    def summary(self) -> str:
        """One line: how many modules were matched, how strong they are, and what was not matched."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left:
            reasons.setdefault(reason, []).append(name)
        left = "; ".join(f"{len(names)} {reason} ({_some(names)})" for reason, names in reasons.items())
        return (
            f"matched {len(self.places)} of {_modules(self.total)} ({self._strength()}); "
            f"unmatched: {left or 'none'}{self.note}{NO_EFFECT if self.idle else ''}"
        )

    @property
    def report(self) -> str:
        """The summary, and below it every name that was not matched, with its reason."""
        return "\n".join([self.summary, *(f"{name}: {reason}" for name, reason in self.left)])

    def _strength(self) -> str:
        ranks = {
            module: self.checkpoint.tensors[parts[DOWN]].shape[0]
            for module, parts in self.places.items()
            if DOWN in parts
        }
        words = [f"rank {_span(ranks.values())}"] if ranks else []
        words.append(f"alpha {_span(self.alphas.values())}" if self.alphas else "no alpha, so scale 1")
        scales = {self.alphas[module] / rank for module, rank in ranks.items() if module in self.alphas}
        return ", ".join(words + ([f"scale {_span(scales)}"] if scales - {1.0} else []))


def without_effect(adapters: Mapping[str, Adapter]) -> bool:
    """Whether these adapters change nothing: alpha is 0, or all that they would add is zeros."""
    return not any(map(_has_effect, adapters.values()))


def _has_effect(adapter: Adapter) -> bool:
    tensors = adapter.tensors
    if any(bool(tensors[part].any()) for part in (DIFF, DIFF_BIAS) if part in tensors):
        return True
    factors = [part for part in tensors if part not in (DIFF, DIFF_BIAS)]
    return adapter.alpha != 0 and bool(factors) and all(bool(tensors[part].float().any()) for part in factors)


def match_lora(path: str | Path, parameters: Mapping[str, Shape]) -> Match:
    """Read the header of a LoRA file for a model whose `parameters` are {diffusers' name: shape}.

    ValueError, in one sentence, when it is another model's LoRA (Flux and Mochi ones partly fit by shape),
    fits nothing, was made for another width, or is of a kind that cannot be applied exactly.
    """
    checkpoint, modules = open_checkpoint(path, LORA), Modules(parameters)
    found = _found(checkpoint)
    homes = {stem: modules.resolve(stem) for stem in found if not of_text_encoder(stem)}
    _refuse_foreign(checkpoint, homes, modules)
    _refuse_kinds(checkpoint, found)
    text = [Left(stem, "of a text encoder, which stays as it is") for stem in found if stem not in homes]
    left: list[Left] = []
    places: dict[str, dict[str, str]] = {}
    for stem, module in homes.items():
        if module is None:
            left.append(Left(stem, "not in this model"))
            continue
        fitting, wrong = _fitting(checkpoint, found[stem], modules, module, stem)
        left.extend(wrong)
        if fitting:
            _refuse_twice(checkpoint, module, places)
            places[module] = fitting
    if not places:
        raise _nothing(checkpoint, len(found), text, left)
    alphas = _alphas(checkpoint, places)
    note = "" if alphas else _note(checkpoint)
    return Match(checkpoint, places, alphas, len(found), (*left, *text), note)


def _found(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """{module's name in the file: {part: tensor's name there}}. ValueError when this is no LoRA at all."""
    found: dict[str, dict[str, str]] = {}
    for key in checkpoint.tensors:
        stem, part = split(key)
        if part in found.setdefault(stem, {}):
            raise refusal(checkpoint.path, f"a file with two LoRAs for {stem}", LORA)
        found[stem][part] = key
    if all(part.startswith(WHOLE) for parts in found.values() for part in parts):
        raise refusal(checkpoint.path, recognise(checkpoint)[0].name, LORA)
    return found


def _refuse_foreign(checkpoint: Checkpoint, homes: Mapping[str, str | None], modules: Modules) -> None:
    """ValueError for the LoRA of another model, even where some of its modules have a namesake here."""
    strangers = [stem for stem, module in homes.items() if module is None]
    model = foreign_model(strangers)
    if model is not None:
        words = f"a LoRA for {model}: CogVideoX lacks {len(strangers)} of its {_modules(len(homes))}"
        raise refusal(checkpoint.path, words, LORA)
    blocks = [block for stem in strangers if (block := modules.beyond(stem)) is not None]
    if blocks:
        found = f"a LoRA for a transformer of {max(blocks) + 1} blocks"
        raise Unfit(checkpoint.path, found, str(modules.depth))


def _refuse_kinds(checkpoint: Checkpoint, found: Mapping[str, Mapping[str, str]]) -> None:
    for kind in UNSUPPORTED:
        count = sum(kind in parts for parts in found.values())
        if count:
            words = f"{kind} for {_modules(count)}, which cannot be applied exactly"
            raise refusal(checkpoint.path, words, PLAIN)


def _refuse_twice(checkpoint: Checkpoint, module: str, places: Mapping[str, Any]) -> None:
    taken = {part for place in places for part in parts_of(place)}
    if taken & set(parts_of(module)):
        raise refusal(checkpoint.path, f"a file with two LoRAs for {module}", LORA)


def _fitting(
    checkpoint: Checkpoint, parts: Mapping[str, str], modules: Modules, module: str, stem: str
) -> tuple[dict[str, str], list[Left]]:
    """The parts that this module can take, and the others. ValueError when the whole network is wider."""
    shapes = {part: checkpoint.tensors[key].shape for part, key in parts.items()}
    left = [Left(parts[part], "replaced whole, not by a LoRA") for part in parts if part.startswith(WHOLE)]
    taken: set[str] = set()
    for change, found in _changes(shapes).items():
        wanted = modules.shape(module, "bias" if "bias" in change else "weight")
        if found is None or (change == "up bias" and UP not in taken):
            left.append(Left(stem, "incomplete, since one of its tensors is missing"))
        elif fused(module) and change in ("loha", "lokr"):
            left.append(Left(stem, f"a {change} over q, k and v at once, which cannot be taken apart"))
        elif wanted is not None and _same(found, wanted, exact=change == "diff"):
            taken.update(_CHANGES[change])
        else:
            _refuse_width(checkpoint, module, found, modules.width)
            left.append(Left(stem, _mismatch(module, found, wanted)))
    if not taken:
        return {}, left
    return {part: key for part, key in parts.items() if part in taken or part == ALPHA}, left


def _changes(shapes: Mapping[str, Shape]) -> dict[str, Shape | None]:
    """{change that is there: shape of what it adds}; None where a half is missing or both do not fit."""
    makers = {"lora": _lora_shape, "loha": _loha_shape, "lokr": _lokr_shape}
    found: dict[str, Shape | None] = {}
    for change, parts in _CHANGES.items():
        there = [part for part in parts if part in shapes]
        if there:
            found[change] = makers[change](shapes) if change in makers else shapes[there[0]]
    return found


def _lora_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """(out, in); a convolution's kernel counts as inputs."""
    up, down = shapes.get(UP), shapes.get(DOWN)
    if up is None or down is None or prod(up[1:]) != down[0]:
        return None
    return up[0], prod(down[1:])


def _loha_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    if any(part not in shapes for part in _LOHA):
        return None
    first = shapes["hada_w1_a"][0], prod(shapes["hada_w1_b"][1:])
    second = shapes["hada_w2_a"][0], prod(shapes["hada_w2_b"][1:])
    return first if first == second else None


def _lokr_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    factors: list[Shape] = []
    for name in ("lokr_w1", "lokr_w2"):
        whole, a, b = (shapes.get(part) for part in (name, f"{name}_a", f"{name}_b"))
        if whole is not None:
            factors.append((whole[0], prod(whole[1:])))
        elif a is not None and b is not None:
            factors.append((a[0], prod(b[1:])))
        else:
            return None
    return factors[0][0] * factors[1][0], factors[0][1] * factors[1][1]


def _same(found: Shape, wanted: Shape, exact: bool) -> bool:
    return found == wanted if exact else (found[0], prod(found[1:])) == (wanted[0], prod(wanted[1:]))


def _refuse_width(checkpoint: Checkpoint, module: str, found: Shape, ours: int) -> None:
    """ValueError when a block's module shows that the LoRA was made for another width."""
    if not module.startswith("transformer_blocks.") or module.endswith((".norm_q", ".norm_k")):
        return
    rows = {".linear": 6, ".proj": 4, "_qkv": 3}
    theirs = found[0] // next((count for end, count in rows.items() if module.endswith(end)), 1)
    if theirs != ours:
        raise Unfit(checkpoint.path, f"a LoRA for a transformer of width {_wide(theirs)}", _wide(ours))


def _wide(width: int) -> str:
    return f"{width} ({WIDTHS[width]})" if width in WIDTHS else str(width)


def _mismatch(module: str, found: Shape, wanted: Shape | None) -> str:
    if wanted is None:
        return "for a weight or bias that this model does not have"
    there, here = ("x".join(map(str, (shape[0], prod(shape[1:])))) for shape in (found, wanted))
    if module == "patch_embed.proj":
        return f"for the patches of another CogVideoX, image-to-video or 1.5 ({there}, here {here})"
    return f"of another shape ({there}, here {here})"


def _nothing(checkpoint: Checkpoint, total: int, text: list[Left], left: list[Left]) -> ValueError:
    if not left:
        return refusal(checkpoint.path, f"a LoRA for {_modules(len(text))} of a text encoder", LORA)
    words = (
        f"a LoRA for {_modules(total)}, none of which fits (the first, {left[0].name}, is {left[0].reason})"
    )
    return refusal(checkpoint.path, words, LORA)


def _alphas(checkpoint: Checkpoint, places: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """{module: alpha} of the modules that have one: a tensor, or what the header or PEFT's file says."""
    tensors = checkpoint.load({parts[ALPHA]: module for module, parts in places.items() if ALPHA in parts})
    known = {module: float(tensor.float().item()) for module, tensor in tensors.items()}
    settings = _settings(checkpoint)
    for module, parts in places.items():
        if module in known or DOWN not in parts or settings.get("lora_alpha") is None:
            continue
        rank = checkpoint.tensors[parts[DOWN]].shape[0]
        try:
            alpha = float(_patterned(settings.get("alpha_pattern") or {}, module, settings["lora_alpha"]))
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise _unreadable(checkpoint, error) from error
        known[module] = alpha * (sqrt(rank) if settings.get("use_rslora") else 1.0)
    return known


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """PEFT's settings: from diffusers' or finetrainers' header, else adapter_config.json beside the file."""
    every = _decoded(checkpoint.metadata.get("lora_adapter_metadata"), checkpoint)
    start = "transformer."
    values = {name[len(start) :]: value for name, value in every.items() if name.startswith(start)} or every
    values = values or _decoded(checkpoint.metadata.get("lora_config"), checkpoint)
    beside = checkpoint.folder / PEFT_SETTINGS
    if not values and beside.is_file() and _belongs(checkpoint):
        values = _decoded(beside.read_text(encoding="utf-8"), checkpoint)
    kind = str(values.get("peft_type") or "LORA")
    if kind != "LORA":
        raise refusal(checkpoint.path, f"PEFT's {kind}, which cannot be applied exactly", PLAIN)
    return values


def _belongs(checkpoint: Checkpoint) -> bool:
    """Whether adapter_config.json is this file's: the file has PEFT's name, or is alone in its folder."""
    alone = len(list(checkpoint.folder.glob("*.safetensors"))) <= 1
    return alone or checkpoint.path.stem == "adapter_model"


def _note(checkpoint: Checkpoint) -> str:
    """What to say when no alpha was found, though PEFT wrote one."""
    if (checkpoint.folder / PEFT_SETTINGS).is_file():
        return f"; {PEFT_SETTINGS} was not used, since several files share its folder"
    if any(name.startswith("base_model.model.") for name in checkpoint.tensors):
        return f"; PEFT's {PEFT_SETTINGS}, which has its alpha, is not beside it"
    return ""


def _decoded(text: str | None, checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        return dict(json.loads(text)) if text else {}
    except (ValueError, TypeError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Checkpoint, error: Exception) -> ValueError:
    return ValueError(
        f"The LoRA settings of {checkpoint.path.name} cannot be read ({error}): download it again."
    )


def _patterned(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of a module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            return value
    return default


def _with_bias(adapter: Adapter) -> Adapter:
    """A bias that was trained beside lora_B becomes the difference that it makes."""
    tensors = dict(adapter.tensors)
    bias = tensors.pop(UP_BIAS, None)
    if bias is not None:
        scale = 1.0 if adapter.alpha is None else adapter.alpha / tensors[DOWN].shape[0]
        tensors[DIFF_BIAS] = tensors.get(DIFF_BIAS, 0) + bias.float() * scale
    return Adapter(tensors, adapter.alpha)


def _unfused(module: str, adapter: Adapter) -> Iterator[tuple[str, Adapter]]:
    """q, k and v apart: each has a third of the rows, and the same lora_down."""
    parts = parts_of(module)
    for index, name in enumerate(parts):
        tensors = {
            part: tensor if part == DOWN else tensor.chunk(len(parts))[index]
            for part, tensor in adapter.tensors.items()
        }
        yield name, Adapter(tensors if fused(module) else adapter.tensors, adapter.alpha)


def _modules(count: int) -> str:
    return f"{count} module" if count == 1 else f"{count} modules"


def _span(values: Iterable[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
