"""Aesthetic, watermark and caption plug-ins: the interface, how they are found, and the plain ones.

A setting names one of: "none"; the plain one; "transformers", a model of yours in a local folder; or
"package.module:attribute". If that attribute is a class, it is made once per process with its section of the
configuration (`Scoring` or `Captions`); if it is a function, it is used as it is. Either way it is then
called with (clip, frames) and should depend on nothing else, so that every way of running gives the same.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from . import measure
from .clips import Clip, Frames
from .config import Captions, DataConfig, Scoring


class Scorer(Protocol):
    """Aesthetic: higher is better. Watermark: higher is more of a watermark."""

    def __call__(self, clip: Clip, frames: Frames) -> float: ...


class Captioner(Protocol):
    """The caption of a clip; "" when there is none. `clip.text` is what the user said about it."""

    def __call__(self, clip: Clip, frames: Frames) -> str: ...


@dataclass(frozen=True)
class Plugins:
    """What a process judges with; None leaves a stage out."""

    aesthetic: Scorer | None = None
    watermark: Scorer | None = None
    captions: Captioner | None = None


def plain_aesthetic(clip: Clip, frames: Frames) -> float:
    """0..1: the mean of sharpness, colourfulness and contrast. It knows nothing of beauty: it finds flat,
    grey and blurred pictures. For more, use a trained model."""
    light = measure.luma(frames.images)
    return (measure.sharpness(light) + measure.colourfulness(frames.images) + measure.contrast(light)) / 3


def plain_watermark(clip: Clip, frames: Frames) -> float:
    """0..1: see `measure.overlay`, which also says what it cannot see."""
    return measure.overlay(measure.luma(frames.images))


def sidecar_captions(clip: Clip, frames: Frames) -> str:
    """What a file beside the video, a table or the video's own title says (see captions.py)."""
    return clip.text


PLAIN: dict[str, dict[str, Callable[..., Any]]] = {
    "aesthetic": {"plain": plain_aesthetic},
    "watermark": {"plain": plain_watermark},
    "captions": {"sidecar": sidecar_captions},
}


def load_plugins(config: DataConfig) -> Plugins:
    """ValueError with the remedy when one cannot be found or made."""
    sections = {name: getattr(config, name) for name in PLAIN}
    return Plugins(**{name: _load(name, section) for name, section in sections.items()})


def check_plugins(config: DataConfig) -> None:
    """As `load_plugins`, without loading a model."""
    for name in PLAIN:
        section = getattr(config, name)
        if section.plugin == "transformers":
            model_folder(section.model, name)
        else:
            _load(name, section)


def model_folder(path: str, name: str) -> Path:
    """ValueError when it is no folder with a config.json."""
    folder = Path(path)
    if not path or not (folder / "config.json").is_file():
        raise ValueError(
            f"{name}.model is {path!r}; expected a local folder with config.json and .safetensors files. "
            "Nothing is downloaded."
        )
    return folder


@lru_cache(maxsize=4)
def cached_plugins(config: DataConfig) -> Plugins:
    """One set per process and configuration: a model is loaded once, not once per clip."""
    return load_plugins(config)


def _load(name: str, section: Scoring | Captions) -> Any:
    plugin = section.plugin
    if plugin == "none":
        return None
    if plugin in PLAIN[name]:
        return _guarded(name, PLAIN[name][plugin])
    if plugin == "transformers":
        from .models import ImageScorer, VideoCaptioner

        made = VideoCaptioner(section) if isinstance(section, Captions) else ImageScorer(section, name)
        return _guarded(name, made)
    found = _find(name, plugin)
    return _guarded(name, found(section) if isinstance(found, type) else found)


def _find(name: str, plugin: str) -> Any:
    module, _, attribute = plugin.partition(":")
    plain = ", ".join(PLAIN[name])
    if not attribute:
        raise ValueError(
            f"{name}.plugin is {plugin!r}; expected none, {plain}, transformers, or package.module:attribute"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}.plugin is {plugin!r}, which cannot be imported: {error}") from error


def _guarded(name: str, plugin: Callable[[Clip, Frames], Any]) -> Callable[[Clip, Frames], Any]:
    """Failures of a plug-in stop the run with a sentence: they are the plug-in's, not the video's."""

    def call(clip: Clip, frames: Frames) -> Any:
        try:
            return plugin(clip, frames)
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything; it is raised again, with its place
            where = f"{clip.file} at {clip.start:g} s"
            raise ValueError(
                f"the {name} plug-in failed on {where}: {type(error).__name__}: {error}. What is finished is "
                "kept; correct the plug-in and run the same command again."
            ) from error

    return call


def signature(section: Scoring | Captions) -> str:
    """Changes when the code of a plug-in or the files of its model change, so that a run notices."""
    parts = []
    if ":" in section.plugin:
        found = importlib.util.find_spec(section.plugin.partition(":")[0])
        if found is not None and found.origin and Path(found.origin).is_file():
            parts.append(Path(found.origin).read_bytes())
    if section.model and Path(section.model).is_dir():
        files = sorted(path for path in Path(section.model).rglob("*") if path.is_file())
        parts += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode() for path in files]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()[:16] if parts else ""
