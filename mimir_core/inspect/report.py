"""Inspect Tokens as plain JSON types: what was read, what it weighs, how it is spread.

Norms in it, at each position and T5 piece:

    t5_before, norm_before   of T5's own token, before Z_theta
    t5, norm                 of T5's branch in the sum: e_theta, after Z_theta
    llm                      of what the language model adds: e_beta
    fused                    of the sum

and at each piece of the language model `norm_before` of its hidden state, `norm_after` after Norm and scale.
`range_ratio` is the language model's range against T5's, None where one of them has none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..provenance import UNKNOWN
from ..tokens import LlmTokens
from .dissect import Fusion, histogram, llm_shares, norms, range_ratio
from .gain import idle_gain
from .pieces import Json, llm_pieces, t5_pieces

FORMAT = 1
LISTED_UNUSED = 64  # query pieces that are named beyond those that reached the sum
QUOTED = 300  # characters of what T5 cut
NOT_OURS = "The condition was not made by T5 Encode, so its pieces are not known: only positions are shown."
NO_PIECES = "The condition was made by an older version of this pack, so its pieces are not known."
PASSES = "T5's condition passes unchanged: "


@dataclass(frozen=True)
class Settings:
    """How the fuser was used."""

    name: str
    preset: str
    strength: float
    trained: bool

    @property
    def passes(self) -> bool:
        return not self.trained or self.strength == 0


def token_report(
    fusion: Fusion,
    tokens: LlmTokens,
    record: Mapping[str, Any] | None,
    settings: Settings,
    notes: Sequence[str] = (),
) -> Json:
    """The report. `record` is that of T5's condition, None when another node made it."""
    spread = {
        "t5": histogram(fusion.text),
        "llm_raw": histogram(fusion.raw),
        "llm_normed": histogram(fusion.normed),
        "llm_added": histogram(fusion.decoder[: fusion.reached]),
        "fused": histogram(fusion.fused),
    }
    positions = _positions(fusion)
    known = (record or {}).get("prompt", UNKNOWN) != UNKNOWN
    return _clean(
        {
            "format": FORMAT,
            "prompt": str(record["prompt"]) if record is not None and known else "",
            "prompt_known": known,
            "notes": [*_remarks(record, settings), *_clashes(fusion, tokens, record, settings), *notes],
            "t5": _t5(record, positions),
            "llm": _llm(fusion, tokens, positions),
            "positions": positions,
            "instructions": _instructions(fusion, tokens, settings),
            "histograms": spread,
            "range_ratio": {
                "before": range_ratio(spread["llm_raw"], spread["t5"]),
                "after": range_ratio(spread["llm_normed"], spread["t5"]),
            },
            "fuser": _fuser(fusion, settings),
        }
    )


def _positions(fusion: Fusion) -> list[Json]:
    length = fusion.text.shape[0]
    columns = zip(
        norms(fusion.text),
        norms(fusion.encoder),
        norms(fusion.decoder),
        norms(fusion.fused[:length]),
        llm_shares(fusion.encoder, fusion.decoder),
        strict=True,
    )
    return [
        {
            "t5_before": before,
            "t5": t5,
            "llm": llm,
            "fused": both,
            "share_t5": round(1 - share, 6),
            "share_llm": share,
        }
        for before, t5, llm, both, share in columns
    ]


def _t5(record: Mapping[str, Any] | None, positions: list[Json]) -> Json:
    limit = len(positions)
    pieces = t5_pieces(record, limit)
    for index, piece in enumerate(pieces):
        placed = positions[index] if index < limit else None
        place = index if placed else None
        norms_and_share = {
            name: placed[key] if placed else None
            for name, key in (("norm_before", "t5_before"), ("norm", "t5"), ("share", "share_t5"))
        }
        pieces[index] = {**piece, "position": place, **norms_and_share}
    cut = int((record or {}).get("cut_tokens") or 0)
    unlisted = cut - sum(piece["kind"] == "cut" for piece in pieces)
    if cut and unlisted > 0:
        pieces.append({**_nowhere(unlisted), "norm_before": None, "norm": None})
    unknown = any(piece["kind"] == "unknown" for piece in pieces)
    read = sum(piece["kind"] in ("text", "unk", "end") for piece in pieces)
    text = str((record or {}).get("cut_text") or "")[:QUOTED]
    return {"limit": limit, "read": None if unknown else read, "cut": cut, "cut_text": text, "pieces": pieces}


def _nowhere(count: int) -> Json:
    return {"text": "", "kind": "more", "count": count, "position": None, "share": None}


def _llm(fusion: Fusion, tokens: LlmTokens, positions: list[Json]) -> Json:
    pieces = list(_shortened(list(_llm_entries(fusion, tokens, positions))))
    return {"layer": tokens.layer, "prompt": tokens.prompt, "answer": tokens.answer_text, "pieces": pieces}


