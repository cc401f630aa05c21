"""The weight of one piece of the prompt, on either branch. Gain 1 changes nothing, not even a bit.

T5's tokens are scaled themselves. The language model's cannot be: Norm would undo it. So their gain weighs
what they add to the condition, after Norm, scale and projection.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import FuserConfig
from ..provenance import NO_ORIGIN, RECORD, Entry, current, recorded_pieces, require_unfused, sealed
from ..tokens import LlmTokens
from .pieces import find

PARTS = ("query or answer", "query", "answer")
WHERE = {
    "query or answer": "Phi-3.5's prompt and answer",
    "query": "Phi-3.5's prompt",
    "answer": "Phi-3.5's answer",
}
UNKNOWN_PIECES = (
    "This condition does not know its pieces: it was not made by T5 Encode, or by an older version of this "
    "pack. Use T5 Encode, which takes the CLIP of any loader."
)


def gain_t5(
    condition: list[Any], piece: str, occurrence: int, gain: float, pack: str
) -> tuple[list[Any], str]:
    """CONDITIONING with the tokens of `piece` times `gain`, and in words what was changed.

    Of a combined condition, the parts that have the piece. pack: the version that signs the changed record.
    ValueError when the piece is in no part, or the condition is fused already.
    """
    if not condition:
        raise ValueError("The condition is empty: connect T5 Encode.")
    require_unfused(condition)
    changed, words, refused = [], [], []
    for entry in condition:
        try:
            entry, said = _gained(entry, piece, occurrence, gain, pack)
            words.append(said)
        except ValueError as error:
            refused.append(str(error))
            words.append("unchanged")
        changed.append(entry)
    if len(refused) == len(condition):
        raise ValueError(_numbered(refused, " "))
    return (condition if gain == 1 else changed), _numbered(words, "; ")


def _numbered(words: Sequence[str], between: str) -> str:
    """What holds for each part of a condition; the only part needs no number."""
    if len(words) == 1:
        return words[0]
    return between.join(f"part {number}: {text}" for number, text in enumerate(words, 1))


def _gained(entry: Entry, piece: str, occurrence: int, gain: float, pack: str) -> tuple[list[Any], str]:
    tokens, options = entry[0], entry[1]
    record = current(options, tokens)
    recorded = recorded_pieces(record)
    names = [text for text, kind in recorded if kind != "cut"]
    if record is None or not names or tokens is None:
        raise ValueError(UNKNOWN_PIECES)
    cut = [text for text, kind in recorded if kind == "cut"]
    chosen = find(names, piece, occurrence, "what T5 read", cut)
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
    chosen = [first + index for index in find(tokens.pieces[first:last], piece, occurrence, WHERE[part])]
    words = _words(tokens.pieces, chosen, gain)
    if gain == 1:
        return tokens, words
    shape = (tokens.query.shape[0], len(tokens.pieces))
    weights = torch.ones(shape, device=tokens.query.device) if tokens.gain is None else tokens.gain.clone()
    weights[:, chosen] *= gain
    made = tokens.made or NO_ORIGIN
    return replace(tokens, gain=weights, made={**made, "gains": _joined(made.get("gains"), words)}), words


def idle_gain(tokens: LlmTokens, config: FuserConfig, room: int) -> str:
    """In words, the gained pieces that a fuser of `config` leaves out of its sum of `room` places, or ""."""
    if tokens.gain is None:
        return ""
    split, total = tokens.query.shape[1], len(tokens.pieces)
    places = {"query": range(split), "answer": range(split, total)}
    kinds = config.llm_tokens.split("+") if config.use_llm else []
    summed = [index for kind in kinds for index in places[kind]][:room]
    idle = [index for index in _gained_places(tokens.gain) if index not in summed]
    if not idle:
        return ""
    reads = " and ".join({"query": "the prompt", "answer": "the answer"}[kind] for kind in kinds)
    why = f"of {reads} it takes the first {len(summed)} tokens" if reads else "it takes no token of Phi-3.5"
    return (
        f"The gain on Phi-3.5's {_named(tokens.pieces, idle)} changes nothing: this fuser does not add it "
        f"({why})."
    )


def prompt_gain(tokens: LlmTokens) -> str:
    """A sentence where the gain is on pieces of the prompt, which not every fuser reads, or ""."""
    split = tokens.query.shape[1]
    asked = [] if tokens.gain is None else _gained_places(tokens.gain[:, :split])
    if not asked:
        return ""
    return (
        f"{_named(tokens.pieces, asked)} is in the prompt: a fuser that adds only the answer, as the "
        "built-in one does, does not use it. Choose 'answer' as part for that one."
    )


def _gained_places(gain: Tensor) -> list[int]:
    return (gain != 1).any(dim=0).nonzero().flatten().tolist()


def _words(names: list[str], chosen: list[int], gain: float) -> str:
    return f"{_named(names, chosen)} times {gain:g}"


def _named(names: list[str], chosen: list[int]) -> str:
    places = ", ".join(str(index + 1) for index in chosen)
    return f"'{''.join(names[index] for index in chosen).strip()}' (token {places})"


def _joined(before: Any, words: str) -> str:
    return f"{before}; {words}" if before else words
