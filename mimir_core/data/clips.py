"""What travels between the stages: clips, their frames, verdicts; and how a trainer reads the result."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

KEPT = "kept"
STAGES = ("read", "shots", "basic", "quality", "aesthetic", "watermark", "caption")
INDEX = "clips.jsonl"

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """A piece of a video: the frames whose time t, in seconds after the first frame, is start <= t < end."""

    file: str  # relative to the folder of videos, with forward slashes
    start: float
    end: float
    width: int  # as shown: turned upright, pixels square
    height: int
    fps: float  # measured, over the whole file
    text: str = ""  # what the user says about it: sidecar, table or title
    text_source: str = ""
    notes: tuple[str, ...] = ()  # of the file: rotated, no sound, variable frame rate ...

    @property
    def seconds(self) -> float:
        return round(self.end - self.start, 6)


@dataclass(frozen=True)
class Frames:
    """Decoded samples of one clip, evenly spread."""

    images: np.ndarray  # (T, H, W, 3) uint8, RGB
    times: tuple[float, ...]  # seconds after the clip's start


@dataclass(frozen=True)
class Verdict:
    """Where a clip ends: `stage` is "kept", or the stage that rejects it and why."""

    stage: str
    reason: str = ""  # a sentence; empty when kept
    measure: str = ""  # what was measured ...
    value: float | None = None
    limit: float | None = None  # ... and the limit that it does not meet
    measured: Mapping[str, float] = field(default_factory=dict)  # everything measured on the way
    caption: str = ""
    bucket: tuple[int, int, int] | None = None  # frames, height, width; when kept


def to_dict(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of this module from its JSON; foreign keys are ignored, lists become tuples."""
    names = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
    known = {key: value for key, value in values.items() if key in names}
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})


def entry(clip: Clip, verdict: Verdict) -> dict[str, Any]:
    """One line of the index: JSON-ready, without what is only a default."""
    return {**to_dict(clip), **to_dict(verdict), "notes": list(clip.notes)}


def read_index(out: Path) -> Iterator[dict[str, Any]]:
    """Every clip and every rejected file of a finished run, in order. FileNotFoundError without a run."""
    with open(out / INDEX, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_kept(out: Path) -> Iterator[tuple[Clip, Verdict, str]]:
    """(clip, verdict with caption and bucket, path of the written clip relative to `out` or "") of every
    kept clip."""
    for values in read_index(out):
        if values["stage"] == KEPT:
            yield from_dict(Clip, values), from_dict(Verdict, values), values.get("clip", "")
