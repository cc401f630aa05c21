"""What is known about how a condition was made: a JSON-ready record that travels with its tokens.

A record holds plain values and dictionaries of them, never a list: core's training node walks through every
option of a condition and does not come back from a list of strings. So instructions are one text, in lines.

    {"prompt", "text_length", "cut_tokens", "cut_text", "pieces": JSON of [text, kind] (text.Piece),
     "t5": origin, "llm": origin and settings, "fuser": origin and settings, "gains", "dtype", "pack",
     "checksum"}

An origin is {"file", "fingerprint"} (mimir_core.headers.fingerprint), UNKNOWN for both where nobody knows;
"dtype" is what the weights were kept in, "computed" what with; "changed" says in words that a LoRA or another
setting alters them. `checksum` is of the tokens that the record was written for: other nodes copy records
along with changed tokens, and `current` notices.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

RECORD = "mimir"  # the key of a record among a condition's options
UNKNOWN = "unknown"
NO_ORIGIN = {"file": UNKNOWN, "fingerprint": UNKNOWN}
QUOTED = 200  # characters of a text that a report shows
FUSED = (
    "This condition has been through Token Fuser already. Connect that of T5 Encode, from before Token Fuser."
)
SHORT = 12  # characters of a fingerprint that a report shows

Record = dict[str, Any]
Entry = Sequence[Any]  # (tokens (B, n, D) or None, options)

ORIGINS = {"t5": "T5", "llm": "Phi-3.5", "fuser": "fuser"}
FIELDS = {
    "prompt": "prompt",
    "text_length": "text length",
    "llm.prompt": "prompt for Phi-3.5",
    "llm.answer": "answer",
    "llm.answer_length": "answer length",
    "llm.temperature": "temperature",
    "llm.seed": "seed",
    "llm.layer": "layer",
    "fuser.preset": "preset",
    "fuser.strength": "strength",
    "fuser.start": "start",
    "fuser.end": "end",
    "gains": "gain on T5's tokens",
    "llm.gains": "gain on Phi-3.5's tokens",
    "changed": "changed by other nodes",
    "dtype": "dtype of the tokens",
    "pack": "version of this pack",
}


def text_record(
    prompt: str,
    t5: Mapping[str, Any] | None,
    length: int,
    cut_tokens: int = 0,
    cut_text: str = "",
    pieces: Sequence[tuple[str, str]] = (),
) -> Record:
    """What T5 has read, and what it had to cut; `pieces` are (text, kind) of its tokens."""
    return {
        "prompt": prompt,
        "text_length": length,
        "cut_tokens": cut_tokens,
        "cut_text": cut_text,
        "pieces": json.dumps(pieces) if pieces else "",
        "t5": dict(t5 or NO_ORIGIN),
    }


def fused_record(text: Mapping[str, Any] | None, llm: Mapping[str, Any], fuser: Mapping[str, Any]) -> Record:
    """The record of fused tokens: T5's `text` record (None when another node made the condition) and more."""
    return {**(text or text_record(UNKNOWN, None, 0)), "llm": dict(llm), "fuser": dict(fuser)}


def require_unfused(condition: Sequence[Entry]) -> None:
    """ValueError when a part of the condition is fused: what follows is meant for T5's own tokens."""
    for _, options in condition:
        record = options.get(RECORD)
        if isinstance(record, Mapping) and isinstance(record.get("fuser"), Mapping):
            raise ValueError(FUSED)


