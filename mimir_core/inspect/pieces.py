"""The tokens of both branches in words, JSON-ready, and finding some of them by their text."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..provenance import recorded_pieces
from ..tokens import LlmTokens

UNKNOWN = "unknown"
LISTED = 60  # pieces that an error message lists

Json = dict[str, Any]


def t5_pieces(record: Mapping[str, Any] | None, length: int) -> list[Json]:
    """[{"text", "kind"}] of a T5 condition of `length` tokens, as its record knows them.

    kind: "text", "unk" (T5 has no token for it), "end", "pad", "unknown"; then "cut", which have no place.
    """
    found = [{"text": text, "kind": kind} for text, kind in recorded_pieces(record)]
    read = [piece for piece in found if piece["kind"] != "cut"][:length]
    known = int((record or {}).get("text_length") or 0) if found else 0
    padded = [{"text": "", "kind": "pad"}] * (min(known, length) - len(read))
    rest = [{"text": "", "kind": UNKNOWN}] * (length - len(read) - len(padded))
    return [*read, *padded, *rest, *(piece for piece in found if piece["kind"] == "cut")]


def llm_pieces(tokens: LlmTokens) -> list[Json]:
    """[{"text", "kind": "template" | "query" | "answer", "norm"}] in the order in which the model read them.

    norm: of the hidden state (B = 1); None for template tokens, whose states are cut off.
    """
    before, after = tokens.template
    norms = tokens.sequence()[0].float().norm(dim=-1).tolist()
    split = tokens.query.shape[1]
    own = [
        {"text": text, "kind": "query" if index < split else "answer", "norm": norm}
        for index, (text, norm) in enumerate(zip(tokens.pieces, norms, strict=True))
    ]
    return [*map(_template, before), *own[:split], *map(_template, after), *own[split:]]


def _template(text: str) -> Json:
    return {"text": text, "kind": "template", "norm": None}


def find(
    pieces: Sequence[str],
    wanted: str,
    occurrence: int = 1,
    where: str = "this prompt",
    cut: Sequence[str] = (),
) -> list[int]:
    """Indices of the pieces that make up the text `wanted`: one piece, or several in a row.

    Spaces do not count, capital letters do. occurrence: 1 for the first, 2 ..., 0 for all. where: what the
    pieces are of, in words; cut: those behind them that were never read. ValueError that lists the pieces
    when the text is not there.
    """
    needle = "".join(wanted.split())
    if not any(piece.strip() for piece in pieces):
        raise ValueError(f"There are no pieces in {where}: it is empty.")
    if not needle:
        raise ValueError(f"piece is empty: write a piece of {where}. {_listed(pieces)}")
    runs = _runs(["".join(piece.split()) for piece in pieces], needle)
    if not runs and _runs(["".join(piece.split()) for piece in cut], needle):
        raise ValueError(f"'{wanted}' was cut: the prompt is too long, and T5 never read this piece.")
    if not runs:
        raise ValueError(f"'{wanted}' is no piece of {where}, nor several in a row. {_listed(pieces)}")
    if occurrence > len(runs):
        times = "once" if len(runs) == 1 else f"{len(runs)} times"
        raise ValueError(
            f"occurrence is {occurrence}, but '{wanted}' is there {times}. Use 1 for the first, 0 for all."
        )
    chosen = runs if occurrence == 0 else [runs[occurrence - 1]]
    return [index for run in chosen for index in run]


def _runs(texts: Sequence[str], needle: str) -> list[range]:
    """Ranges of `texts` that spell `needle`, from left to right, none inside another."""
    found: list[range] = []
    for start in range(len(texts)):
        if not texts[start] or (found and start in found[-1]):
            continue
        spelled, end = "", start
        while end < len(texts) and len(spelled) < len(needle):
            spelled, end = spelled + texts[end], end + 1
        while end < len(texts) and not texts[end]:  # bytes that continue the last character
            end += 1
        if spelled == needle:
            found.append(range(start, end))
    return found


def _listed(pieces: Sequence[str]) -> str:
    named = [f"'{piece.strip()}'" for piece in pieces if piece.strip()]
    more = f" and {len(named) - LISTED} more" if len(named) > LISTED else ""
    return f"Its pieces are {', '.join(named[:LISTED])}{more}."
