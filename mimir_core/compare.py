"""Videos beside one another, with labels, frame by frame.

A video is (F, H, W, 3) float32 in 0..1. What a cell shows is the video's own pixels: a size that differs is
padded, a small one is shown several times as large with every pixel repeated, never resampled.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .labels import BACKGROUND, text_block

GAP = 4  # pixels between cells and around them
LETTERS = 14  # pixels of a label's letters; on wide videos a fortieth of their width
SMALL = 192  # videos narrower than this are enlarged


def compare(videos: Sequence[Tensor], labels: Sequence[str], columns: int = 0) -> Tensor:
    """One video of all `videos` in a grid, in reading order, each under its label -> (F, H, W, 3).

    columns: 0 fits the grid to a wide screen. A shorter video holds its last frame until the longest ends; a
    smaller one is centred. Height and width are even, as video encoders want. ValueError names what is wrong.
    """
    _check(videos, labels, columns)
    factor = enlargement(videos)
    cells = [video.repeat_interleave(factor, 1).repeat_interleave(factor, 2) for video in videos]
    height, width = (max(_even(cell.shape[axis]) for cell in cells) for axis in (1, 2))
    frames = max(len(cell) for cell in cells)
    captions = [text_block(label, width, max(LETTERS, width // 40)) for label in labels]
    strip = max(len(caption) for caption in captions)
    columns = min(columns, len(cells)) or best_columns(len(cells), width + GAP, height + strip + GAP)
    rows = math.ceil(len(cells) / columns)
    picture = background(frames, rows * (height + strip + GAP) + GAP, columns * (width + GAP) + GAP)
    for number, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
        top = GAP + number // columns * (height + strip + GAP)
        left = GAP + number % columns * (width + GAP)
        picture[:, top + strip - len(caption) : top + strip, left : left + width] = caption
        y, x = top + strip + (height - cell.shape[1]) // 2, left + (width - cell.shape[2]) // 2
        place = picture[:, y : y + cell.shape[1], x : x + cell.shape[2]]
        place[: len(cell)], place[len(cell) :] = cell, cell[-1]
    return picture


def repeated(videos: Sequence[Tensor]) -> dict[int, int]:
    """{index: index of the first video that is the same, bit for bit} of the videos that repeat another."""
    first = {
        index: next(other for other in range(index + 1) if torch.equal(videos[other], video))
        for index, video in enumerate(videos)
    }
    return {index: other for index, other in first.items() if other != index}


def enlargement(videos: Sequence[Tensor]) -> int:
    """By which whole number the videos are shown larger: until the widest is SMALL pixels wide."""
    return max(1, math.ceil(SMALL / max(video.shape[2] for video in videos)))


def best_columns(count: int, width: int, height: int) -> int:
    """The number of columns with which `count` cells are largest on a screen of 16 : 9."""

    def size(columns: int) -> float:
        return min(16 / (columns * width), 9 / (math.ceil(count / columns) * height))

    return max(range(1, count + 1), key=lambda columns: (size(columns), columns))


def background(*shape: int) -> Tensor:
    """(*shape, 3) of the labels' background."""
    return (torch.tensor(BACKGROUND) / 255).expand(*shape, 3).clone()


def _even(size: int) -> int:
    return size + size % 2


def _check(videos: Sequence[Tensor], labels: Sequence[str], columns: int) -> None:
    if len(videos) < 1 or columns < 0:
        raise ValueError(
            f"{len(videos)} videos in {columns} columns: expected at least one video, columns from 0"
        )
    if len(labels) != len(videos):
        raise ValueError(
            f"{len(labels)} labels for {len(videos)} videos: write one line for each connected video, in the "
            "order of the inputs (or leave the box empty)."
        )
    for number, video in enumerate(videos, 1):
        if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
            raise ValueError(
                f"video {number} has shape {tuple(video.shape)}, expected frames (F, H, W, 3): connect the "
                "IMAGE of a VAE Decode."
            )
