"""What was measured, as JSON and as a Markdown page. The two hold the same rows; JSON can be read back."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .measure import Spread

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "xformers", "triton")
KINDS = {
    "step": "One denoising step",
    "video": "A whole video",
    "prefill": "The language model reads a prompt and four instructions",
}
HEADER = "| | what | attention | compiled | seconds | time / {reference} | TFLOP/s | peak MB | difference |"
READING = (
    "*seconds*: median, and in brackets the quartiles. *time / ...*: the median of the ratios round by "
    "round; below 1 is faster. *peak MB*: memory on top of what lay there before the call. *difference*: of "
    "the output, relative to the reference's (norm of the difference over the norm)."
)


@dataclass(frozen=True)
class Row:
    """One contestant at one shape. Without `seconds` it did not run, and `note` says why."""

    kind: str
    shape: str
    contestant: str
    reference: str  # whom `ratio` and `difference` are relative to
    attention: str = ""
    compiled: str = ""
    seconds: Spread | None = None
    ratio: Spread | None = None
    tflops: float | None = None
    peak_mb: float | None = None
    difference: float | None = None
    largest: float | None = None  # absolute difference
    note: str = ""


@dataclass
class Report:
    """A session of measuring."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)  # name -> what it is
    limits: dict[str, dict[str, float]] = field(default_factory=dict)  # "shape, who" -> shares of the time
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        values = json.loads(text)
        rows = [
            Row(**{**row, **{name: _spread(row[name]) for name in ("seconds", "ratio")}})
            for row in values.pop("rows")
        ]
        return cls(rows=rows, **values)

    def write(self, path: Path) -> None:
        """`path` with .json and with .md; each is replaced at once, so that a stop leaves a whole file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", self.to_json()), (".md", markdown(self))):
            partial = Path(f"{path}{suffix}.part")
            partial.write_text(text, encoding="utf-8")
            partial.replace(f"{path}{suffix}")


def _spread(values: dict[str, Any] | None) -> Spread | None:
    return None if values is None else Spread(**values)


def machine(device: torch.device, more: dict[str, str]) -> dict[str, Any]:
    """What the numbers were measured on; `more` are versions of a host."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {**installed(), **more},
    }
    if device.type == "cuda":
        found["gpu_memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
        found["versions"]["cuda"] = str(torch.version.cuda)
    if hasattr(os, "getloadavg"):
        found["load_before"] = round(os.getloadavg()[0], 2)
    return found


def processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed() -> dict[str, str]:
    """Versions of the packages that matter and are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def markdown(report: Report) -> str:
    """The page: machine, one table per kind, what limits it, notes."""
    parts = [f"# Benchmark: {report.machine.get('device')}", _about(report)]
    for kind, title in KINDS.items():
        rows = [row for row in report.rows if row.kind == kind]
        if rows:
            parts += [f"## {title}", table(rows, report.shapes)]
    if any(row.seconds for row in report.rows):
        parts.append(READING)
    if report.limits:
        parts += ["## What limits it", _limits(report.limits)]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def summary(report: Report) -> str:
    """A short table for the README: who took how long, as a ratio, one line per contestant and shape."""
    lines = ["| | contestant | attention | seconds | time / reference |", "|---|---|---|---|---|"]
    for row in report.rows:
        if row.seconds and row.ratio:
            who = " ".join(filter(None, (row.contestant, row.compiled and f"(compiled: {row.compiled})")))
            cells = (row.shape, who, row.attention, f"{row.seconds.median:.3g}", f"{row.ratio.median:.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _about(report: Report) -> str:
    machine, settings = report.machine, report.settings
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    lines = [
        f"Measured {machine.get('date')} on {machine.get('device')} ({machine.get('cores')} cores, "
        f"{machine.get('threads')} threads used; {machine.get('system')}).",
        f"{versions}.",
        ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
    ]
    return "  \n".join(lines)


def table(rows: list[Row], shapes: dict[str, str]) -> str:
    """A Markdown table with a heading line for each shape."""
    lines, shape = [HEADER.format(reference=rows[0].reference), "|---" * 9 + "|"], None
    for row in rows:
        if row.shape != shape:
            shape = row.shape
            lines.append(f"| **{shape}** | {shapes.get(shape, '')} |" + " |" * 7)
        lines.append(_line(row))
    return "\n".join(lines)


def _line(row: Row) -> str:
    cells = ["", row.contestant + (f" ({row.note})" if row.note else ""), row.attention, row.compiled]
    cells += [_seconds(row.seconds), _number(row.ratio and row.ratio.median, ".3f")]
    cells += [_number(row.tflops, ".3g"), _number(row.peak_mb, ".0f"), _number(row.difference, ".1e")]
    return "| " + " | ".join(cells) + " |"


def _seconds(spread: Spread | None) -> str:
    if spread is None:
        return "did not run"
    return f"{spread.median:.4g} ({spread.low:.4g} to {spread.high:.4g})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _limits(limits: dict[str, dict[str, float]]) -> str:
    groups = list(next(iter(limits.values())))
    lines = [
        "Per cent of one step's time, from PyTorch's profiler.",
        "",
        f"| | {' | '.join(groups)} |",
        "|---" * (len(groups) + 1) + "|",
    ]
    lines += [
        f"| {name} | {' | '.join(f'{100 * shares.get(group, 0):.1f}' for group in groups)} |"
        for name, shares in limits.items()
    ]
    return "\n".join(lines)
