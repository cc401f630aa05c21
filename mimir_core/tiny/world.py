"""The synthetic world of Mimir Tiny: what a scene is, how scenes are drawn at random, and how they are
rendered.

A scene is what a caption can say: one to three flat shapes, their colours and motion, a relation between two
of them, which of two comes first, and how the light changes. A staging adds what a caption leaves open
(places, sizes, background greys). Ten per cent of all attribute combinations are kept out of every training
set; they are the test prompts.

Letters: B clips, N objects (3, unused ones are invisible), F frames (9), H = W = 64 pixels.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

FRAMES = 9
SIZE = 64
MAX_OBJECTS = 3

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.08, 0.08),
    "yellow": (0.92, 0.85, 0.05),
    "green": (0.10, 0.72, 0.12),
    "cyan": (0.05, 0.80, 0.85),
    "blue": (0.10, 0.22, 0.92),
    "purple": (0.68, 0.10, 0.85),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("still", "left", "right", "up", "down", "appears", "disappears")
RELATIONS = ("left of", "right of", "above", "below")
LIGHTS = ("steady", "day to night", "night to day")
KINDS = ("one", "light", "count", "pair", "relation", "order")
_SHARES = (24, 12, 28, 6, 20, 10)  # of the kinds in training videos

_DIRECTION = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
_OPPOSITE = {"left": (1.0, 0.0), "right": (-1.0, 0.0), "up": (0.0, 1.0), "down": (0.0, -1.0)}
_NIGHT_GROUND, _NIGHT_OBJECT = 0.22, 0.60
_EDGE = 2.0  # pixels that stay free between a shape and the border of the picture


@dataclass(frozen=True)
class Thing:
    """One kind of object in a scene. `motion` is one of MOTIONS."""

    shape: str
    colour: str
    motion: str = "still"


@dataclass(frozen=True)
class Scene:
    """What a caption can say.

    `count` copies of `things[0]` when there is one thing; two things when they stand in a `relation`, side by
    side ("pair", relation None), or appear one after the other ("order", the first one first).
    """

    kind: str
    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None
    light: str = "steady"

    def key(self) -> str:
        """The attribute combination as text; equal for scenes that no caption can tell apart."""
        things = "+".join(f"{t.colour} {t.shape} {t.motion}" for t in self.things)
        return f"{self.kind}|{things}|{self.count}|{self.relation}|{self.light}"

    @property
    def held_out(self) -> bool:
        """True for the tenth of all combinations that no training set contains."""
        return zlib.crc32(self.key().encode()) % 10 == 0


@dataclass(frozen=True)
class Staging:
    """A scene with everything that a caption leaves open. Lengths in pixels, y downwards."""

    scene: Scene
    starts: tuple[tuple[float, float], ...]
    ends: tuple[tuple[float, float], ...]
    radius: float
    greys: tuple[float, float]
    horizon: float


# --- scenes
# -----------------------------------------------------------------------------------------------------------


def random_scene(rng: random.Random, kind: str | None = None, held_out: bool = False) -> Scene:
    """Draws a scene of `kind` (any kind when None) from the training or the held-out combinations."""
    kind = kind or rng.choices(KINDS, weights=_SHARES)[0]
    while True:
        scene = _draw(rng, kind)
        if scene.held_out == held_out:
            return scene


def _draw(rng: random.Random, kind: str) -> Scene:
    first = Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)))
    if kind == "one":
        return Scene(kind, (Thing(first.shape, first.colour, rng.choice(MOTIONS)),))
    if kind == "light":
        motion = rng.choice(("still", "still", "left", "right"))
        return Scene(kind, (Thing(first.shape, first.colour, motion),), light=rng.choice(LIGHTS[1:]))
    if kind == "count":
        motion = rng.choice(("still", "still", "left", "right"))
        return Scene(kind, (Thing(first.shape, first.colour, motion),), count=rng.choice((2, 3)))
    other = rng.choice([c for c in COLOURS if c != first.colour])
    second = Thing(rng.choice(SHAPES), other)
    if kind == "pair":
        return Scene(kind, (first, second))
    if kind == "order":
        appearing = [Thing(thing.shape, thing.colour, "appears") for thing in (first, second)]
        return Scene(kind, tuple(appearing))
    relation = rng.choice(RELATIONS)
    across = ("left", "right") if relation in ("above", "below") else ("up", "down")
    motion = rng.choice(("still", *across))
    return Scene(kind, (Thing(first.shape, first.colour, motion), second), relation=relation)


# --- stagings
# ---------------------------------------------------------------------------------------------------------


def stage(scene: Scene, rng: random.Random) -> Staging:
    """Chooses places, sizes and background greys for a scene."""
    things = scene.things if len(scene.things) > 1 else scene.things * scene.count
    motions, number = [t.motion for t in things], len(things)
    radius = {1: rng.uniform(10.0, 13.0), 2: rng.uniform(8.5, 10.5), 3: rng.uniform(7.5, 8.5)}[number]
    travel = {1: rng.uniform(20.0, 28.0), 2: rng.uniform(14.0, 18.0), 3: 10.0}[number]
    centres = _centres(scene, motions, radius, travel, rng)
    paths = [_path(c, m, travel) for c, m in zip(centres, motions, strict=True)]
    starts, ends = tuple(p[0] for p in paths), tuple(p[1] for p in paths)
    ground = rng.uniform(0.72, 0.92) if scene.light != "steady" else rng.uniform(0.35, 0.92)
    second = ground if rng.random() < 0.5 else min(0.95, max(0.30, ground + rng.uniform(-0.15, 0.15)))
    return Staging(scene, starts, ends, radius, (ground, second), rng.uniform(0.3, 0.7) * SIZE)


def _path(
    centre: tuple[float, float], motion: str, travel: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    dx, dy = _DIRECTION.get(motion, (0.0, 0.0))
    x, y = centre
    return (x - dx * travel / 2, y - dy * travel / 2), (x + dx * travel / 2, y + dy * travel / 2)


def _centres(
    scene: Scene, motions: list[str], radius: float, travel: float, rng: random.Random
) -> list[tuple[float, float]]:
    """Centres of the paths: inside the picture with their motion, apart from one another, obeying the
    relation.
    """
    gap = 2 * radius + 5.0
    for _ in range(1000):
        spots = [_spot(m, radius, travel, rng) for m in motions]
        if scene.relation is not None:
            spots[1] = _related(spots[0], scene.relation, gap, rng)
        inside = all(_inside(s, m, radius, travel) for s, m in zip(spots, motions, strict=True))
        if inside and _apart(spots, motions, gap, travel):
            return spots
    raise AssertionError(f"no staging found for {scene.key()}")


def _margins(motion: str, radius: float, travel: float) -> tuple[float, float]:
    dx, dy = _DIRECTION.get(motion, (0.0, 0.0))
    edge = 1.2 * radius + _EDGE
    return edge + abs(dx) * travel / 2, edge + abs(dy) * travel / 2


def _spot(motion: str, radius: float, travel: float, rng: random.Random) -> tuple[float, float]:
    mx, my = _margins(motion, radius, travel)
    return rng.uniform(mx, SIZE - mx), rng.uniform(my, SIZE - my)


def _inside(spot: tuple[float, float], motion: str, radius: float, travel: float) -> bool:
    mx, my = _margins(motion, radius, travel)
    return mx <= spot[0] <= SIZE - mx and my <= spot[1] <= SIZE - my


def _related(
    first: tuple[float, float], relation: str, gap: float, rng: random.Random
) -> tuple[float, float]:
    """A place for the second thing such that the first stands `relation` it."""
    away, aside = rng.uniform(gap, gap + 10.0), rng.uniform(-5.0, 5.0)
    x, y = first
    places = {
        "left of": (x + away, y + aside),
        "right of": (x - away, y + aside),
        "above": (x + aside, y + away),
        "below": (x + aside, y - away),
    }
    return places[relation]


def _apart(spots: list[tuple[float, float]], motions: list[str], gap: float, travel: float) -> bool:
    """No two shapes touch in any frame (all copies of a count move together, so their centres suffice)."""
    together = len(set(motions)) == 1
    paths = [_path(s, m, travel) for s, m in zip(spots, motions, strict=True)]
    times = (0.0,) if together else tuple(f / (FRAMES - 1) for f in range(FRAMES))
    for i, (a0, a1) in enumerate(paths):
        for b0, b1 in paths[:i]:
            for t in times:
                dx = (a0[0] + t * (a1[0] - a0[0])) - (b0[0] + t * (b1[0] - b0[0]))
                dy = (a0[1] + t * (a1[1] - a0[1])) - (b0[1] + t * (b1[1] - b0[1]))
                if max(abs(dx), abs(dy)) < gap:
                    return False
    return True


# --- rendering
# --------------------------------------------------------------------------------------------------------


def render(stagings: list[Staging]) -> Tensor:
    """Renders clips: returns (B, 3, F, H, W) float32 in -1..1. Deterministic; edges are anti-aliased over one
    pixel.
    """
    video = _background(stagings)  # (B, 3, F, H, W) in 0..1
    light = torch.tensor([_light_curve(s.scene.light) for s in stagings])  # (B, F), 1 day .. 0 night
    shine = (_NIGHT_OBJECT + (1 - _NIGHT_OBJECT) * light)[:, None, :, None, None]
    for n in range(MAX_OBJECTS):
        colour = torch.tensor([COLOURS[_thing(s, n).colour] for s in stagings])[:, :, None, None, None]
        cover = _cover(stagings, n)[:, None]  # (B, 1, F, H, W)
        video = video + cover * (colour * shine - video)
    return video * 2 - 1


def _thing(staging: Staging, n: int) -> Thing:
    things = staging.scene.things
    return things[n] if n < len(things) else things[0]


def _light_curve(light: str) -> list[float]:
    if light == "steady":
        return [1.0] * FRAMES
    fall = [min(1.0, max(0.0, 1 - (f - 1) / (FRAMES - 3))) for f in range(FRAMES)]
    return fall if light == "day to night" else fall[::-1]


def _presence(scene: Scene, n: int) -> list[float]:
    """Opacity of object n per frame: it appears (or disappears) over the middle three frames; one after the
    other, the first over frames 0 to 2 and the second over 4 to 6.
    """
    if scene.kind == "order":
        return _rise(4 * n, 2)
    rise = _rise(2, 3)
    motion = scene.things[n if n < len(scene.things) else 0].motion
    return {"appears": rise, "disappears": rise[::-1]}.get(motion, [1.0] * FRAMES)


def _rise(start: int, frames: int) -> list[float]:
    return [min(1.0, max(0.0, (f - start) / frames)) for f in range(FRAMES)]


def _background(stagings: list[Staging]) -> Tensor:
    rows = torch.arange(SIZE) + 0.5  # (H,)
    horizon = torch.tensor([s.horizon for s in stagings])[:, None]  # (B, 1)
    greys = torch.tensor([s.greys for s in stagings])  # (B, 2)
    below = (rows[None] - horizon + 0.5).clamp(0, 1)  # (B, H)
    tone = greys[:, :1] * (1 - below) + greys[:, 1:] * below  # (B, H)
    light = torch.tensor([_light_curve(s.scene.light) for s in stagings])  # (B, F)
    tone = tone[:, None] * (_NIGHT_GROUND + (1 - _NIGHT_GROUND) * light)[:, :, None]  # (B, F, H)
    return tone[:, None, :, :, None].expand(-1, 3, -1, -1, SIZE)


def _cover(stagings: list[Staging], n: int) -> Tensor:
    """Coverage of object n in 0..1: (B, F, H, W)."""
    there = [n < len(s.starts) for s in stagings]
    start = torch.tensor([s.starts[n] if ok else (0.0, 0.0) for s, ok in zip(stagings, there, strict=True)])
    end = torch.tensor([s.ends[n] if ok else (0.0, 0.0) for s, ok in zip(stagings, there, strict=True)])
    time = torch.linspace(0, 1, FRAMES)[None, :, None]
    centre = start[:, None] + time * (end - start)[:, None]  # (B, F, 2)
    opacity = torch.tensor(
        [
            _presence(s.scene, n) if ok else [0.0] * FRAMES
            for s, ok in zip(stagings, there, strict=True)
        ]
    )  # (B, F)
    radius = torch.tensor([s.radius for s in stagings])[:, None, None, None]
    grid = torch.arange(SIZE) + 0.5
    x = grid[None, None, None, :] - centre[:, :, 0, None, None]  # (B, F, 1, W)
    y = grid[None, None, :, None] - centre[:, :, 1, None, None]  # (B, F, H, 1)
    distances = torch.stack([_circle(x, y, radius), _square(x, y, radius), _triangle(x, y, radius)])
    which = torch.tensor([SHAPES.index(_thing(s, n).shape) for s in stagings])
    distance = distances[which, torch.arange(len(stagings))]  # (B, F, H, W)
    return (0.5 - distance).clamp(0, 1) * opacity[:, :, None, None]


def _circle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y) - r


def _square(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(x.abs().expand(-1, -1, SIZE, -1), y.abs().expand(-1, -1, -1, SIZE)) - 0.88 * r


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Pointing up: apex at -1.2 r, base at 0.85 r, half as wide as 1.15 r; its centroid lies near the
    centre.
    """
    slope = 1.15 / 2.05
    side = (x.abs() - slope * (y + 1.2 * r)) / (1 + slope * slope) ** 0.5
    return torch.maximum(side, y - 0.85 * r)
