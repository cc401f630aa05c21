"""The four kinds of work, each a function of one task and the configuration; what a worker process runs.

A task and its result are plain JSON values, so that it makes no difference where a task runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .clips import Clip, Frames, from_dict
from .config import DataConfig
from .judge import SAMPLE_SIZE, judge, judge_basic, sample_times
from .plugins import cached_plugins
from .shots import scan
from .video import Tally, Unreadable, opened, read_times, timed
from .write import write_clip

VERSION = 1  # raised when the same input and configuration give another result than before


@dataclass(frozen=True)
class Task:
    """`key` names the work with everything that its result depends on."""

    kind: str
    key: str
    values: Mapping[str, Any]


def make_task(kind: str, values: Mapping[str, Any], depends: Any) -> Task:
    """`depends`: the state of the input file and the sections of the configuration that matter."""
    text = json.dumps([VERSION, kind, values, depends], sort_keys=True)
    return Task(kind, hashlib.sha256(text.encode()).hexdigest()[:32], values)


@dataclass(frozen=True)
class Worker:
    """Does tasks. Travels to other processes and machines, which must see the same two folders."""

    root: str  # the videos
    out: str
    config: DataConfig

    def __call__(self, task: Task) -> dict[str, Any]:
        """JSON-ready. {"error": reason, "retry": bool} for what cannot be decoded; ValueError when a plug-in
        fails."""
        try:
            return WORK[task.kind](self, task.values)
        except Unreadable as error:
            return {"error": str(error), "retry": error.retry}

    def path(self, file: str) -> Path:
        return Path(self.root) / file


def _probe(worker: Worker, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the header and the first frame say."""
    with opened(worker.path(values["file"])) as (container, stream):
        length = stream.duration * stream.time_base if stream.duration and stream.time_base else None
        seconds = round(float(length), 6) if length else (container.duration or 0) / 1e6
        title = {**container.metadata, **stream.metadata}.get("title", "")
        sound = bool(container.streams.audio)
    for _, _, shown_as in timed(worker.path(values["file"]), tally=Tally()):
        return {
            "width": shown_as.width,
            "height": shown_as.height,
            "turn": shown_as.turn,
            "seconds": seconds,
            "sound": sound,
            "title": title,
        }
    raise Unreadable("no frame of it can be decoded")


def _shots(worker: Worker, values: Mapping[str, Any]) -> dict[str, Any]:
    return asdict(scan(worker.path(values["file"]), worker.config.shots))


def _judge(worker: Worker, values: Mapping[str, Any]) -> dict[str, Any]:
    clip = from_dict(Clip, values)
    verdict = judge_basic(clip, worker.config.basic)
    return asdict(verdict or judge(clip, sample(worker, clip), worker.config, cached_plugins(worker.config)))


def sample(worker: Worker, clip: Clip) -> Frames:
    times = sample_times(clip.seconds)
    images = read_times(worker.path(clip.file), clip.start, clip.end, times, SAMPLE_SIZE)
    return Frames(images, tuple(times))


def _write(worker: Worker, values: Mapping[str, Any]) -> dict[str, Any]:
    source, target = worker.path(values["file"]), Path(worker.out) / values["name"]
    window = (values["start"], values["end"])
    return {"bytes": write_clip(source, *window, tuple(values["bucket"]), worker.config.output, target)}


WORK = {"probe": _probe, "shots": _shots, "judge": _judge, "write": _write}
