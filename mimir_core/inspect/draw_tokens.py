"""The picture of Inspect Tokens, drawn from its report alone."""

from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from . import canvas
from .canvas import BLUE, BODY, INK, LINE, MARGIN, ORANGE, QUIET, SMALL, WIDTH, Block, put
from .pieces import Json

LEFT = 160  # where strips begin; their names stand before it
CHIP, ROW = 28, 34  # heights of a piece and of its line
LONGEST = 28  # characters of a piece that are shown
MOST_CUT = 24
T5_END, MIDDLE, LLM_END = (0.42, 0.68, 0.87), (0.95, 0.95, 0.94), (0.98, 0.63, 0.26)


class Chip(NamedTuple):
    """A piece as a box. share: of the language model; None: not in the sum."""

    text: str
    share: float | None
    kind: str


def draw(report: Json) -> Tensor:
    """(1, H, 1000, 3) of a `token_report`."""
    return canvas.page(
        [
            *_head(report),
            *_strips(report),
            *_shares(report),
            *_norms(report),
            *_instructions(report),
            *_histograms(report),
        ]
    )


def _head(report: Json) -> list[Block]:
    fuser = report["fuser"]
    kind = "" if fuser["trained"] else ", untrained"
    settings = f"fuser: {fuser['name']}{kind}; preset: {fuser['preset']}; strength: {fuser['strength']:g}"
    prompt = report["prompt"] if report["prompt_known"] else report["llm"]["prompt"]
    return [
        Block(14, lambda *_: None),
        canvas.paragraph(f"\u201c{prompt}\u201d" if prompt else "(empty prompt)", canvas.TITLE - 4, 2),
        canvas.paragraph(settings, SMALL, 1, color=QUIET),
        *(canvas.paragraph(note, SMALL, 2, color="#a03c00") for note in report["notes"]),
    ]


# --- strips -------------------------------------------------------------------------------------------------


def _strips(report: Json) -> list[Block]:
    t5, llm = report["t5"], report["llm"]
    read = "unknown pieces" if t5["read"] is None else f"{t5['read']} of {t5['limit']} tokens"
    blocks = [
        canvas.heading("What was read", "colour: who makes the fused sum at the token's position"),
        _legend(),
        _strip("T5 read", read, _t5_chips(t5["pieces"], report["positions"])),
    ]
    if t5["cut"]:
        blocks.append(_strip("T5 cut", f"{t5['cut']} token{'s' * (t5['cut'] != 1)}", _cut_chips(t5)))
    asked = [piece for piece in llm["pieces"] if piece["kind"] != "answer"]
    answered = [piece for piece in llm["pieces"] if piece["kind"] == "answer"]
    blocks.append(_strip("Phi-3.5 read", _used(asked, "query"), _llm_chips(asked)))
    blocks.append(_strip("and answered", _used(answered, "answer"), _llm_chips(answered)))
    return blocks


def _used(pieces: list[Json], kind: str) -> str:
    own = [piece for piece in pieces if piece["kind"] == kind]
    total = len(own) + sum(piece.get("count", 0) for piece in pieces)
    return f"{sum(piece['used'] for piece in own)} of {total} added" if total else "nothing"


def _t5_chips(pieces: list[Json], positions: list[Json]) -> list[Chip]:
    """Padding and unknown pieces to which nothing is added are counted, not listed."""
    chips: list[Chip] = []
    plain = {"pad": 0, "unknown": 0}
    for piece in pieces:
        if piece["position"] is None:
            continue
        share = positions[piece["position"]]["share_llm"]
        name = {"end": "end", "pad": "pad", "unknown": f"{piece['position'] + 1}"}.get(piece["kind"])
        if piece["kind"] in plain and share == 0:
            plain[piece["kind"]] += 1
        else:
            chips.append(Chip(name or _visible(piece["text"]), share, piece["kind"]))
    return chips + [Chip(f"{kind} \u00d7 {count}", 0.0, kind) for kind, count in plain.items() if count]


