"""An exact detector for the synthetic world: which shapes of which colour are where in each frame, and what
they do.

Nothing is learnt here: saturation separates shapes from grey ground, connected components separate shapes
from one another, hue names the colour, and the best of three templates of equal mass and centroid names the
shape.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import Tensor

from .world import COLOURS, Scene

_SATURATION = 0.35  # (max - min) / max of a pixel that belongs to a shape
_VALUE = 0.10  # and its least brightness
_AREA = 40  # pixels; smaller specks are dirt
_LIKENESS = 0.70  # least overlap (intersection over union) with a template, else the shape is a 'blob'
_TRAVEL = 6.0  # pixels between first and last frame that count as motion
_HUES = {name: colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in COLOURS.items()}


@dataclass(frozen=True)
class Blob:
    """One connected shape in one frame. Centre in pixels (x, y), area in pixels."""

    colour: str
    shape: str
    centre: tuple[float, float]
    area: int


def blobs(frame: np.ndarray) -> list[Blob]:
    """The shapes of one frame (H, W, 3) in 0..1, largest first."""
    top = frame.max(-1)
    saturation = (top - frame.min(-1)) / np.maximum(top, 1e-3)
    labels, number = ndimage.label((saturation > _SATURATION) & (top > _VALUE))  # type: ignore[misc]
    found = []
    for index in range(1, number + 1):
        for mask, colour in _split_colours(frame, labels == index):
            if mask.sum() >= _AREA:
                y, x = np.argwhere(mask).mean(0)
                found.append(Blob(colour, _shape(mask), (float(x), float(y)), int(mask.sum())))
    return sorted(found, key=lambda b: -b.area)


def _split_colours(frame: np.ndarray, mask: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """Touching shapes of different colours are separated by the hue of each pixel."""
    hues = _hue(frame[mask])
    names = list(_HUES)
    distance = np.abs(hues[:, None] - np.array([_HUES[n] for n in names])[None])
    nearest = np.minimum(distance, 1 - distance).argmin(1)
    parts = []
    for index in np.unique(nearest):
        if (nearest == index).mean() < 0.2:
            continue
        part = np.zeros_like(mask)
        part[mask] = nearest == index
        parts.append((part, names[index]))
    return [(mask, parts[0][1])] if len(parts) == 1 else parts


def _hue(pixels: np.ndarray) -> np.ndarray:
    """Hue in 0..1 of (N, 3) pixels."""
    r, g, b = pixels.T
    top, low = pixels.max(1), pixels.min(1)
    span = np.maximum(top - low, 1e-6)
    hue = np.where(top == r, (g - b) / span, np.where(top == g, 2 + (b - r) / span, 4 + (r - g) / span))
    return (hue / 6) % 1.0


def _shape(mask: np.ndarray) -> str:
    """Nearest of three templates that have the mask's area and centroid; 'blob' when none is near."""
    y, x = np.argwhere(mask).mean(0)
    grid_y, grid_x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    dx, dy = grid_x - x, grid_y - y
    area = mask.sum()
    radius = np.sqrt(area / np.pi)
    half = np.sqrt(area) / 2
    height = np.sqrt(area * 2.05 / 1.15)  # of a triangle whose width is 2.3/2.05 of its height
    width = height * 1.15 / 2.05
    templates = {
        "circle": dx * dx + dy * dy <= radius * radius,
        "square": np.maximum(abs(dx), abs(dy)) <= half,
        "triangle": (dy <= height / 3) & (abs(dx) <= width * (dy + 2 * height / 3) / height),
    }
    likeness = {n: (mask & t).sum() / max(1, (mask | t).sum()) for n, t in templates.items()}
    best = max(likeness, key=lambda n: likeness[n])
    return best if likeness[best] >= _LIKENESS else "blob"


def judge(video: Tensor, scene: Scene) -> dict[str, bool]:
    """Compares a clip (3, F, H, W) in -1..1 with what its caption says.

    Returns only what the caption speaks of: 'colour' and 'shape' (of every thing), 'binding' (which shape of
    two has which colour), 'count', 'motion', 'relation', 'order' (which of two appears first), 'light', and
    'all' (everything above right).
    """
    frames = ((video.float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).cpu().numpy()  # (F, H, W, 3)
    seen = [blobs(f) for f in frames]
    best = max(range(len(seen)), key=lambda f: sum(b.area for b in seen[f]))  # where most can be seen
    shown = seen[best]
    wanted = [t for t in scene.things for _ in range(scene.count if len(scene.things) == 1 else 1)]
    verdict = {
        "colour": sorted({b.colour for b in shown}) == sorted({t.colour for t in wanted}),
        "shape": sorted(b.shape for b in shown) == sorted(t.shape for t in wanted),
        "motion": _motion(seen, scene.things[0].colour) == scene.things[0].motion,
        "light": _light(frames) == scene.light,
    }
    if len(wanted) > 1:
        verdict["count"] = len(shown) == len(wanted)
    if len(scene.things) == 2:
        pairs = [sorted((thing.colour, thing.shape) for thing in part) for part in (shown, wanted)]
        verdict["binding"] = pairs[0] == pairs[1]
    if scene.kind == "order":
        verdict["order"] = _order(seen, scene)
    if scene.relation is not None:
        verdict["relation"] = _relation(seen, scene)
    verdict["all"] = all(verdict.values())
    return verdict


def _centre(found: list[Blob], colour: str) -> tuple[float, float] | None:
    """Centre of mass of all shapes of one colour."""
    own = [b for b in found if b.colour == colour]
    mass = sum(b.area for b in own)
    if not mass:
        return None
    return sum(b.centre[0] * b.area for b in own) / mass, sum(b.centre[1] * b.area for b in own) / mass


def _motion(seen: list[list[Blob]], colour: str) -> str:
    first, last = _centre(seen[0], colour), _centre(seen[-1], colour)
    if first is None and last is None:
        return "absent"
    if first is None:
        return "appears"
    if last is None:
        return "disappears"
    dx, dy = last[0] - first[0], last[1] - first[1]
    if max(abs(dx), abs(dy)) < _TRAVEL:
        return "still"
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _relation(seen: list[list[Blob]], scene: Scene) -> bool:
    """The named relation holds in the middle frame, and it is the stronger of the two axes."""
    middle = seen[len(seen) // 2]
    a, b = (_centre(middle, t.colour) for t in scene.things)
    if a is None or b is None:
        return False
    dx, dy = a[0] - b[0], a[1] - b[1]
    side = ("left of" if dx < 0 else "right of") if abs(dx) >= abs(dy) else ("above" if dy < 0 else "below")
    return side == scene.relation


def _order(seen: list[list[Blob]], scene: Scene) -> bool:
    """The first thing is in the picture two frames or more before the second, and both are at the end."""
    first, second = (
        [f for f, found in enumerate(seen) if _centre(found, thing.colour) is not None]
        for thing in scene.things
    )
    stays = bool(first and second) and first[-1] == second[-1] == len(seen) - 1
    return stays and second[0] - first[0] >= 2


def _light(frames: np.ndarray) -> str:
    """Brightness of the grey ground at the end against the beginning."""
    levels = []
    for part in (frames[:1], frames[-1:]):
        grey = part[(part.max(-1) - part.min(-1)) < 0.12]
        levels.append(float(grey.mean()) if len(grey) else float(part.mean()))
    ratio = levels[1] / max(levels[0], 1e-3)
    return "day to night" if ratio < 0.6 else "night to day" if ratio > 1.67 else "steady"
