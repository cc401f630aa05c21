"""The weight of one piece of the prompt, on either branch. Gain 1 changes nothing, not even a bit.

T5's tokens are scaled themselves. The language model's cannot be: Norm would undo it. So their gain weighs
what they add to the condition, after Norm, scale and projection.
"""

from dataclasses import replace
from typing import Any

import torch

from ..provenance import NO_ORIGIN, RECORD, Entry, current, recorded_pieces, sealed
from ..tokens import LlmTokens
from .pieces import find

PARTS = ("query or answer", "query", "answer")
UNKNOWN_PIECES = (
    "This condition does not know its pieces: it was not made by T5 Encode, or by an older version of this "
    "pack. Use T5 Encode, which takes the CLIP of any loader."
)


def gain_t5(
    condition: list[Any], piece: str, occurrence: int, gain: float, pack: str
) -> tuple[list[Any], str]:
    """CONDITIONING with the tokens of `piece` times `gain`, and in words what was changed.

    pack: the version that signs the changed record. ValueError when the piece is not there.
    """
    found = [_gained(entry, piece, occurrence, gain, pack) for entry in condition]
    if not found:
        raise ValueError("The condition is empty: connect T5 Encode.")
    return (condition if gain == 1 else [entry for entry, _ in found]), found[0][1]


def _gained(entry: Entry, piece: str, occurrence: int, gain: float, pack: str) -> tuple[list[Any], str]:
    tokens, options = entry[0], entry[1]
    record = current(options, tokens)
    names = [text for text, kind in recorded_pieces(record) if kind != "cut"]
    if record is None or not names or tokens is None:
        raise ValueError(UNKNOWN_PIECES)
    chosen = find(names, piece, occurrence)
    if max(chosen) >= tokens.shape[1]:
        raise ValueError(f"The condition has {tokens.shape[1]} tokens, '{piece}' would be beyond them.")
    changed = tokens.clone()
    changed[:, chosen] *= gain
    words = _words(names, chosen, gain)
    made = {**record, "gains": _joined(record.get("gains"), words)}
    return [changed, {**options, RECORD: sealed(made, changed, pack)}], words


def gain_llm(tokens: LlmTokens, part: str, piece: str, occurrence: int, gain: float) -> tuple[LlmTokens, str]:
    """The same for the language model's tokens; `part` is one of PARTS: where to look for the piece."""
    if part not in PARTS:
        raise ValueError(f"part is '{part}', expected one of {', '.join(PARTS)}")
    split = tokens.query.shape[1]
    first = split if part == "answer" else 0
    last = split if part == "query" else len(tokens.pieces)
    chosen = [first + index for index in find(tokens.pieces[first:last], piece, occurrence)]
    words = _words(tokens.pieces, chosen, gain)
    if gain == 1:
        return tokens, words
    shape = (tokens.query.shape[0], len(tokens.pieces))
    weights = torch.ones(shape, device=tokens.query.device) if tokens.gain is None else tokens.gain.clone()
    weights[:, chosen] *= gain
    made = tokens.made or NO_ORIGIN
    return replace(tokens, gain=weights, made={**made, "gains": _joined(made.get("gains"), words)}), words


def _words(names: list[str], chosen: list[int], gain: float) -> str:
    places = ", ".join(str(index + 1) for index in chosen)
    text = "".join(names[index] for index in chosen).strip()
    return f"'{text}' (token {places}) times {gain:g}"


def _joined(before: Any, words: str) -> str:
    return f"{before}; {words}" if before else words
