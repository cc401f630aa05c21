"""A saved condition: positive and negative in one safetensors file with a header that people can read.

A condition is a list of entries (tokens (B, n, D), options), as samplers take it. Every tensor lies in the
file under the name of its place ("positive.0.tokens", "positive.0.pooled_output"); all else is JSON in the
header, also what is known about how the tokens were made.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .headers import Checkpoint, Wanted, read_header, refusal
from .provenance import RECORD, Entry, checksum, current, describe
from .recognise import recognise

FORMAT = 1
KIND = "mimir-conditioning"
MARK = "mimir_conditioning"  # the header's key, and the tensor by which any loader recognises the file
SIDES = ("positive", "negative")
EXACT, HALF = "exact", "bfloat16"
PRECISIONS = (EXACT, HALF)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64)}
WANTED = Wanted("a saved condition", "choose a file that Save Conditioning (Mimir) has written")
OBJECTS = {
    "control": "a ControlNet",
    "gligen": "GLIGEN",
    "hooks": "hooks (such as a scheduled LoRA)",
    "additional_models": "a model",
}

Condition = list[list[Any]]
# What a damaged header leads to; RuntimeError also stands for too deep a nesting.
WRONG = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError)
SHARES = ("start_percent", "end_percent")  # options that are a share of the sampling
NUMBERS = ("strength", "mask_strength", *SHARES)
TENSORS = ("pooled_output", "attention_mask")  # options that are a tensor, or None
ORIGINS = ("t5", "llm", "fuser")  # parts of a record that are dictionaries
NO_TOKENS = "no tokens: a sampler for CogVideoX cannot use it"


@dataclass(frozen=True)
class Saved:
    """What a file holds. negative: None when only a positive condition was saved."""

    path: Path
    positive: Condition
    negative: Condition | None
    precision: str
    pack: str

    def text(self) -> str:
        """The readable header."""
        lines = [f"{self.path.name}, saved by version {self.pack}, {self.precision}"]
        for side, condition in zip(SIDES, (self.positive, self.negative), strict=True):
            for index, (tokens, options) in enumerate(condition or ()):
                part = f" {index + 1}" if len(condition or ()) > 1 else ""
                lines += ["", f"{side}{part}{_range(options)}"]
                lines += [f"  {line}" for line in describe(current(options, tokens))]
                lines += [f"  {NO_TOKENS}"] if tokens is None else []
        text = "\n".join(lines if self.negative is not None else [*lines, "", "negative: none"])
        return text.encode(errors="replace").decode()  # characters that no page can show


def save_conditions(
    path: str | Path,
    positive: Sequence[Entry],
    negative: Sequence[Entry] | None = None,
    precision: str = EXACT,
    pack: str = "",
) -> None:
    """Write both conditions to `path`; the order of entries and every option that is data survive.

    precision: "exact", or "bfloat16" for tokens at half the size of float32. pack: the version that saves.
    ValueError for NaN, and for options that hold objects (a ControlNet, hooks), which no file can hold.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"dtype is '{precision}', expected one of {', '.join(PRECISIONS)}")
    tensors = {MARK: torch.tensor([FORMAT])}
    header: dict[str, Any] = {"format": FORMAT, "pack": pack, "precision": precision}
    for side, condition in zip(SIDES, (positive, negative), strict=True):
        entries = None if condition is None else list(condition)
        header[side] = entries and [
            _packed(entry, f"{side}.{index}", precision, tensors) for index, entry in enumerate(entries)
        ]
    if not header["positive"]:
        raise ValueError("The positive condition is empty: connect Token Fuser or T5 Encode.")
    partial = Path(path).with_suffix(".partial")
    try:
        save_file(tensors, str(partial), {"format": "pt", MARK: _json(header)})
        os.replace(partial, path)  # nobody ever sees half a file
    finally:
        partial.unlink(missing_ok=True)


