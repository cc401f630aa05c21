"""What the user says about the videos: files beside them, one table for the folder, or their own titles.

    a.txt          beside a.mp4: the caption of all of it
    a.json         beside a.mp4: {"caption": "..."}, or
                   {"captions": [{"start": 0, "end": 4, "caption": "..."}, ...]}
    captions.csv   (or .json, .jsonl) in the folder: rows with file, caption and, if they differ over time,
                   start and end in seconds; or a JSON object {"a.mp4": "..."}

A file of its own comes before the table, the table before the title. A clip gets the caption whose time
overlaps it most. What cannot be read is a problem to report, never a reason to stop.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

SUFFIXES = {".txt", ".json", ".jsonl", ".csv"}
TABLES = ("captions.csv", "captions.json", "captions.jsonl")


@dataclass(frozen=True)
class Note:
    """A caption from `start` to `end`, in seconds."""

    text: str
    source: str
    start: float = 0.0
    end: float = inf


@dataclass
class Notes:
    """All captions of a folder, what was wrong with them, and the files that no video belongs to."""

    of: dict[str, list[Note]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_notes(root: Path, videos: Iterable[str], others: Iterable[str]) -> Notes:
    """Captions of `videos` from `others`, both paths relative to `root`."""
    notes, known = Notes(), set(videos)
    table: dict[str, list[Note]] = {}
    owners = {key: video for video in sorted(known, reverse=True) for key in (video, _stem(video))}
    for name in sorted(others):
        path = root / name
        try:
            if name in TABLES:
                _merge(table, _table(path, name), notes, known)
            elif (owner := owners.get(_stem(name))) is not None:
                notes.of.setdefault(owner, []).extend(_beside(path, name))
            else:
                notes.problems.append(f"{name} belongs to no video")
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            notes.problems.append(f"{name} cannot be read: {error}")
    notes.of = {**table, **notes.of}
    return notes


def _stem(name: str) -> str:
    return str(Path(name).with_suffix("").as_posix())


def _merge(table: dict[str, list[Note]], found: dict[str, list[Note]], notes: Notes, known: set[str]) -> None:
    for file, entries in found.items():
        if file in known:
            table.setdefault(file, []).extend(entries)
        else:
            notes.problems.append(f"{entries[0].source} names {file}, which is not there")


def _beside(path: Path, name: str) -> list[Note]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".txt":
        return [Note(text, name)]
    if path.suffix != ".json":
        raise ValueError("a caption beside its video is a .txt or a .json file")
    values = json.loads(text)
    rows = values.get("captions", [values]) if isinstance(values, dict) else values
    return [_note(row, name) for row in rows]


def _table(path: Path, name: str) -> dict[str, list[Note]]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        rows: Iterable[Mapping[str, Any]] = csv.DictReader(io.StringIO(text))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        values = json.loads(text)
        pairs = isinstance(values, dict)
        rows = [{"file": key, "caption": value} for key, value in values.items()] if pairs else values
    found: dict[str, list[Note]] = {}
    for row in rows:
        found.setdefault(str(row["file"]).replace("\\", "/"), []).append(_note(row, name))
    return found


def _note(row: Mapping[str, Any], source: str) -> Note:
    if not isinstance(row.get("caption"), str):
        raise ValueError(f"expected an entry with a caption, got {str(dict(row))[:80]}")
    start, end = row.get("start"), row.get("end")
    return Note(
        row["caption"],
        source,
        float(start) if start not in (None, "") else 0.0,
        float(end) if end not in (None, "") else inf,
    )


def caption_for(notes: list[Note], title: str, start: float, end: float) -> tuple[str, str]:
    """(text, source) for a clip; ("", "") when nobody said anything about it."""
    best, most = None, 0.0
    for note in notes:
        shared = min(end, note.end) - max(start, note.start)
        if shared > most:
            best, most = note, shared
    if best is not None:
        return " ".join(best.text.split()), best.source
    return (" ".join(title.split()), "title") if title else ("", "")
