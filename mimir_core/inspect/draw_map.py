"""The picture of Token Map."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import canvas
from .canvas import BLUE, GREEN, MARGIN, ORANGE, SMALL, WIDTH, Block, put
from .cloud import PCA, Cloud, TokenMap, summary

SIDE = 400  # pixels of a map
STYLES = {  # colour, marker, name
    "encoder": (BLUE, "o", "T5"),
    "llm": (ORANGE, "^", "Phi-3.5"),
    "fused": (GREEN, "x", "fused"),
    "query": (BLUE, "o", "query"),
    "answer": (ORANGE, "^", "answer"),
    "final": (GREEN, "x", "final"),
}


def draw(found: TokenMap, prompts: Sequence[str]) -> Tensor:
    """(1, H, 1000, 3): prompts on the left, runs of the first on the right, a row for each method."""
    numbers = found.numbers
    raw = (
        ""
        if numbers["space"] == "text"
        else " This fuser adds none of the language model's tokens: they are shown as it gives them."
    )
    return canvas.page(
        [
            Block(14, lambda *_: None),
            _titles(numbers["runs"], prompts),
            *(_row(found, method) for method in numbers["methods"]),
            canvas.paragraph(summary(numbers) + raw, SMALL + 1, 3),
        ]
    )


def _titles(runs: int, prompts: Sequence[str]) -> Block:
    left = f"a  {len(prompts)} prompt{'s' * (len(prompts) != 1)}: every token"
    right = f"b  {runs} sampled answers to one prompt"
    quoted = canvas.wrap(f"\u201c{prompts[0]}\u201d", SIDE, SMALL, 2)

    def paint(_figure: Any, axes: Any, top: float) -> None:
        for column, title in enumerate((left, right)):
            put(axes, _left(column) - 40, top + 16, title, canvas.BODY, weight="bold")
        for row, line in enumerate(quoted):
            put(axes, _left(1) - 40, top + 42 + 19 * row, line, SMALL, color=canvas.QUIET)

    return Block(58 + 19 * len(quoted), paint)


def _left(column: int) -> float:
    return MARGIN + 46 + column * (WIDTH / 2 - 6)


def _row(found: TokenMap, method: str) -> Block:
    def paint(figure: Any, _axes: Any, top: float) -> None:
        for column, (cloud, name) in enumerate(((found.prompts, "prompts"), (found.runs, "runs"))):
            axes = canvas.axes_at(figure, _left(column), top + 26, SIDE, SIDE)
            _plot(axes, cloud, method)
            share = found.numbers["variance_shown"][name]
            axis = f"(1 and 2 show {share:.0%} of the variance)" if method == PCA else "(no unit)"
            canvas.label(axes, f"{method} 1 {axis}", f"{method} 2")
            axes.yaxis.set_label_coords(-0.1, 0.5)
            canvas.key(axes, 3)

    return Block(SIDE + 92, paint)


def _plot(axes: Any, cloud: Cloud, method: str) -> None:
    for kind, points in cloud.points[method].items():
        colour, marker, name = STYLES[kind]
        axes.scatter(
            points[:, 0].numpy(),
            points[:, 1].numpy(),
            s=34,
            c=colour,
            marker=marker,
            alpha=0.6,
            linewidths=1.4 if marker == "x" else 0,
            label=name,
        )
