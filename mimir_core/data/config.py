"""Every threshold of the pipeline, in one frozen dataclass that is read from and written to JSON.

The paper names the filters (Figure 9) and none of their limits: every default below is this project's own.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DETECTORS = ("adaptive", "content", "none")


@dataclass(frozen=True)
class Reading:
    """When a file counts as damaged."""

    min_frames: int = 2
    max_broken_packets: int = 0  # packets that the decoder refuses, and frames whose time runs backwards
    min_decoded: float = 0.95  # of the length that the file declares: less is a truncated file
    variable_rate: bool = True  # False rejects files with a variable frame rate; else they are only noted

    def __post_init__(self) -> None:
        if self.min_frames < 2:
            raise ValueError(
                f"read.min_frames is {self.min_frames}, expected 2 or more: one frame is a picture"
            )


@dataclass(frozen=True)
class Shots:
    """Where PySceneDetect sees a cut. The detectors are its AdaptiveDetector and ContentDetector."""

    detector: str = "adaptive"  # or "content", or "none": every file is one shot
    threshold: float = 3.0  # adaptive: ratio to the neighbouring frames; content: a difference, try 27
    min_content: float = 15.0  # adaptive only: no cut below this difference
    min_seconds: float = 0.5  # no second cut within this time

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise ValueError(f"shots.detector is {self.detector!r}, expected one of {', '.join(DETECTORS)}")


@dataclass(frozen=True)
class Basic:
    """Duration, size, aspect ratio (width / height as shown) and frames per second."""

    min_seconds: float = 2.0
    max_seconds: float = 6.125  # longer shots are cut into pieces of this length (49 frames at 8 fps)
    min_width: int = 480
    min_height: int = 480
    min_aspect: float = 1.2
    max_aspect: float = 2.4
    min_fps: float = 8.0
    max_fps: float = 240.0

    def __post_init__(self) -> None:
        if not 0 < self.min_seconds <= self.max_seconds:
            raise ValueError(
                f"basic.min_seconds is {self.min_seconds} and basic.max_seconds {self.max_seconds}: expected "
                "0 < min_seconds <= max_seconds"
            )


@dataclass(frozen=True)
class Quality:
    """Black area, brightness and black-frame rate. Luma and shares are numbers from 0 to 1."""

    black_level: float = 0.1  # luma up to which a pixel is black
    max_black_frames: float = 0.1  # share of frames that are black (98 % of their pixels)
    min_brightness: float = 0.1  # mean luma of the clip
    max_brightness: float = 0.95
    max_black_area: float = 0.05  # share of the picture in bars at its edges that are black all the time


@dataclass(frozen=True)
class Scoring:
    """One scoring plug-in and its limit (the least aesthetic score, the greatest watermark score)."""

    limit: float
    plugin: str = "plain"  # or "none", "transformers", "package.module:attribute"
    model: str = ""  # transformers: a local folder with an image classifier
    label: str = ""  # transformers: the class whose probability is the score
    device: str = "cpu"


@dataclass(frozen=True)
class Captions:
    """Where captions come from."""

    plugin: str = "sidecar"  # or "none", "transformers", "package.module:attribute"
    required: bool = True  # a clip without a caption is rejected
    model: str = ""  # transformers: a local folder with an image-text-to-text model
    prompt: str = "Describe this video in detail: objects, colours, positions, movement, light."
    frames: int = 4  # transformers: how many frames it sees
    max_new_tokens: int = 160
    device: str = "cpu"


@dataclass(frozen=True)
class Output:
    """What kept clips are for: the trainer's buckets (frames, height, width) at one frame rate."""

    fps: float = 8.0
    buckets: tuple[tuple[int, int, int], ...] = ((49, 480, 720), (33, 480, 720), (17, 480, 720))
    write_clips: bool = False  # also write every kept clip as a file of its bucket's size
    codec: str = "libx264"
    crf: int = 18  # quality of the written files; less is better and larger
    examples: int = 8  # pictures on each stage's contact sheet

    def __post_init__(self) -> None:
        buckets = tuple(tuple(bucket) for bucket in self.buckets)
        object.__setattr__(self, "buckets", buckets)
        if not buckets or self.fps <= 0:
            raise ValueError("output needs at least one bucket [frames, height, width] and a positive fps")
        for bucket in buckets:
            if len(bucket) != 3 or bucket[0] % 8 != 1 or bucket[1] % 16 or bucket[2] % 16 or min(bucket) < 1:
                raise ValueError(
                    f"output.buckets has {list(bucket)}; expected [frames, height, width] with 8k + 1 frames "
                    "and sizes that are multiples of 16"
                )


@dataclass(frozen=True)
class DataConfig:
    """All stages. ValueError for limits that contradict one another."""

    read: Reading = field(default_factory=Reading)
    shots: Shots = field(default_factory=Shots)
    basic: Basic = field(default_factory=Basic)
    quality: Quality = field(default_factory=Quality)
    aesthetic: Scoring = field(default_factory=lambda: Scoring(limit=0.15))
    watermark: Scoring = field(default_factory=lambda: Scoring(limit=0.1))
    captions: Captions = field(default_factory=Captions)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        needed = (min(bucket[0] for bucket in self.output.buckets) - 1) / self.output.fps
        if self.basic.min_seconds < needed:
            raise ValueError(
                f"basic.min_seconds is {self.basic.min_seconds}, but the shortest bucket lasts {needed:g} s "
                f"at {self.output.fps:g} fps: raise min_seconds or add a shorter bucket"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """From (part of) what `to_dict` gives; what is missing keeps its default. ValueError on unknown
        names, so that a misspelt threshold is not silently ignored."""
        _known(cls, values, "the configuration")
        defaults = cls()
        sections = {
            name: dataclasses.replace(
                getattr(defaults, name), **_section(getattr(defaults, name), name, given)
            )
            for name, given in values.items()
        }
        return cls(**sections)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` restores it."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read_json(cls, path: Path) -> DataConfig:
        """ValueError with the path when it is not JSON or not a configuration."""
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(values, dict):
                raise ValueError(f"expected an object with sections, got {type(values).__name__}")
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _section(default: Any, name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} is {given!r}, expected an object such as {dataclasses.asdict(default)}")
    _known(type(default), given, name)
    return {key: _typed(f"{name}.{key}", getattr(default, key), value) for key, value in given.items()}


def _known(cls: type, given: Mapping[str, Any], where: str) -> None:
    names = [entry.name for entry in fields(cls)]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(names)}"
            raise ValueError(f"{where} has no setting {name!r}: {hint}")


def _typed(where: str, default: Any, value: Any) -> Any:
    """`value` in the type of the default; an int is a float too, a list a tuple."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        return tuple(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, float) and number:
        return float(value)
    if type(value) is not type(default):
        kind = type(default).__name__
        raise ValueError(f"{where} is {value!r}, expected a value of type {kind} such as {default!r}")
    return value