def _cut_chips(t5: Json) -> list[Chip]:
    cut = [Chip(_visible(piece["text"]), None, "cut") for piece in t5["pieces"] if piece["kind"] == "cut"]
    shown = cut[:MOST_CUT]
    more = t5["cut"] - len(shown)
    return [*shown, Chip(f"{more} more", None, "more")] if more > 0 else shown


def _llm_chips(pieces: list[Json]) -> list[Chip]:
    chips: list[Chip] = []
    for piece in pieces:
        gain = "" if piece["gain"] == 1 else f" \u00d7 {piece['gain']:g}"
        text = f"{piece['count']} more" if piece["kind"] == "more" else _visible(piece["text"])
        chips.append(Chip(text + gain, piece["share"], piece["kind"]))
    return chips


def _visible(text: str) -> str:
    """A piece as one word: what is only space, or nothing, gets a sign."""
    if not text:
        return "\u00b7\u00b7"  # the token continues the character before it
    word = text.strip(" ").replace("\n", "\u21b5").replace("\t", "\u21e5") or "\u2423"
    return word if len(word) <= LONGEST else word[: LONGEST - 1] + "\u2026"


def _strip(name: str, remark: str, chips: list[Chip]) -> Block:
    placed, rows = _flow(chips)

    def paint(_figure: Any, axes: Any, top: float) -> None:
        put(axes, MARGIN, top + CHIP / 2, name, SMALL + 1, weight="bold")
        put(axes, MARGIN, top + CHIP / 2 + 19, remark, SMALL - 2, color=QUIET)
        for chip, x, row, width in placed:
            _paint(axes, chip, x, top + row * ROW, width)

    return Block(max(rows * ROW, 50) + 8, paint)


def _flow(chips: list[Chip]) -> tuple[list[tuple[Chip, float, int, float]], int]:
    """Places (chip, x, line, width) from left to right in lines, and how many lines."""
    placed: list[tuple[Chip, float, int, float]] = []
    x, row = float(LEFT), 0
    for chip in chips:
        width = canvas.width_of(chip.text, BODY - 1) + 14
        if x + width > WIDTH - MARGIN and x > LEFT:
            x, row = float(LEFT), row + 1
        placed.append((chip, x, row, width))
        x += width + 4
    return placed, row + 1


def _paint(axes: Any, chip: Chip, x: float, top: float, width: float) -> None:
    from matplotlib.patches import Rectangle

    missing = chip.share is None
    edge = {"cut": "#a03c00", "unk": INK}.get(chip.kind, LINE if missing else "none")
    face = "white" if chip.share is None else colour(chip.share)
    if chip.kind in ("template", "more"):
        face, edge = ("#ececf0", "none") if chip.kind == "template" else ("white", "none")
    dashed = (0, (3, 2)) if chip.kind in ("cut", "unk") else "solid"
    axes.add_patch(Rectangle((x, top), width, CHIP, facecolor=face, edgecolor=edge, linestyle=dashed))
    quiet = chip.kind in ("template", "pad", "end", "unknown", "more", "cut") or missing
    slant = "italic" if chip.kind in ("template", "pad", "end", "more") else "normal"
    put(
        axes,
        x + width / 2,
        top + CHIP / 2,
        chip.text,
        BODY - 1,
        ha="center",
        color=QUIET if quiet and not chip.share else INK,
        style=slant,
    )


def colour(share: float) -> tuple[float, ...]:
    """From T5's blue over near white to the language model's orange; black text is readable on all of it."""
    ends, part = ((T5_END, MIDDLE), share * 2) if share < 0.5 else ((MIDDLE, LLM_END), share * 2 - 1)
    return tuple(a + (b - a) * part for a, b in zip(*ends, strict=True))


