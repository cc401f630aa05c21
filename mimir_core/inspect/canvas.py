"""Figures without surprises: sizes in pixels, literal text, no window, no global state, no user's style.

matplotlib's `pyplot` is never used: it would keep every figure and choose a window system. Texts of prompts
and models go through `put`: neither `$` nor a missing glyph means anything in them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..labels import drawable, font, wrap

DPI = 100
WIDTH = 1000  # pixels of a picture
MARGIN = 28
LEFT = 86  # where the axes of a chart begin
BODY, SMALL, TITLE = 17, 14, 24  # pixels of letters
INK, QUIET, LINE = "#1b1b1f", "#5f6068", "#c9cad0"
# Okabe and Ito's colours, which stay apart for every kind of colour blindness.
BLUE, ORANGE, GREEN, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
MISSING = "The picture needs matplotlib. Install it with 'pip install matplotlib' in ComfyUI's Python."


class Block(NamedTuple):
    """A part of a page: its height in pixels, and what draws it at (figure, page axes, top)."""

    height: float
    draw: Callable[[Any, Any, float], None]


def page(blocks: list[Block], width: int = WIDTH) -> Tensor:
    """The blocks below each other on white -> (1, H, W, 3), float32 in 0..1."""
    height = int(np.ceil(sum(block.height for block in blocks))) + MARGIN
    with plain_style():
        figure = new_figure(width, height)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        top = 0.0
        for block in blocks:
            block.draw(figure, axes, top)
            top += block.height
        return to_image(figure)


@contextmanager
def plain_style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's matplotlibrc says. ValueError without matplotlib."""
    try:
        from matplotlib import style
    except ModuleNotFoundError as error:
        raise ValueError(MISSING) from error
    with style.context(["default", {"font.family": "DejaVu Sans", "axes.unicode_minus": True}]):
        yield


def new_figure(width: int, height: int) -> Any:
    """An empty figure of so many pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def to_image(figure: Any) -> Tensor:
    """(1, H, W, 3) float32 in 0..1."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    return torch.from_numpy(pixels)[None].float() / 255


def put(target: Any, x: float, y: float, text: str, size: float = BODY, **style: Any) -> Any:
    """`text`, literally, on axes or a figure; `size` in pixels."""
    style = {"color": INK, "va": "center", **style}
    return target.text(x, y, drawable(text), fontsize=points(size), parse_math=False, **style)


def points(pixels: float) -> float:
    return pixels * 72 / DPI


def width_of(text: str, size: int = BODY) -> float:
    """Pixels that `put` takes for `text`."""
    return float(font(size).getlength(drawable(text, size)))


def paragraph(text: str, size: int = BODY, lines: int = 3, **style: Any) -> Block:
    """Text over the whole width, wrapped; what does not fit on `lines` lines ends in "..."."""
    rows = wrap(text, WIDTH - 2 * MARGIN, size, lines)
    step = size * 1.35

    def draw(_figure: Any, axes: Any, top: float) -> None:
        for number, row in enumerate(rows):
            put(axes, MARGIN, top + step * (number + 0.5), row, size, **style)

    return Block(step * len(rows) + 4, draw)


def heading(text: str, remark: str = "") -> Block:
    """A title of a part, with a quiet remark behind it."""

    def draw(_figure: Any, axes: Any, top: float) -> None:
        put(axes, MARGIN, top + 26, text, BODY + 2, weight="bold")
        end = MARGIN + width_of(text, BODY + 2) * 1.16 + 14  # bold is wider than what is measured
        put(axes, end, top + 27, remark, SMALL, color=QUIET)

    return Block(44, draw)


def chart(height: float, plot: Callable[[Any], None], left: float = LEFT, right: float = MARGIN) -> Block:
    """Axes over the whole width with room for their labels, filled by `plot`."""

    def draw(figure: Any, _axes: Any, top: float) -> None:
        plot(axes_at(figure, left, top + 8, WIDTH - left - right, height - 62))

    return Block(height, draw)


def axes_at(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes at this place, in pixels from the upper left corner, in our style."""
    wide, high = figure.get_size_inches() * DPI
    axes = figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))
    axes.tick_params(labelsize=points(SMALL), colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def label(axes: Any, x: str, y: str) -> None:
    """What the axes show, with the unit."""
    axes.set_xlabel(x, fontsize=points(SMALL), color=INK)
    axes.set_ylabel(y, fontsize=points(SMALL), color=INK)
    width = axes.get_position().width * axes.figure.get_size_inches()[0] * DPI
    axes.yaxis.set_label_coords((MARGIN - LEFT) / width, 0.5)  # the same column in every chart


def plain_log(axes: Any) -> None:
    """A logarithmic y axis whose ticks are written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def key(axes: Any, columns: int, **place: Any) -> None:
    """The legend, above the axes on the right unless `place` says otherwise."""
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1, **place}
    axes.legend(fontsize=points(SMALL), ncols=columns, frameon=False, handlelength=1.4, **place)
