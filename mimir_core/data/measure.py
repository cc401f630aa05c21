"""Numbers from frames: pure functions, images (T, H, W, 3) uint8 RGB or luma (T, H, W) float 0..1 in."""

from __future__ import annotations

import numpy as np

BLACK_FRAME = 0.98  # share of black pixels from which a frame is black (as FFmpeg's blackframe filter)
BAR_LINE = 0.98  # share of black pixels from which a row or column belongs to a bar
EDGE = 0.06  # luma step from which an edge of an overlay is visible
MOVES = 0.02  # median deviation of luma over time from which a pixel changes most of the time


def luma(images: np.ndarray) -> np.ndarray:
    """(T, H, W) float32 from 0 (black) to 1 (white), ITU-R BT.601 weights."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32) / 255
    return images.astype(np.float32) @ weights


def black_frames(light: np.ndarray, level: float) -> float:
    """Share of the frames that are black."""
    return float(((light <= level).mean(axis=(1, 2)) >= BLACK_FRAME).mean())


def black_area(light: np.ndarray, level: float) -> float:
    """Share of the picture in bars at its four edges that are black in every frame (letterbox, pillarbox)."""
    black = light.max(axis=0) <= level
    top, bottom = _bars(black.mean(axis=1))
    left, right = _bars(black[top : len(black) - bottom].mean(axis=0)) if top < len(black) else (0, 0)
    height, width = black.shape
    return 1 - (height - top - bottom) * (width - left - right) / (height * width)


def _bars(lines: np.ndarray) -> tuple[int, int]:
    """How many lines at the start and at the end are black; all of them count as the start's."""
    bright = np.flatnonzero(lines < BAR_LINE)
    return (int(bright[0]), len(lines) - 1 - int(bright[-1])) if len(bright) else (len(lines), 0)


def sharpness(light: np.ndarray) -> float:
    """0..1: how strong the Laplacian is; near 0 for a picture without edges."""
    laplacian = (
        light[:, :-2, 1:-1] + light[:, 2:, 1:-1] + light[:, 1:-1, :-2] + light[:, 1:-1, 2:]
        - 4 * light[:, 1:-1, 1:-1]
    )  # fmt: skip
    return float(1 - np.exp(-laplacian.std() / 0.05)) if laplacian.size else 0.0


def colourfulness(images: np.ndarray) -> float:
    """0..1, after Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003); 109 and more
    on their scale, which they call extremely colourful, is 1."""
    red, green, blue = np.moveaxis(images.astype(np.float32), -1, 0)
    first, second = red - green, 0.5 * (red + green) - blue
    spread = np.hypot(first.std(), second.std())
    mean = np.hypot(first.mean(), second.mean())
    return float(min((spread + 0.3 * mean) / 109, 1.0))


def contrast(light: np.ndarray) -> float:
    """0..1: standard deviation of luma within the frames; 0.25 and more is 1."""
    return float(min(light.std(axis=(1, 2)).mean() / 0.25, 1.0))


def overlay(light: np.ndarray) -> float:
    """0..1: the densest small window of edges that stand still while the picture around them moves.

    What a logo, a watermark or a subtitle does. Per pixel, the median over time of the luma gradient, after
    Dekel et al., "On the effectiveness of visible watermarks" (2017). Windows in which little moves say
    nothing and do not count: an overlay on a still background is not seen, and a still camera is no overlay.
    """
    if len(light) < 3 or min(light.shape[1:]) < 16:
        return 0.0
    steps = (np.diff(light, axis=2)[:, :-1], np.diff(light, axis=1)[:, :, :-1])
    still = np.zeros(steps[0].shape[1:], dtype=bool)
    for step in steps:
        middle = np.median(step, axis=0)
        scatter = np.median(np.abs(step - middle), axis=0)
        still |= (np.abs(middle) > EDGE) & (scatter < 0.5 * np.abs(middle))
    # Medians: something that only passes in front of a still background moves nothing.
    moving = np.median(np.abs(light - np.median(light, axis=0)), axis=0)[:-1, :-1] > MOVES
    side = max(min(light.shape[1:]) // 8, 8)
    dense, moved = _windows(still, side), _windows(moving, side)
    return float(np.where(moved >= 0.3, dense, 0).max())


def _windows(mask: np.ndarray, side: int) -> np.ndarray:
    """The mean of every window of side x side pixels."""
    total = np.pad(mask.astype(np.float64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    area = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    return area / side**2
