"""What a run leaves for people: the index, a summary, a table, and example frames of every stage."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .clips import INDEX, KEPT, STAGES, read_index
from .config import DataConfig
from .video import Unreadable, read_times

SUMMARY = "summary.json"
TILE = (240, 160)  # width and height of an example on a sheet
LINES = 36  # height of the text below it
COLUMNS = 4


@dataclass
class Counts:
    """What is counted while the index is written."""

    entries: int = 0
    files: set[str] = field(default_factory=set)
    stages: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: {stage: Counter() for stage in STAGES})
    notes: dict[str, set[str]] = field(default_factory=dict)
    buckets: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    examples: dict[str, list[tuple[int, int, dict[str, Any]]]] = field(default_factory=dict)

    def add(self, entry: dict[str, Any], examples: int) -> None:
        stage = entry["stage"]
        self.entries += 1
        self.files.add(entry["file"])
        self.stages[stage] += 1
        for note in entry["notes"]:
            self.notes.setdefault(note, set()).add(entry["file"])
        if stage == KEPT:
            self.buckets["x".join(map(str, entry["bucket"]))] += 1
            self.seconds += entry["end"] - entry["start"]
        else:
            self.reasons[stage][entry["measure"] or entry["reason"]] += 1
        if entry["width"]:
            self._choose(entry, examples)

    def _choose(self, entry: dict[str, Any], examples: int) -> None:
        """Keeps the entries with the smallest hash: a fixed choice, spread over all files."""
        name = f"{entry['file']} {entry['start']}"
        number = int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12], 16)
        chosen = self.examples.setdefault(entry["stage"], [])
        heapq.heappush(chosen, (-number, self.entries, entry))
        if len(chosen) > examples:
            heapq.heappop(chosen)


def write(
    out: Path, root: Path, entries: Iterable[dict[str, Any]], problems: list[str], config: DataConfig
) -> dict[str, Any]:
    """Index, summary, sheets; removes clip files of the run before that no clip owns any more. Sheets are
    drawn only when the index is not the same as before."""
    counts, fresh = Counts(), out / f"{INDEX}.new"
    before = {entry["clip"] for entry in _old(out) if "clip" in entry}
    with open(fresh, "w", encoding="utf-8", newline="\n") as file:
        for entry in entries:
            counts.add(entry, config.output.examples)
            before.discard(entry.get("clip", ""))
            file.write(json.dumps(entry) + "\n")
    same = (out / INDEX).is_file() and _digest(fresh) == _digest(out / INDEX)
    os.replace(fresh, out / INDEX)
    for name in sorted(before):
        for path in (out / name, (out / name).with_suffix(".txt")):
            path.unlink(missing_ok=True)
    summary = summarise(counts, problems)
    (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8", newline="\n")
    if not same or not (out / "sheets").is_dir():
        _sheets(out / "sheets", root, counts)
    return summary


def _old(out: Path) -> Iterable[dict[str, Any]]:
    return read_index(out) if (out / INDEX).is_file() else ()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def summarise(counts: Counts, problems: list[str]) -> dict[str, Any]:
    """JSON-ready. An entry is a clip, or a whole file that was rejected before it had clips."""
    left, stages = counts.entries, {}
    for stage in STAGES:
        rejected = counts.stages[stage]
        reasons = sorted(counts.reasons[stage].items(), key=lambda item: (-item[1], item[0]))
        stages[stage] = {"judged": left, "rejected": rejected, "reasons": dict(reasons)}
        left -= rejected
    return {
        "files": len(counts.files),
        "entries": counts.entries,
        "kept": counts.stages[KEPT],
        "kept_seconds": round(counts.seconds, 3),
        "buckets": dict(sorted(counts.buckets.items())),
        "stages": stages,
        "notes": {note: len(files) for note, files in sorted(counts.notes.items())},
        "problems": problems,
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""
    lines = [f"{'stage':<10} {'judged':>8} {'rejected':>9}  reasons"]
    for stage, row in summary["stages"].items():
        reasons = ", ".join(
            f"{_short(reason)} ({count})" for reason, count in list(row["reasons"].items())[:4]
        )
        lines.append(f"{stage:<10} {row['judged']:>8} {row['rejected']:>9}  {reasons}".rstrip())
    lines.append(
        f"{'kept':<10} {summary['kept']:>8} {'':>9}  {summary['kept_seconds'] / 60:.1f} minutes of "
        f"{summary['files']} files"
    )
    lines += [f"noted: {note} ({count})" for note, count in summary["notes"].items()]
    lines += [f"problem: {problem}" for problem in summary["problems"]]
    return "\n".join(lines)


def _short(text: str, most: int = 48) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _sheets(folder: Path, root: Path, counts: Counts) -> None:
    folder.mkdir(exist_ok=True)
    for stage in (*STAGES, KEPT):
        path = folder / f"{stage}.jpg"
        chosen = sorted(counts.examples.get(stage, []), key=lambda item: item[1])
        if chosen:
            sheet(root, [entry for _, _, entry in chosen]).save(path, quality=85)
        else:
            path.unlink(missing_ok=True)


def sheet(root: Path, entries: list[dict[str, Any]]) -> Image.Image:
    """The middle frame of each clip, with its file, time and reason or caption."""
    rows = -(-len(entries) // COLUMNS)
    columns = min(len(entries), COLUMNS)
    page = Image.new("RGB", (columns * TILE[0], rows * (TILE[1] + LINES)), "white")
    draw = ImageDraw.Draw(page)
    for index, entry in enumerate(entries):
        x, y = index % COLUMNS * TILE[0], index // COLUMNS * (TILE[1] + LINES)
        picture = _middle(root, entry)
        page.paste(picture, (x + (TILE[0] - picture.width) // 2, y + (TILE[1] - picture.height) // 2))
        name = f"{Path(entry['file']).name} {entry['start']:.1f}-{entry['end']:.1f} s"
        for line, text in enumerate((name, entry["reason"] or entry["caption"])):
            # The built-in font knows ASCII only.
            plain = _short(text, 38).encode("ascii", "replace").decode()
            draw.text((x + 4, y + TILE[1] + 2 + 16 * line), plain, fill="black")
    return page


def _middle(root: Path, entry: dict[str, Any]) -> Image.Image:
    start, end = entry["start"], entry["end"]
    try:
        image = read_times(root / entry["file"], start, end, [(end - start) / 2], TILE[0])[0]
    except Unreadable:
        image = np.full((TILE[1], TILE[0], 3), 128, np.uint8)
    picture = Image.fromarray(image)
    picture.thumbnail((TILE[0] - 4, TILE[1]))
    return picture