def load_conditions(path: str | Path) -> Saved:
    """Read a file of `save_conditions`. ValueError, in one sentence, for anything else, and for damage."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist, but {WANTED.name} is needed here: {WANTED.remedy}.")
    infos, metadata = read_header(path, WANTED)
    kind, _ = recognise(Checkpoint(path, path.parent, infos, metadata, None))
    if kind.kind != KIND:
        raise refusal(path, kind.name, WANTED)
    try:
        header = json.loads(metadata[MARK])
        version = int(header["format"])
        if version < 1:
            raise ValueError(f"there is no file format {version}")
    except WRONG as error:
        raise _damaged(path) from error
    if version > FORMAT:
        raise ValueError(
            f"{path.name} was saved by a newer version of this pack (file format {version}, this one reads "
            f"up to {FORMAT}): update ComfyUI-Mimir."
        )
    try:
        tensors = {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
        saved = _saved(path, header, tensors)
        saved.text()  # so that nothing in it can fail later
    except WRONG as error:
        raise _damaged(path) from error
    return saved


def zeros_like(positive: Condition) -> Condition:
    """The negative of a file that has none: tokens of zeros, the empty prompt that CogVideoX trained on."""
    tokens, options = positive[0]
    kept = {key: options[key] for key in ("pooled_output", "attention_mask") if key in options}
    if isinstance(kept.get("pooled_output"), Tensor):
        kept["pooled_output"] = torch.zeros_like(kept["pooled_output"])
    return [[None if tokens is None else torch.zeros_like(tokens), kept]]


def _saved(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Saved:
    """What a header says, with the tensors that it names. ValueError when it is not as it was written."""
    sides: list[Condition | None] = []
    for side in SIDES:
        entries = header[side]
        if entries is not None and not isinstance(entries, list):
            raise ValueError(f"{side} is no list")
        sides.append([_unpacked(entry, tensors) for entry in entries] if entries else None)
    positive, negative = sides
    if positive is None or header["precision"] not in PRECISIONS or not isinstance(header["pack"], str):
        raise ValueError("the file's own settings are not as they were written")
    named = {name for side in SIDES for name in _named(header[side])}
    if not named >= set(tensors) - {MARK}:  # tokens that were taken out of the header
        raise ValueError("there are tensors that the header does not name")
    return Saved(path, positive, negative, header["precision"], header["pack"])


def _named(value: Any) -> Iterator[str]:
    """Names of the tensors that a part of the header asks for."""
    if isinstance(value, Mapping):
        if isinstance(value.get("tensor"), str):
            yield value["tensor"]
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from _named(item)


def _packed(entry: Entry, where: str, precision: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """One entry as JSON; its tensors are added to `tensors`."""
    tokens, options = entry[0], dict(entry[1])
    record = current(options, tokens)
    options.pop(RECORD, None)
    stored, kept = None, tokens
    if tokens is not None:
        if not _are_tokens(tokens):
            raise ValueError(
                f"{_place(where)} has no tokens of the kind (batch, tokens, width), so it is not saved. "
                "Connect Token Fuser or T5 Encode."
            )
        _require_numbers(tokens, where)
        half = precision == HALF and str(tokens.dtype).removeprefix("torch.") in DTYPES
        stored = _tensor(tokens.to(torch.bfloat16) if half else tokens, f"{where}.tokens", tensors)
        if half:
            stored["dtype"] = str(tokens.dtype).removeprefix("torch.")
            kept = tokens.to(torch.bfloat16).to(tokens.dtype)
            record = record and {**record, "rounded": HALF}
    encoded = {key: _encoded(value, f"{where}.{key}", tensors) for key, value in options.items()}
    wrong = _wrong_option(options)
    if wrong:
        raise ValueError(f"{_place(where)} has {wrong}, so it is not saved. Leave out the node that set it.")
    return {
        "tokens": stored,
        "checksum": None if kept is None else checksum(kept),
        "options": encoded,
        "made": record,
    }


def _unpacked(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Any]:
    """The entry again. ValueError when it is not what was saved."""
    stored, tokens = entry["tokens"], None
    if stored is None and entry["checksum"] is not None:
        raise ValueError("the tokens are missing")
    if stored is not None:
        tokens = tensors[stored["tensor"]]
        tokens = tokens.to(DTYPES[stored["dtype"]]) if "dtype" in stored else tokens
        if checksum(tokens) != entry["checksum"]:
            raise ValueError("the tokens are not those that were saved")
        if not _are_tokens(tokens):
            raise ValueError("the tokens are no tokens")
        _require_numbers(tokens, "positive.0.tokens")
    options = {key: _decoded(value, tensors) for key, value in entry["options"].items()}
    wrong = f"a record in {RECORD}" if RECORD in options else _wrong_option(options)
    if wrong:
        raise ValueError(f"the options have {wrong}")
    if entry["made"] is not None:
        options[RECORD] = {**_record(entry["made"]), "checksum": entry["checksum"]}
    return [tokens, options]


def _are_tokens(tokens: Tensor) -> bool:
    return tokens.ndim == 3 and tokens.is_floating_point()


def _wrong_option(options: Mapping[str, Any]) -> str:
    """What is wrong with the options that samplers read; empty for nothing."""
    for name in NUMBERS:
        value = options.get(name, 0.0)
        low, high = (0, 1) if name in SHARES else (-1e30, 1e30)
        if isinstance(value, bool) or not isinstance(value, Real) or not _between(low, value, high):
            return f"{value!r:.40} as '{name}'"
    other = [name for name in TENSORS if not isinstance(options.get(name), (Tensor, type(None)))]
    return f"no tensor as '{other[0]}'" if other else ""


def _between(low: float, value: Any, high: float) -> bool:
    return bool(low <= value <= high)


def _record(made: Mapping[str, Any]) -> Mapping[str, Any]:
    """`made`. ValueError unless it is what `provenance` writes: plain values, and dictionaries of them."""
    if any(not isinstance(made.get(part, {}), Mapping) for part in ORIGINS) or not _plain(made):
        raise ValueError("the record is not as it was written")
    return made


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, (str, int, float))


def _encoded(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value. Lists stay lists; tuples, dictionaries and tensors become {their kind: content}."""
    if isinstance(value, Tensor):
        _require_no_nan(value, where)
        return _tensor(value, where, tensors)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encoded(item, f"{where}.{key}", tensors) for key, item in value.items()}}
    raise _not_data(value, where)


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decoded(item, tensors) for item in content)
    if kind == "dict":
        return {key: _decoded(item, tensors) for key, item in content.items()}
    raise ValueError(f"unknown kind of value '{kind}'")