def recorded_pieces(record: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(text, kind) of T5's tokens, as the record has them; empty when it does not know, or is damaged."""
    try:
        pieces = json.loads((record or {}).get("pieces") or "[]")
        return [(str(text), str(kind)) for text, kind in pieces]
    except (TypeError, ValueError, RecursionError):
        return []


def sealed(record: Mapping[str, Any], tokens: Tensor, pack: str) -> Record:
    """The record, tied to these tokens and to the version of the pack that made them."""
    kind = {"dtype": str(tokens.dtype).removeprefix("torch."), "pack": pack}
    return {**record, **kind, "checksum": checksum(tokens)}


def checksum(tokens: Tensor) -> str:
    """32 hexadecimal digits of a tensor's shape, dtype and bits."""
    digest = hashlib.sha256(f"{tuple(tokens.shape)} {tokens.dtype}".encode())
    digest.update(tokens.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def current(options: Mapping[str, Any], tokens: Tensor | None) -> Record | None:
    """The record among the options, with a remark where the tokens are no longer those it was written for."""
    record = options.get(RECORD)
    if not isinstance(record, Mapping):
        return None
    if tokens is None or record.get("checksum") == checksum(tokens):
        return dict(record)
    how = "changed" if bool(tokens.any()) else "set to zero"
    dtype = str(tokens.dtype).removeprefix("torch.")
    return {**record, "changed": f"{how} by another node", "dtype": dtype, "checksum": checksum(tokens)}


def describe(record: Mapping[str, Any] | None) -> list[str]:
    """A record in lines of words."""
    if record is None:
        return ["made by other nodes: nothing is known about it"]
    lines = [f"prompt: {record.get('prompt', UNKNOWN)}"]
    if record.get("cut_tokens"):
        lines.append(f"cut off by T5: {record['cut_tokens']} tokens {record.get('cut_text', '')}".rstrip())
    lines.append(f"T5: {_origin(record.get('t5'))}, {record.get('text_length') or UNKNOWN} tokens")
    lines += [f"gain: {record['gains']}"] if record.get("gains") else []
    llm, fuser = record.get("llm"), record.get("fuser")
    if isinstance(llm, Mapping):
        lines += _describe_llm(llm, record.get("prompt"))
    if isinstance(fuser, Mapping):
        settings = _listed(fuser, "preset", "strength", "start", "end")
        lines.append(f"fuser: {_origin(fuser)}, {settings}")
    if record.get("changed"):
        lines.append(f"careful: the tokens were {record['changed']}; this is what they were made from")
    rounded = f" rounded to {record['rounded']}" if record.get("rounded") else ""
    kind = f"{record.get('dtype', UNKNOWN)}{rounded}"
    return [*lines, f"tokens: {kind}, made by version {record.get('pack', UNKNOWN)} of this pack"]


def differences(saved: Sequence[Entry], live: Sequence[Entry]) -> list[str]:
    """What differs between two conditions, field by field and in words; empty when nothing does."""
    found: list[str] = []
    if len(saved) != len(live):
        found.append(f"parts: {_two(len(saved), len(live))}")
    for index, (ours, theirs) in enumerate(zip(saved, live, strict=False)):
        where = f"part {index + 1}: " if len(saved) > 1 else ""
        found += [where + line for line in _entry_differences(ours, theirs)]
    return found


def text_differences(record: Mapping[str, Any] | None, prompt: str, instructions: str) -> list[str]:
    """What differs from plain texts; an empty text is not compared."""
    known = record or {}
    found = []
    if prompt.strip() and prompt.strip() != str(known.get("prompt", UNKNOWN)).strip():
        found.append(f"prompt: {_two(known.get('prompt', UNKNOWN), prompt.strip())}")
    if instructions.strip():
        found += _lines_differ(_value(known, "llm.instructions"), instructions)
    return found


def unlike_training(trained_on: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What a fuser meets that it was not trained with, in words; what one side does not know is left out.

    Both map "t5", "phi" and "base" (the DiT) to origins.
    """
    names = {"t5": "T5", "phi": "Phi-3.5", "base": "DiT"}
    pairs = {name: (trained_on.get(key), found.get(key)) for key, name in names.items()}
    return [
        f"it was trained with the {name} {_weights(ours)}, this one is {_weights(theirs)}"
        for name, (ours, theirs) in pairs.items()
        if len({_mark(ours), _mark(theirs), UNKNOWN}) == 3
    ]


def _mark(origin: Any) -> str:
    return str(origin.get("fingerprint", UNKNOWN)) if isinstance(origin, Mapping) else UNKNOWN


def _entry_differences(saved: Entry, live: Entry) -> list[str]:
    ours, theirs = current(saved[1], saved[0]), current(live[1], live[0])
    found: list[str] = []
    if ours is not None and theirs is not None:
        found += _records_differ(ours, theirs)
    elif ours is not theirs:
        side = "the file" if ours is None else "the graph"
        found.append(f"{side} does not know how its condition was made: only tokens are compared")
    tokens = _tokens_differ(saved[0], live[0], (ours or {}).get("rounded"))
    return [*found, tokens] if tokens else found


def _records_differ(ours: Record, theirs: Record) -> list[str]:
    found = [
        f"{name}: {_two(_value(ours, path), _value(theirs, path))}"
        for path, name in FIELDS.items()
        if _value(ours, path) != _value(theirs, path) and _both(ours, theirs, path)
    ]
    if _both(ours, theirs, "llm.instructions"):
        found += _lines_differ(_value(ours, "llm.instructions"), _value(theirs, "llm.instructions"))
    origins = [line for key, name in ORIGINS.items() for line in _origins_differ(name, ours, theirs, key)]
    return [*found, *origins]


def _origins_differ(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> Iterator[str]:
    a, b = ours.get(key), theirs.get(key)
    if a is None and b is None:
        return
    if a is None or b is None:
        yield f"{name}: the file has {_weights(a)}, the graph has {_weights(b)}"
        return
    marks = a.get("fingerprint", UNKNOWN), b.get("fingerprint", UNKNOWN)
    if UNKNOWN in marks:
        side = "the file" if marks[0] == UNKNOWN else "the graph"
        yield f"{name}: {side} does not know which weights it used, so they cannot be compared"
    elif marks[0] != marks[1]:
        yield f"{name}: the file has {_weights(a)}, the graph has {_weights(b)}"
    for field in ("changed", "dtype", "computed"):
        if a.get(field) != b.get(field) and (field == "changed" or UNKNOWN not in marks):
            yield f"{name}, {field}: {_two(a.get(field), b.get(field))}"


def _both(ours: Mapping[str, Any], theirs: Mapping[str, Any], path: str) -> bool:
    """Whether both have the part of a path; a part that one of them lacks is reported once, as an origin."""
    part, dot, _ = path.partition(".")
    return not dot or (part in ours and part in theirs)


def _lines_differ(ours: Any, theirs: Any) -> Iterator[str]:
    first, second = _instructions(ours), _instructions(theirs)
    for index in range(max(len(first), len(second))):
        pair = [lines[index] if index < len(lines) else None for lines in (first, second)]
        if pair[0] != pair[1]:
            yield f"instruction {index + 1}: {_two(*pair)}"


def _instructions(text: Any) -> list[str]:
    return [line.strip() for line in str(text or "").splitlines() if line.strip()]


def _tokens_differ(saved: Tensor | None, live: Tensor | None, rounded: str | None) -> str:
    if saved is None or live is None:
        return "" if saved is live else "tokens: only one of them has any"
    if saved.shape != live.shape:
        return f"tokens: {_two(tuple(saved.shape), tuple(live.shape))}"
    ours, theirs = saved.detach().cpu().double(), live.detach().cpu().double()
    if torch.equal(ours, theirs):
        return ""
    error = ((ours - theirs).norm() / theirs.norm().clamp(min=1e-12)).item()
    why = f", and the file is rounded to {rounded}" if rounded else ""
    return f"tokens: they differ by {error:.1e} of their size{why}"


def _describe_llm(llm: Mapping[str, Any], prompt: Any) -> list[str]:
    settings = _listed(llm, "layer", "answer_length", "temperature", "seed")
    own = [] if llm.get("prompt") == prompt else [f"prompt for Phi-3.5: {llm.get('prompt', UNKNOWN)}"]
    lines = [f"  {line}" for line in _instructions(llm.get("instructions"))]
    return [
        *own,
        f"Phi-3.5: {_origin(llm)}, {settings}",
        "instructions:",
        *lines,
        f"answer: {llm.get('answer') or 'none'}",
        *([f"gain: {llm['gains']}"] if llm.get("gains") else []),
    ]


def _origin(origin: Any) -> str:
    found = dict(origin) if isinstance(origin, Mapping) else {}
    name = f"{_weights(origin)}, {found['dtype']}" if found.get("dtype") else _weights(origin)
    name = f"{name} computed in {found['computed']}" if found.get("computed") else name
    return f"{name}, with {found['changed']}" if found.get("changed") else name


def _weights(origin: Any) -> str:
    if not isinstance(origin, Mapping):
        return "none"
    file, mark = origin.get("file", UNKNOWN), str(origin.get("fingerprint", UNKNOWN))
    return f"{file} ({mark[:SHORT]})" if mark != UNKNOWN else f"{file} weights"


def _listed(values: Mapping[str, Any], *names: str) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {values.get(name, UNKNOWN)}" for name in names)


def _value(record: Mapping[str, Any], path: str) -> Any:
    found: Any = record
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _two(ours: Any, theirs: Any) -> str:
    return f"the file has {_quoted(ours)}, the graph has {_quoted(theirs)}"


def _quoted(value: Any) -> str:
    if value is None:
        return "none"
    if not isinstance(value, str):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return f"'{value[:QUOTED]}...'" if len(value) > QUOTED else f"'{value}'"