def _legend() -> Block:
    """The scale of the colours, and what the other boxes mean."""
    scale = [("T5 100 %", 0.0), ("75", 0.25), ("50 : 50", 0.5), ("75", 0.75), ("100 % Phi-3.5", 1.0)]
    keys = [
        Chip("not in the sum", None, "query"),
        Chip("template", None, "template"),
        Chip("cut off", None, "cut"),
        Chip("T5 has no token for it", 0.0, "unk"),
    ]

    def paint(_figure: Any, axes: Any, top: float) -> None:
        x = float(MARGIN)
        for chip in chain((Chip(text, share, "scale") for text, share in scale), (None,), keys):
            if chip is None:
                x += 24
                continue
            width = canvas.width_of(chip.text, BODY - 1) + 12
            _paint(axes, chip, x, top, width)
            x += width + (0 if chip.kind == "scale" else 6)

    return Block(CHIP + 14, paint)


# --- charts -------------------------------------------------------------------------------------------------


def _shares(report: Json) -> list[Block]:
    share = [entry["share_llm"] * 100 for entry in report["positions"]]
    places = range(1, len(share) + 1)

    def plot(axes: Any) -> None:
        axes.bar(places, [100 - part for part in share], width=1, color=BLUE, label="T5")
        bottom = [100 - part for part in share]
        axes.bar(places, share, width=1, bottom=bottom, color=ORANGE, hatch="//", edgecolor="white",
                 linewidth=0, label="Phi-3.5")  # fmt: skip
        axes.set_xlim(0.5, len(share) + 0.5)
        axes.set_ylim(0, 100)
        canvas.label(axes, "position in the condition (token)", "share of the sum (%)")
        canvas.key(axes, 2)

    remark = "norm of a branch / sum of both norms, at each position"
    return [canvas.heading("Share of the fused sum", remark), canvas.chart(210, plot)]


def _norms(report: Json) -> list[Block]:
    positions, limit = report["positions"], report["t5"]["limit"]
    places = range(1, len(positions) + 1)
    pieces = [piece for piece in report["llm"]["pieces"] if piece["norm_after"] is not None][:limit]
    added = [(i, entry["llm"]) for i, entry in zip(places, positions) if entry["llm"] > 0]
    style: dict[str, Any] = {"markersize": 5 if limit <= 100 else 0, "linewidth": 1.6}

    def plot(axes: Any) -> None:
        own = range(1, len(pieces) + 1)
        axes.plot(places, [entry["t5_before"] for entry in positions], "--x", color=canvas.SKY,
                  label="T5", **style)  # fmt: skip
        axes.plot(places, [entry["t5"] for entry in positions], "-o", color=BLUE,
                  label="T5 in the sum", **style)  # fmt: skip
        axes.plot(own, [piece["norm_before"] for piece in pieces], "--^", color=INK,
                  label="Phi-3.5", **style)  # fmt: skip
        axes.plot(own, [piece["norm_after"] for piece in pieces], ":v", color=canvas.PINK,
                  label="after Norm and scale", **style)  # fmt: skip
        axes.plot(*(zip(*added) if added else ((), ())), "-s", color=ORANGE,
                  label="Phi-3.5 in the sum", **style)  # fmt: skip
        if any(entry["t5"] > 0 for entry in positions):
            canvas.plain_log(axes)
        axes.set_xlim(0.5, limit + 0.5)
        canvas.label(axes, "position in the condition (token)", "Euclidean norm (log)")
        canvas.key(axes, 5)

    return [canvas.heading("Norms"), canvas.chart(260, plot)]


def _instructions(report: Json) -> list[Block]:
    entries = report["instructions"]
    if not entries:
        return []
    appended = entries[0]["appended"]
    remark = "appended behind the sum: instruction e_i + learnt e_l = token" if appended else "not appended"
    most = max([entry[name] for entry in entries for name in BARS] + [1e-9])
    return [
        canvas.heading("Instruction tokens", f"{remark} (Euclidean norms)"),
        *(_instruction(number, entry, most) for number, entry in enumerate(entries, 1)),
    ]