def _tensor(tensor: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    while name in tensors:  # an option's own name may look like the place of another
        name += "_"
    tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return {"tensor": name}


def _require_numbers(tokens: Tensor, where: str) -> None:
    bad = 1 - torch.isfinite(tokens).float().mean().item() if _checkable(tokens) else 0.0
    if bad > 0:
        raise ValueError(
            f"{_place(where)} has NaN or infinity in {bad:.0%} of its tokens, so it is not saved. Encode the "
            "prompt again, with other weights or another dtype if it stays so."
        )


def _require_no_nan(tensor: Tensor, where: str) -> None:
    """Masks may be infinite."""
    if _checkable(tensor) and bool(torch.isnan(tensor).any()):
        raise ValueError(f"{_place(where)} has NaN in '{_option(where)}', so it is not saved.")


def _checkable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0


def _not_data(value: Any, where: str) -> ValueError:
    option = _option(where)
    what = OBJECTS.get(option.partition(".")[0], f"{value!r:.40}" if isinstance(value, Real) else "an object")
    return ValueError(
        f"{_place(where)} holds '{option}' ({what}, {type(value).__name__}), which cannot be stored in a "
        "file. Save the condition before the node that adds it, and add it again after loading."
    )


def _place(where: str) -> str:
    """ "positive.0.control" -> "The positive condition, part 1"."""
    side, index, *_ = where.split(".")
    return f"The {side} condition, part {int(index) + 1},"


def _option(where: str) -> str:
    return where.split(".", 2)[2]


def _range(options: Mapping[str, Any]) -> str:
    """The part of the sampling in which an entry holds, where it is not the whole."""
    start, end = options.get("start_percent", 0.0), options.get("end_percent", 1.0)
    return "" if (start, end) == (0.0, 1.0) else f" (from {start:g} to {end:g} of the sampling)"


def _json(value: Any) -> str:
    """Readable JSON; escaped where a text has characters that no file can hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if _encodable(text) else json.dumps(value, allow_nan=False)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path.name} is a saved condition, but a damaged one: copy or download it again.")