def _llm_entries(fusion: Fusion, tokens: LlmTokens, positions: list[Json]) -> Iterator[Json]:
    """Every piece in reading order; the kinds that the fuser reads stand in the sum from its start."""
    kinds = fusion.config.llm_tokens.split("+")
    after = norms(fusion.normed)
    gains = iter([1.0] * len(tokens.pieces) if tokens.gain is None else tokens.gain[0].tolist())
    place = 0
    for piece in llm_pieces(tokens):
        entry = {"text": piece["text"], "kind": piece["kind"], "position": None, "used": False}
        own = piece["kind"] != "template"
        norm = float(f"{piece['norm']:.6g}") if own else None
        entry |= {"norm_before": norm, "norm_after": None, "gain": next(gains) if own else 1.0, "share": None}
        if piece["kind"] in kinds:
            entry["norm_after"] = after[place]
            if place < fusion.reached:
                entry |= {"position": place, "used": True, "share": positions[place]["share_llm"]}
            place += 1
        yield entry


def _shortened(pieces: list[Json]) -> Iterator[Json]:
    """The pieces without the many query pieces of a very long prompt that never reached the sum."""
    unused = [index for index, piece in enumerate(pieces) if piece["kind"] == "query" and not piece["used"]]
    left_out = unused[LISTED_UNUSED:]
    for index, piece in enumerate(pieces):
        if left_out and index == left_out[0]:
            absent = {"used": False, "norm_before": None, "norm_after": None, "gain": 1.0}
            yield {**_nowhere(len(left_out)), **absent}
        if not left_out or not left_out[0] <= index <= left_out[-1]:
            yield piece


def _instructions(fusion: Fusion, tokens: LlmTokens, settings: Settings) -> list[Json]:
    appended = fusion.config.stabilizer and not settings.passes
    columns = zip(
        tokens.instructions,
        norms(fusion.content),
        norms(fusion.learned),
        norms(fusion.content + fusion.learned),
        strict=True,
    )
    return [
        {"text": text, "norm_instruction": e_i, "norm_stabilizer": e_l, "norm": e_s, "appended": appended}
        for text, e_i, e_l, e_s in columns
    ]


def _fuser(fusion: Fusion, settings: Settings) -> Json:
    config = fusion.config
    return {
        "name": settings.name,
        "preset": settings.preset,
        "strength": settings.strength,
        "trained": settings.trained,
        "passes": settings.passes,
        "parts": config.llm_tokens,
        "norm": config.norm,
        "zero_conv": config.zero_conv,
        "use_llm": config.use_llm,
        "stabilizer": config.stabilizer,
    }


def _remarks(record: Mapping[str, Any] | None, settings: Settings) -> Iterator[str]:
    if record is None:
        yield NOT_OURS
    elif not record.get("pieces"):
        yield NO_PIECES
    for key, words in (("changed", "T5's tokens were {}."), ("gains", "Gain on T5's tokens: {}.")):
        if record is not None and record.get(key):
            yield words.format(record[key])
    if settings.passes:
        yield PASSES + ("this fuser is untrained." if not settings.trained else "strength is 0.")


def _clashes(
    fusion: Fusion, tokens: LlmTokens, record: Mapping[str, Any] | None, settings: Settings
) -> Iterator[str]:
    """What the person may not have meant: two prompts, another layer, a gain that changes nothing."""
    asked, made = str((record or {}).get("prompt", UNKNOWN)), tokens.made or {}
    if asked != UNKNOWN and not _same_prompt(asked, tokens.prompt, bool(made.get("prompt_cut"))):
        yield f"Phi-3.5 read another prompt than T5: '{tokens.prompt[:QUOTED]}'."
    if made.get("gains"):
        yield f"Gain on Phi-3.5's tokens: {made['gains']}."
    if settings.passes:
        return
    config = fusion.config
    if idle := idle_gain(tokens, config, len(fusion.text)):
        yield idle
    if tokens.layer != config.llm_layer and (config.use_llm or config.stabilizer):
        yield f"The fuser was trained on layer {config.llm_layer}, these tokens are layer {tokens.layer}."
    if not fusion.text.any() and fusion.encoder.any():
        yield "T5's tokens are all zero: its part of the sum is only what the fuser learnt (Z_theta's bias)."


def _same_prompt(t5: str, llm: str, cut: bool) -> bool:
    """Spaces do not count: the language model's reading may have one more inside what looks like its tags."""
    ours, theirs = ("".join(text.split()) for text in (t5, llm))
    return ours.startswith(theirs) if cut else ours == theirs


def summary(report: Json) -> str:
    """The report in one sentence or two, for the node."""
    t5, llm = report["t5"], report["llm"]
    used = [piece for piece in llm["pieces"] if piece["used"]]
    read = (
        "T5's pieces are not known" if t5["read"] is None else f"T5 read {t5['read']} of {t5['limit']} tokens"
    )
    cut = f" and cut {t5['cut']}" if t5["cut"] else ""
    return f"{read}{cut}; {_added(report, used)}. {' '.join(report['notes'])}".rstrip()


def _added(report: Json, used: Sequence[Json]) -> str:
    """What of the language model is in the condition."""
    appended = sum(entry["appended"] for entry in report["instructions"])
    behind = f"behind it: {_count(appended, 'instruction token')}"
    if used:
        share = sum(piece["share"] for piece in used) / len(used)
        words = (
            f"in the sum: {_count(len(used), 'token')} of the language model, on average {share:.0%} of it"
        )
        return f"{words}; {behind}" if appended else words
    if appended:
        return f"no token of the language model is in the sum; {behind}"
    return "nothing of the language model is added"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _clean(value: Any) -> Any:
    """Texts without lone surrogates, which no page and no file can hold."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, list) else value
