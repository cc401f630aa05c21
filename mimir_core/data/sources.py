"""Which files there are to look at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .captions import SUFFIXES, TABLES


@dataclass(frozen=True)
class Source:
    """A file that may be a video. Size and time of change tell whether it is still the same."""

    file: str  # relative to the folder of videos, with forward slashes
    size: int
    changed: int  # nanoseconds


@dataclass(frozen=True)
class Sources:
    root: Path
    videos: tuple[Source, ...]  # sorted by name
    others: tuple[str, ...]  # texts and tables that may hold captions


def find(videos: Path, out: Path) -> Sources:
    """Everything in a folder (`out` and hidden files left out), or what a .txt file lists, one path per line,
    relative to that file. ValueError when there is nothing."""
    if videos.is_dir():
        root, names = videos, list(_walk(videos, out.resolve()))
    elif videos.is_file():
        root = videos.parent
        names = _listed(videos) if videos.suffix == ".txt" else [videos.name]
    else:
        raise ValueError(f"{videos} is neither a folder of videos nor a .txt file that lists them")
    files = [name for name in names if Path(name).suffix.lower() not in SUFFIXES]
    if not files:
        raise ValueError(f"{videos} holds no videos: give a folder of them, or a list with one path a line")
    texts = {name for name in names if Path(name).suffix.lower() in SUFFIXES}
    if not videos.is_dir():
        beside = (
            str(Path(name).with_suffix(suffix).as_posix()) for name in files for suffix in (".txt", ".json")
        )
        texts |= {name for name in (*beside, *TABLES) if (root / name).is_file()}
    return Sources(
        root.resolve(), tuple(_source(root, name) for name in sorted(set(files))), tuple(sorted(texts))
    )


def _walk(root: Path, out: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = [name for name in folders if name[0] != "." and (here / name).resolve() != out]
        yield from ((here / name).relative_to(root).as_posix() for name in files if name[0] != ".")


def _listed(path: Path) -> list[str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines())
    return [line.replace("\\", "/") if os.sep == "\\" else line for line in lines if line and line[0] != "#"]


def _source(root: Path, name: str) -> Source:
    try:
        state = (root / name).stat()
    except OSError:
        return Source(name, -1, 0)  # reported when it is opened
    return Source(name, state.st_size, state.st_mtime_ns)
