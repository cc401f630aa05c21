"""Runs what was asked for, shape by shape, and writes the report after each, until the time is over."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import measure
from .flops import step_flops
from .limits import shares
from .prefill import Reader
from .report import Report, Row
from .rivals import DIFFUSERS, OURS, Builder, Missing, Model, inputs, models, random_state, reason
from .shapes import Prefill, Shape
from .video import Scene, films

log = logging.getLogger(__name__)

SEPARATE = "separate prefills"


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    repeats: int = 10
    warmup: int = 2
    video_steps: int = 4
    compile_mode: str | None = None
    deadline: float = float("inf")  # of time.monotonic; the shape at work then stops after one round
    hosts: tuple[Builder, ...] = field(default=())


@dataclass(frozen=True)
class Entry:
    """A contestant at the start: what it is called, and what runs. `run` None: it cannot."""

    name: str
    run: measure.Run | None
    attention: str = ""
    compiled: str = ""
    note: str = ""


def run(
    report: Report,
    settings: Settings,
    steps: Sequence[Shape] = (),
    videos: Sequence[Shape] = (),
    prefills: Sequence[Prefill] = (),
    out: Path | None = None,
) -> Report:
    """Everything asked for, into `report`; written to `out` after each part. A part that fails is a note."""
    parts: list[tuple[str, Callable[[], None]]] = []
    parts += [(f"step, {shape.name}", _part(one_step, report, settings, shape)) for shape in steps]
    parts += [(f"prefill, {shape.name}", _part(one_prefill, report, settings, shape)) for shape in prefills]
    parts += [(f"video, {shape.name}", _part(one_video, report, settings, shape)) for shape in videos]
    for name, part in parts:
        if time.monotonic() > settings.deadline:
            report.notes.append(f"Not measured, the time was over: {name}.")
        else:
            log.info("%s ...", name)
            _attempt(report, name, part)
            _release(settings.device)
        if out is not None:
            report.write(out)
    return report


def _part(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)


def _attempt(report: Report, name: str, part: Callable[[], None]) -> None:
    try:
        with torch.inference_mode():
            part()
    except Exception as error:  # noqa: BLE001  one shape that does not fit must not end the rest
        log.warning("%s: %s", name, reason(error))
        report.notes.append(f"Not measured: {name}: {reason(error)}.")


def one_step(report: Report, settings: Settings, shape: Shape) -> None:
    """Rows of one denoising step, and where its time goes."""
    report.shapes[shape.name] = shape.described
    state = random_state(shape.config, settings.device, settings.dtype)
    given = inputs(shape, settings.device, settings.dtype)
    found = [*models(shape, state, settings.compile_mode), *_of_hosts(settings, shape, state)]
    entries = [_entry(model, given) for model in found]
    flops = step_flops(shape.config, shape.latents, shape.text, shape.batch).total
    rows = contest("step", shape.name, entries, settings, DIFFUSERS, flops)
    report.rows += rows
    ran = {row.contestant for row in rows if row.seconds}
    for name in (name for name in (OURS, DIFFUSERS) if name in ran):
        plain = next(entry for entry in entries if entry.name == name)
        report.limits[f"{shape.name}, {name}"] = shares(_run(plain), settings.device)


def one_video(report: Report, settings: Settings, shape: Shape) -> None:
    """Rows of a whole video of `settings.video_steps` steps."""
    name = f"{shape.name}, {settings.video_steps} steps"
    report.shapes[name] = shape.described
    state = random_state(shape.config, settings.device, settings.dtype)
    scene = Scene(shape, state, settings.video_steps)
    entries = [
        Entry(film.name, None, note=film.reason)
        if isinstance(film, Missing)
        else Entry(film.name, film.run, film.attention, film.compiled, film.note)
        for film in films(scene, _of_hosts(settings, shape, state))
    ]
    report.rows += contest("video", name, entries, settings, DIFFUSERS)


def one_prefill(report: Report, settings: Settings, shape: Prefill) -> None:
    """Rows of the language model's part."""
    name = f"{shape.name}, {shape.tokens} tokens"
    name += f", an answer of {shape.answer}" if shape.answer else ", no answer"
    config = shape.config
    report.shapes[name] = f"{config.num_hidden_layers} layers, width {config.hidden_size}"
    reader = Reader(shape, settings.device, settings.dtype)
    entries = [Entry(SEPARATE, reader.separate), Entry("one shared prefill", reader.shared)]
    report.rows += contest("prefill", name, entries, settings, SEPARATE)


def _of_hosts(settings: Settings, shape: Shape, state: Any) -> list[Model | Missing]:
    return [model for build in settings.hosts for model in build(shape, state)]


def _entry(model: Model | Missing, given: tuple[Tensor, ...]) -> Entry:
    described = {"attention": model.attention, "compiled": model.compiled}
    if isinstance(model, Missing):
        return Entry(model.name, None, note=model.reason, **described)
    return Entry(model.name, lambda: model.predict(*given), note=model.note, **described)


def contest(
    kind: str,
    shape: str,
    entries: Sequence[Entry],
    settings: Settings,
    reference: str,
    flops: int | None = None,
    clock: measure.Clock = time.perf_counter,
) -> list[Row]:
    """Each entry tried once, then all that work by turns. Ratios are to the first entry named `reference`, or
    to the first that works where that one does not."""
    outputs, rows, working = _tried(kind, shape, entries, reference)
    if not working:
        return rows
    first = next((i for i, entry in enumerate(working) if entry.name == reference), 0)
    peaks = [measure.peak_bytes(_run(entry), settings.device) for entry in working]
    times = measure.alternate(
        [_run(entry) for entry in working],
        settings.repeats,
        settings.warmup,
        clock=clock,
        synchronize=measure.synchronizer(settings.device),
        deadline=_on(clock, settings.deadline),
    )
    for entry, output, seconds, peak in zip(working, outputs, times, peaks, strict=True):
        largest, relative = measure.difference(output, outputs[first])
        spread = measure.Spread.of(seconds)
        rows.append(
            Row(
                kind,
                shape,
                entry.name,
                working[first].name,
                entry.attention,
                entry.compiled,
                seconds=spread,
                ratio=measure.ratios(seconds, times[first]),
                tflops=flops / spread.median / 1e12 if flops else None,
                peak_mb=peak / 1e6 if peak is not None else None,
                difference=relative,
                largest=largest,
                note=entry.note,
            )
        )
    return rows


def _tried(
    kind: str, shape: str, entries: Sequence[Entry], reference: str
) -> tuple[list[Tensor], list[Row], list[Entry]]:
    """(outputs of those that work, rows of those that do not, those that work)."""
    outputs, rows, working = [], [], []
    for entry in entries:
        try:
            outputs.append(_run(entry)())
            working.append(entry)
        except Exception as error:  # noqa: BLE001  no kernel, no memory, no compiler: a row that says so
            note = entry.note if entry.run is None else reason(error)
            rows.append(Row(kind, shape, entry.name, reference, entry.attention, entry.compiled, note=note))
    return outputs, rows, working


def _run(entry: Entry) -> measure.Run:
    if entry.run is None:
        raise RuntimeError(entry.note)
    return entry.run


def _on(clock: measure.Clock, deadline: float) -> float:
    """A deadline of time.monotonic, on another clock."""
    return deadline if deadline == float("inf") else clock() + deadline - time.monotonic()


def _release(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
