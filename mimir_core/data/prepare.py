"""The pipeline: finds, probes, cuts, judges and, if asked to, writes; each piece of work once.

journal.jsonl    what is finished (journal.py); a second run starts from it
clips.jsonl      every clip and every rejected file, one a line, in order
summary.json     counts and reasons
sheets/*.jpg     example frames per stage
clips/*          written clips and their captions, if output.write_clips
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import report
from .captions import Notes, caption_for, read_notes
from .clips import KEPT, Clip, Verdict, entry, from_dict
from .config import DataConfig
from .journal import Journal
from .judge import judge_scan, judge_size
from .plugins import check_plugins, signature
from .shots import Scan, check_detector, pieces
from .sources import Source, Sources, find
from .work import Task, Worker, make_task
from .workers import check_ray, run_local, run_ray
from .write import check_codec, write_text

Progress = Callable[[str, int, int], None]  # kind of work, done, of how many
LONG = 3600.0  # seconds from which a file is noted as long


def silent(kind: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class Where:
    """Where the work is done: `workers` processes (0: this one), or Ray ("local" or a cluster's address)."""

    workers: int = 0
    ray: str = ""


class Run:
    """One run's files, journal and the keys of the work that its result is made of."""

    def __init__(self, worker: Worker, journal: Journal, where: Where, progress: Progress) -> None:
        self.worker, self.journal, self.where, self.progress = worker, journal, where, progress
        self.used: dict[str, None] = {}

    def finish(self, tasks: Sequence[Task]) -> None:
        """Do what is not in the journal yet."""
        self.used.update(dict.fromkeys(task.key for task in tasks))
        missing = [task for task in tasks if task.key not in self.journal]
        done = len(tasks) - len(missing)
        if tasks:
            self.progress(tasks[0].kind, done, len(tasks))
        for task, result in self._results(missing):
            self.journal.put(task.key, result, retry=result.get("retry", False))
            done += 1
            self.progress(task.kind, done, len(tasks))

    def _results(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        if not tasks:
            return iter(())
        if self.where.ray:
            return run_ray(self.worker, tasks, self.where.workers, self.where.ray)
        return run_local(self.worker, tasks, self.where.workers)

    def result(self, task: Task) -> dict[str, Any]:
        return self.journal[task.key]


@dataclass(frozen=True)
class File:
    """A file after it was decoded: either its scan, or the verdict that rejects all of it."""

    source: Source
    whole: Clip
    title: str = ""
    scan: Scan | None = None
    verdict: Verdict | None = None

    @property
    def state(self) -> list[int]:
        return [self.source.size, self.source.changed]


Judged = tuple[File, Clip, Verdict]


def prepare(
    videos: Path, out: Path, config: DataConfig, where: Where | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Run what is not finished and write the report; returns the summary. ValueError for what the user can
    put right: paths, settings, packages that are not installed, plug-ins that fail."""
    where = where or Where()
    check(config, where)
    sources = find(videos, out)
    notes = read_notes(sources.root, (source.file for source in sources.videos), sources.others)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    with Journal(out / "journal.jsonl") as journal:
        run = Run(Worker(str(sources.root), str(out.resolve()), config), journal, where, progress)
        judged = judge_files(run, scan_files(run, sources), notes)
        written = write_clips(run, judged) if config.output.write_clips else {}
        journal.compact(run.used)
    return report.write(out, sources.root, entries(judged, written), notes.problems, config)


def check(config: DataConfig, where: Where) -> None:
    """ValueError for what would fail later."""
    check_detector(config.shots)
    check_plugins(config)
    if config.output.write_clips:
        check_codec(config.output)
    if where.ray:
        check_ray()


def scan_files(run: Run, sources: Sources) -> list[File]:
    """Probe all, then decode those whole whose size is right; in order."""
    probes = [probe_task(source) for source in sources.videos]
    run.finish(probes)
    files = [_probed(source, run.result(task), run) for source, task in zip(sources.videos, probes)]
    scans = {file.source.file: scan_task(file, run.worker.config) for file in files if file.verdict is None}
    run.finish(list(scans.values()))
    return [
        _scanned(file, run.result(scans[file.source.file]), run) if file.verdict is None else file
        for file in files
    ]


def probe_task(source: Source) -> Task:
    return make_task("probe", {"file": source.file}, [source.size, source.changed])


def scan_task(file: File, config: DataConfig) -> Task:
    return make_task("shots", {"file": file.source.file}, [file.state, asdict(config.shots)])


def _unreadable(reason: str) -> Verdict:
    return Verdict("read", reason)


def _probed(source: Source, probe: dict[str, Any], run: Run) -> File:
    if "error" in probe:
        return File(source, Clip(source.file, 0.0, 0.0, 0, 0, 0.0), verdict=_unreadable(probe["error"]))
    notes = [probe["turn"], "" if probe["sound"] else "no sound"]
    kept = tuple(note for note in notes if note)
    whole = Clip(source.file, 0.0, probe["seconds"], probe["width"], probe["height"], 0.0, notes=kept)
    verdict = judge_size(whole.width, whole.height, run.worker.config.basic)
    return File(source, whole, probe["title"], verdict=verdict)


def _scanned(file: File, found: dict[str, Any], run: Run) -> File:
    if "error" in found:
        return replace(file, verdict=_unreadable(found["error"]))
    scan = from_dict(Scan, found)
    verdict = judge_scan(scan, file.whole.end or None, run.worker.config.read)
    notes = list(file.whole.notes)
    if scan.variable_rate:
        notes.append("variable frame rate")
    if scan.seconds >= LONG:
        notes.append(f"long: {scan.seconds / 3600:.1f} hours")
    whole = replace(file.whole, end=scan.seconds, fps=scan.fps, notes=tuple(notes))
    return replace(file, whole=whole, scan=scan, verdict=verdict)


def judge_files(run: Run, files: Sequence[File], notes: Notes) -> list[Judged]:
    """Every clip of every file, and every rejected file as one clip; in order."""
    clips = [(file, clip) for file in files for clip in _clips(file, run.worker.config, notes)]
    depends = _judge_settings(run.worker.config)
    tasks = {
        index: make_task("judge", asdict(clip), [file.state, depends])
        for index, (file, clip) in enumerate(clips)
        if file.verdict is None
    }
    run.finish(list(tasks.values()))
    return [
        (file, clip, file.verdict or _verdict(run.result(tasks[index])))
        for index, (file, clip) in enumerate(clips)
    ]


def _clips(file: File, config: DataConfig, notes: Notes) -> list[Clip]:
    if file.scan is None or file.verdict is not None:
        return [file.whole]
    told = notes.of.get(file.source.file, [])
    clips = []
    for start, end in pieces(file.scan, config.basic.max_seconds):
        text, source = caption_for(told, file.title, start, end)
        clips.append(replace(file.whole, start=start, end=end, text=text, text_source=source))
    return clips


def _judge_settings(config: DataConfig) -> list[Any]:
    scored = [config.aesthetic, config.watermark, config.captions]
    signed = [[asdict(section), signature(section)] for section in scored]
    buckets = [config.output.buckets, config.output.fps]
    return [asdict(config.basic), asdict(config.quality), signed, buckets]


def _verdict(result: dict[str, Any]) -> Verdict:
    return _unreadable(result["error"]) if "error" in result else from_dict(Verdict, result)


def write_clips(run: Run, judged: Sequence[Judged]) -> dict[int, dict[str, Any]]:
    """Files of the kept clips, and captions beside them: index in `judged` -> {"clip": name} or an error."""
    tasks = {
        index: _write_task(file, clip, verdict, run.worker.config)
        for index, (file, clip, verdict) in enumerate(judged)
        if verdict.stage == KEPT
    }
    out = Path(run.worker.out)
    for task in tasks.values():
        if task.key in run.journal and not _complete(out / task.values["name"], run.result(task)):
            run.journal.forget(task.key)
    run.finish(list(tasks.values()))
    written = {}
    for index, task in tasks.items():
        result, name = run.result(task), task.values["name"]
        written[index] = {"error": result["error"]} if "error" in result else {"clip": name}
        if "error" not in result:
            write_text((out / name).with_suffix(".txt"), judged[index][2].caption)
    return written


def _complete(path: Path, result: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == result.get("bytes")


def _write_task(file: File, clip: Clip, verdict: Verdict, config: DataConfig) -> Task:
    output = config.output
    window = {"file": clip.file, "start": clip.start, "end": clip.end, "bucket": verdict.bucket}
    form = [window, output.fps, output.codec, output.crf]
    mark = hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()[:10]
    stem = "".join(letter if letter.isalnum() else "_" for letter in Path(clip.file).stem)[:40]
    values = {**window, "name": f"clips/{stem}-{mark}.mp4"}
    return make_task("write", values, [file.state, form])


def entries(judged: Sequence[Judged], written: dict[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The lines of the index. A kept clip that could not be written after all is rejected with the reason."""
    for index, (_, clip, verdict) in enumerate(judged):
        result = written.get(index, {})
        if "error" in result:
            verdict = replace(verdict, stage="read", reason=result["error"], caption="", bucket=None)
        yield {**entry(clip, verdict), **({"clip": result["clip"]} if "clip" in result else {})}


def plan(videos: Path, out: Path, config: DataConfig, where: Where) -> dict[str, Any]:
    """What `prepare` would do, without doing or writing any of it: how many files, how much of it is done."""
    check(config, where)
    sources = find(videos, out)
    names = [source.file for source in sources.videos]
    notes = read_notes(sources.root, names, sources.others)
    done = Journal.keys(out / "journal.jsonl")
    probed = sum(probe_task(source).key in done for source in sources.videos)
    return {
        "files": len(names),
        "bytes": sum(max(source.size, 0) for source in sources.videos),
        "captioned files": len(notes.of),
        "files known from an earlier run": probed,
        "new or changed files": len(names) - probed,
        "problems": notes.problems,
        "names": names,
    }
