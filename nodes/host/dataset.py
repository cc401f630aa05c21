"""Folders of videos below ComfyUI/input, and the captioned clips that the pipeline finds in them."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import folder_paths

from ...mimir_core.data import report
from ...mimir_core.data.clips import INDEX
from ...mimir_core.data.config import DataConfig
from ...mimir_core.data.prepare import Where
from ...mimir_core.data.prepare import prepare as run
from .files import stamp
from .names import DATASETS, place, remember, shown_place
from .report import one_bar, show

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".gif")
DEPTH = 3  # how deep below the input folder videos are looked for
SOURCE = "source.json"  # in a dataset: which folder of videos it was made from
SHORTER = (33, 17)  # frames of the buckets for clips that are too short for the wanted one
ASPECT = (0.8, 1.6)  # of the wanted width / height: what may be cropped to it
WORDS = {"probe": "Opening files", "shots": "Finding shots", "judge": "Judging clips", "write": "Writing"}


class Prepared(NamedTuple):
    name: str
    report: str
    pictures: list[dict[str, str]]  # example frames, as core names outputs


def choices() -> list[str]:
    """Folders below ComfyUI/input that hold a video."""
    root = Path(folder_paths.get_input_directory())
    found: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        below = Path(folder).relative_to(root)
        if len(below.parts) >= DEPTH:
            folders.clear()
        if below.parts and any(name.lower().endswith(SUFFIXES) for name in files):
            found.add(below.as_posix())
    return sorted(found)


def resolve(name: str) -> Path:
    """The path of a folder that `choices` named. ValueError when it is gone or lies elsewhere."""
    root = folder_paths.get_input_directory()
    path = Path(os.path.normpath(os.path.join(root, name)))  # symbolic links stay: videos may be elsewhere
    if path.is_dir() and path != Path(root) and path.is_relative_to(os.path.normpath(root)):
        return path
    raise ValueError(
        f"'{name}' was not found. Put the folder of videos (or a link to it) into {root}, press R in "
        "ComfyUI and choose it again."
    )


def fingerprint(name: str) -> str:
    """Changes when a video or a caption is added, changed or removed, so that the node runs again."""
    try:
        return stamp(resolve(name))
    except ValueError:
        return "missing"


def configured(
    frames: int,
    width: int,
    height: int,
    fps: float,
    shots: str,
    min_brightness: float,
    min_aesthetic: float,
    max_watermark: float,
) -> DataConfig:
    """The pipeline's configuration for clips of one size. ValueError for a size that no CogVideoX has."""
    counts = [frames, *(count for count in SHORTER if count < frames)]
    lengths = {"min_seconds": (min(counts) - 1) / fps, "max_seconds": frames / fps}
    shape = width / height
    return DataConfig.from_dict(
        {
            "shots": {"detector": shots},
            "basic": {
                **lengths,
                "min_width": width,
                "min_height": height,
                "min_aspect": ASPECT[0] * shape,
                "max_aspect": ASPECT[1] * shape,
                "min_fps": min(fps, 8.0),
            },
            "quality": {"min_brightness": min_brightness},
            "aesthetic": {"limit": min_aesthetic},
            "watermark": {"limit": max_watermark},
            "output": {"fps": fps, "buckets": [[count, height, width] for count in counts]},
        }
    )


def prepare(videos: str, name: str, config: DataConfig) -> Prepared:
    """Runs what is not done yet of the pipeline in this process; the result is output/mimir/datasets/name."""
    source, folder = resolve(videos), place(DATASETS, name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SOURCE).write_text(json.dumps({"videos": videos}) + "\n", encoding="utf-8")
    with one_bar() as step:

        def tell(kind: str, done: int, total: int) -> None:
            step(done, total)
            show(f"{WORDS[kind]}: {done} of {total}.")

        summary = run(source, folder, config, Where(), tell)
    remember(f"{DATASETS}/{name}", folder / INDEX)
    text = f"{_verdict(summary)} In {shown_place(folder)}.\n\n{report.table(summary)}"
    return Prepared(name, text, _pictures(folder))


def videos_of(dataset: Path) -> Path:
    """The folder of videos that a prepared dataset was made from."""
    if not ((dataset / SOURCE).is_file() and (dataset / INDEX).is_file()):
        raise ValueError(
            f"{shown_place(dataset)} holds no finished dataset: run Prepare Dataset, or type the name of one "
            "that it has made."
        )
    return resolve(json.loads((dataset / SOURCE).read_text(encoding="utf-8"))["videos"])


def _verdict(summary: dict[str, Any]) -> str:
    kept, seconds = summary["kept"], summary["kept_seconds"]
    if kept:
        return f"{kept} clips kept, {seconds:.0f} s of {summary['files']} files."
    return (
        f"No clip of {summary['files']} files was kept: the table says at which stage they were rejected. "
        "Captions belong into a .txt file beside each video."
    )


def _pictures(folder: Path) -> list[dict[str, str]]:
    sheet = folder / "sheets" / "kept.jpg"
    if not sheet.is_file():
        return []
    below = sheet.parent.relative_to(folder_paths.get_output_directory()).as_posix()
    return [{"filename": sheet.name, "subfolder": below, "type": "output"}]
