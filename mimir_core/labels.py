"""Text in pictures: wrapped, never cut off in silence, and literal whatever it contains.

Pictures are (..., H, W, 3) float32 in 0..1, as everywhere in the project.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BACKGROUND = (24, 24, 27)
INK = (235, 235, 240)
MOST_LINES = 6
MORE = "..."


@functools.cache
def font(size: int) -> Any:
    """matplotlib's DejaVu Sans, which knows most alphabets, or else the one that Pillow brings (ASCII)."""
    try:
        from matplotlib import get_data_path
    except ModuleNotFoundError:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def text_block(
    text: str, width: int, size: int = 14, centred: bool = True, lines: int = MOST_LINES
) -> Tensor:
    """`text` on the dark background, wrapped to `width` pixels -> (H, width, 3), H even.

    What does not fit on `lines` lines ends in "...".
    """
    rows = wrap(text, max(width - size // 2, 1), size, lines)
    step = size + max(2, size // 4)
    image = Image.new("RGB", (width, (len(rows) * step + size // 2 + 1) // 2 * 2), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for number, row in enumerate(rows):
        left = (width - font(size).getlength(row)) / 2 if centred else size // 4
        draw.text((max(left, 0), size // 4 + number * step), row, font=font(size), fill=INK)
    return torch.from_numpy(np.asarray(image).copy()).float() / 255


def wrap(text: str, width: float, size: int, lines: int = MOST_LINES) -> list[str]:
    """Lines of at most `width` pixels; a word longer than a line is broken, spaces stay where they were."""
    rows: list[str] = []
    for paragraph in drawable(text, size).split("\n"):
        rows += _wrapped(paragraph, width, size)
        if len(rows) > lines:  # a prompt of ten thousand words need not be measured to its end
            return [*rows[: lines - 1], _shortened(rows[lines - 1], width, size)]
    return rows


def drawable(text: str, size: int = 14) -> str:
    """`text` with what the font has no picture of, and control characters, as escapes: \\u4e2d."""
    return "".join(c if c == "\n" or _has(c, size) else _escape(c) for c in text.replace("\t", " ")[:4000])


def _wrapped(paragraph: str, width: float, size: int) -> list[str]:
    measure = font(size).getlength
    rows = [""]
    for word in paragraph.split(" "):
        longer = f"{rows[-1]} {word}" if rows[-1] else word
        if measure(longer) <= width:
            rows[-1] = longer
            continue
        if rows[-1]:
            rows.append("")
        for letter in word:
            if rows[-1] and measure(rows[-1] + letter) > width:
                rows.append("")
            rows[-1] += letter
        if len(rows) > MOST_LINES * 4:
            break
    return rows


def _shortened(row: str, width: float, size: int) -> str:
    while row and font(size).getlength(row + MORE) > width:
        row = row[:-1]
    return row + MORE


@functools.lru_cache(4096)
def _has(character: str, size: int) -> bool:
    if character == " ":
        return True
    if not character.isprintable():
        return False
    return bytes(font(size).getmask(character)) != bytes(font(size).getmask("\U0010fffe"))


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