BARS = {"norm_instruction": ("e_i", ORANGE), "norm_stabilizer": ("e_l", canvas.GREEN), "norm": ("token", INK)}


def _instruction(number: int, entry: Json, most: float) -> Block:
    """One line: the instruction, then three bars with their numbers."""
    text = canvas.wrap(f"{number}  {entry['text']}", 540, BODY - 2, 2)

    def paint(_figure: Any, axes: Any, top: float) -> None:
        from matplotlib.patches import Rectangle

        for row, line in enumerate(text):
            put(axes, MARGIN, top + 13 + 20 * row, line, BODY - 2)
        for row, (name, (short, fill)) in enumerate(BARS.items()):
            y, size = top + 2 + 14 * row, 260 * entry[name] / most
            axes.add_patch(Rectangle((650, y), size, 11, facecolor=fill, edgecolor="none"))
            put(axes, 644, y + 6, short, SMALL - 2, ha="right", color=QUIET)
            put(axes, 654 + size, y + 6, f"{entry[name]:.3g}", SMALL - 2)

    return Block(52, paint)


def _histograms(report: Json) -> list[Block]:
    spread, ratio = report["histograms"], report["range_ratio"]
    pairs = (("llm_raw", "before"), ("llm_normed", "after"))
    low = min(entry["min"] for entry in spread.values())
    high = max(entry["max"] for entry in spread.values())
    width = (WIDTH - 3 * MARGIN - canvas.LEFT) / 2

    def paint(figure: Any, _axes: Any, top: float) -> None:
        for column, (name, when) in enumerate(pairs):
            left = canvas.LEFT + column * (width + MARGIN + 28)
            axes = canvas.axes_at(figure, left, top + 76, width - 28, 210)
            for values, (fill, shown) in ((spread["t5"], T5_STYLE), (spread[name], LLM_STYLE)):
                _outline(axes, values, fill, shown)
            axes.set_yscale("log")
            axes.set_xlim(low - 0.02 * (high - low), high + 0.02 * (high - low) + 1e-6)
            canvas.label(axes, "value", "density (log)" if column == 0 else "")
            _numbers(axes, spread, name, f"{when} Norm and scale: {_times(ratio[when])}")

    return [canvas.heading("Values", "as in the paper's Figure 7 c and d"), Block(352, paint)]


def _times(ratio: float | None) -> str:
    return "no ratio of the ranges" if ratio is None else f"{ratio:.3g} times T5's range"


T5_STYLE, LLM_STYLE = (BLUE, "T5"), (ORANGE, "Phi-3.5")


def _outline(axes: Any, values: Json, fill: str, name: str) -> None:
    if not values["values"]:
        return
    steps = [b - a for a, b in zip(values["edges"], values["edges"][1:])]
    density = [
        count / (values["values"] * step) if step else 0 for count, step in zip(values["counts"], steps)
    ]
    axes.stairs(density, values["edges"], fill=True, color=fill, alpha=0.45, label=name)
    axes.stairs(density, values["edges"], color=fill, linewidth=1.5)


def _numbers(axes: Any, spread: Json, name: str, title: str) -> None:
    """Above the axes: what they show, and both distributions in numbers."""
    put(axes, 0, 1.29, title, SMALL, weight="bold", transform=axes.transAxes)
    for row, (values, (fill, shown)) in enumerate(((spread["t5"], T5_STYLE), (spread[name], LLM_STYLE))):
        line = f"{shown}: mean {values['mean']:.3g}, std {values['std']:.3g}"
        line = (
            f"{line}, range {values['min']:.3g} to {values['max']:.3g}" if values["values"] else "no tokens"
        )
        y = 1.19 - 0.095 * row
        put(axes, 0, y, "\u25a0", SMALL, color=fill, transform=axes.transAxes)
        put(axes, 0.045, y, line, SMALL - 1, transform=axes.transAxes)
