"""Runs of the data pipeline: resuming, changed inputs, crashes, plug-ins, written clips, the command."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from mimir_core.data.__main__ import main
from mimir_core.data.clips import read_index, read_kept
from mimir_core.data.config import DataConfig, Output, Scoring
from mimir_core.data.prepare import Where, prepare
from mimir_core.data.video import read_frames

Make = Callable[..., Path]
SETTINGS = {
    "shots": {"detector": "none"},
    "basic": {"min_width": 96, "min_height": 96, "max_seconds": 2.0},
    "output": {"buckets": [[17, 96, 160]], "examples": 2},
}
CONFIG = DataConfig.from_dict(SETTINGS)


def moving(seed: int, count: int) -> Iterator[np.ndarray]:
    coarse = np.random.default_rng(seed).integers(40, 220, (12, 40, 3), dtype=np.uint8)
    large = coarse.repeat(16, axis=0).repeat(16, axis=1)
    return (np.roll(large, (-index, -3 * index), (0, 1))[:96, :160] for index in range(count))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_video: Make) -> Path:
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("a", "b", "c")):
        make_video(root / f"{name}.mp4", moving(seed, 60 + 40 * seed), sound=False)
        (root / f"{name}.txt").write_text(f"colours of {name}\n", encoding="utf-8")
    return root


@pytest.fixture
def videos(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "videos"))


class Count:
    """Progress that remembers how many pieces of each kind were worked on."""

    def __init__(self) -> None:
        self.work: dict[str, int] = {}

    def __call__(self, kind: str, done: int, total: int) -> None:
        self.work[kind] = self.work.get(kind, -1) + 1

    def done(self) -> dict[str, int]:
        return {kind: count for kind, count in self.work.items() if count}


def run(videos: Path, out: Path, config: DataConfig = CONFIG, **where: Any) -> dict[str, int]:
    count = Count()
    prepare(videos, out, config, Where(**where), count)
    return count.done()


def kept(out: Path) -> list[tuple[str, float, str]]:
    return [(clip.file, clip.start, verdict.caption) for clip, verdict, _ in read_kept(out)]


def test_a_second_run_does_nothing_again(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(videos, out) == {"probe": 3, "shots": 3, "judge": 7}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    text = (out / "clips.jsonl").read_bytes()
    assert run(videos, out) == {}
    assert (out / "clips.jsonl").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")} == before


def test_changes_are_noticed_where_they_matter(videos: Path, tmp_path: Path, make_video: Make) -> None:
    out = tmp_path / "out"
    run(videos, out)
    brighter = replace(CONFIG, quality=replace(CONFIG.quality, min_brightness=0.2))
    assert run(videos, out, brighter) == {"judge": 7}, "a limit: no video is decoded whole again"
    (videos / "b.txt").write_text("something else", encoding="utf-8")
    assert run(videos, out, brighter) == {"judge": 2}, (
        "a caption: the clips of that video (4 s in pieces of 2)"
    )
    make_video(videos / "a.mp4", moving(7, 60), sound=False)
    assert run(videos, out, brighter) == {"probe": 1, "shots": 1, "judge": 2}
    (videos / "c.mp4").unlink()
    assert run(videos, out, brighter) == {}
    assert {name for name, _, _ in kept(out)} == {"a.mp4", "b.mp4"}
    assert ("b.mp4", 0.0, "something else") in kept(out)


def test_a_killed_run_continues(videos: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(videos, whole)

    class Killed(Exception):
        pass

    def kill(kind: str, done: int, total: int) -> None:
        if (kind, done) == ("judge", 3):
            raise Killed

    with pytest.raises(Killed):
        prepare(videos, out, CONFIG, progress=kill)
    with open(out / "journal.jsonl", "ab") as journal:
        journal.write(b'0123456789abcdef d {"half a li')
    assert run(videos, out) == {"judge": 4}
    for name in ("clips.jsonl", "summary.json", "sheets/kept.jpg"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_journal_forgets_what_nothing_needs(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for level in (0.2, 0.15, 0.12):
        run(videos, out, replace(CONFIG, quality=replace(CONFIG.quality, min_brightness=level)))
    lines = len((out / "journal.jsonl").read_text().splitlines())
    assert lines <= 2 * (3 + 3 + 7)
    assert run(videos, out, replace(CONFIG, quality=replace(CONFIG.quality, min_brightness=0.12))) == {}


PLUGINS = '''
import os
import numpy as np

def crash(clip, frames):
    if clip.file == "b.mp4":
        os._exit(3)
    return 1.0

def fail(clip, frames):
    raise KeyError("no such thing")

class Middle:
    """Made with its section of the configuration."""
    def __init__(self, section):
        self.limit = section.limit
    def __call__(self, clip, frames):
        assert frames.images.dtype == np.uint8 and len(frames.images) == len(frames.times)
        return self.limit + (1 if clip.file == "a.mp4" else -1)

def shout(clip, frames):
    return clip.text.upper() + f" ({len(frames.images)} frames)"
'''


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{abs(hash(str(tmp_path))) % 10**8}"
    (tmp_path / f"{name}.py").write_text(PLUGINS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def with_scorer(plugin: str, limit: float = 0.5) -> DataConfig:
    return replace(CONFIG, aesthetic=Scoring(limit, plugin))


def test_plugins_of_ones_own(videos: Path, tmp_path: Path, plugins: str) -> None:
    config = with_scorer(f"{plugins}:Middle")
    config = replace(config, captions=replace(config.captions, plugin=f"{plugins}:shout"))
    run(videos, tmp_path / "out", config)
    assert kept(tmp_path / "out") == [("a.mp4", 0.0, "COLOURS OF A (8 frames)")]
    file = tmp_path / f"{plugins}.py"
    file.write_text(PLUGINS.replace("upper", "lower"), encoding="utf-8")
    assert run(videos, tmp_path / "out", config) == {"judge": 7}, "changed code is a changed configuration"


def test_a_crash_costs_one_clip(videos: Path, tmp_path: Path, plugins: str) -> None:
    out = tmp_path / "out"
    run(videos, out, with_scorer(f"{plugins}:crash"), workers=2)
    stages = {(entry["file"], entry["stage"]) for entry in read_index(out) if entry["measure"] != "seconds"}
    assert stages == {("a.mp4", "kept"), ("b.mp4", "read"), ("c.mp4", "kept")}
    assert any("crashed" in entry["reason"] for entry in read_index(out))
    assert run(videos, out, with_scorer(f"{plugins}:crash"), workers=1) == {"judge": 2}, (
        "crashes are tried again"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plugin_that_fails_stops_the_run(videos: Path, tmp_path: Path, plugins: str, workers: int) -> None:
    with pytest.raises(ValueError, match="aesthetic plug-in failed on a.mp4 at 0 s: KeyError"):
        run(videos, tmp_path / "out", with_scorer(f"{plugins}:fail"), workers=workers)


@pytest.mark.parametrize(
    ("plugin", "said"),
    [
        ("nice", "expected none, plain, transformers, or package.module:attribute"),
        ("no_such_module:f", "cannot be imported"),
        ("json:no_such_name", "cannot be imported"),
        ("transformers", "expected a local folder"),
    ],
)
def test_plugins_that_are_not_there(videos: Path, tmp_path: Path, plugin: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(videos, tmp_path / "out", with_scorer(plugin))
    assert not (tmp_path / "out").exists()


def writing(**settings: Any) -> DataConfig:
    return replace(CONFIG, output=replace(CONFIG.output, write_clips=True, **settings))


def test_written_clips(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(videos, out, writing())["write"] == 5
    for clip, verdict, name in read_kept(out):
        path = out / name
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == verdict.caption
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 8
        assert verdict.bucket is not None
        expected = read_frames(videos / clip.file, clip.start, clip.end, verdict.bucket, 8.0)
        assert np.shape(frames) == expected.shape == (17, 96, 160, 3)
        assert np.abs(np.stack(frames).astype(int) - expected).mean() < 4
    names = sorted(path.name for path in (out / "clips").iterdir())
    (out / "clips" / names[0]).unlink()
    (out / "clips" / "mine.mp4").write_bytes(b"not ours")
    assert run(videos, out, writing()) == {"write": 1}
    assert sorted(path.name for path in (out / "clips").iterdir()) == sorted([*names, "mine.mp4"])
    (videos / "c.mp4").unlink()
    run(videos, out, writing())
    left = sorted(path.name for path in (out / "clips").iterdir())
    assert left == sorted([*(name for name in names if name[0] != "c"), "mine.mp4"])


def test_a_codec_that_is_not_there_is_refused(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which this PyAV cannot write"):
        run(videos, tmp_path / "out", writing(codec="no_such_codec"))


def test_a_list_of_files_and_an_output_inside_the_folder(videos: Path, tmp_path: Path) -> None:
    (videos / "list.txt").write_text(f"# two\nb.mp4\n{videos / 'a.mp4'}\n", encoding="utf-8")
    run(videos / "list.txt", tmp_path / "out")
    files = [entry["file"] for entry in read_index(tmp_path / "out")]
    assert set(files) == {"b.mp4", (videos / "a.mp4").as_posix()}
    (videos / "list.txt").unlink()
    for _ in range(2):
        run(videos, videos / "result", writing())
    assert {entry["file"] for entry in read_index(videos / "result")} == {"a.mp4", "b.mp4", "c.mp4"}
    with pytest.raises(ValueError, match="neither a folder of videos"):
        run(videos / "nothing", tmp_path / "out")


@pytest.mark.parametrize(("package", "where"), [("scenedetect", {}), ("ray", {"ray": "local"})])
def test_what_is_not_installed_is_named(
    package: str, where: dict[str, str], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    config = DataConfig() if package == "scenedetect" else CONFIG
    with pytest.raises(ValueError, match="Install it: pip install"):
        run(videos, tmp_path / "out", config, **where)


def test_the_command(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(json.dumps(SETTINGS), encoding="utf-8")
    given = ["--videos", str(videos), "--out", str(out), "--config", str(config), "--workers", "0"]
    assert main([*given, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "new or changed files             3" in told and "c.mp4" in told and '"max_seconds": 2.0' in told
    assert not out.exists()
    assert main(given) == 0
    told = capsys.readouterr().out
    assert "judging clips        7 of 7" in told and "kept              5" in told
    assert main([*given, "--dry-run"]) == 0
    assert "new or changed files             0" in capsys.readouterr().out
    config.write_text('{"basic": {"min_widht": 3}}', encoding="utf-8")
    assert main(given) == 2
    assert "did you mean 'min_width'?" in capsys.readouterr().err


def test_the_shown_config_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show-config"]) == 0
    (tmp_path / "config.json").write_text(capsys.readouterr().out, encoding="utf-8")
    assert DataConfig.read_json(tmp_path / "config.json") == DataConfig()


def test_nothing_imports_torch(tmp_path: Path) -> None:
    """A worker starts in a fraction of a second, and a decoder's machine needs no PyTorch."""
    code = "import sys, mimir_core.data.prepare, mimir_core.data.__main__; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True)


def test_output_and_limits_must_fit() -> None:
    with pytest.raises(ValueError, match="raise min_seconds or add a shorter bucket"):
        DataConfig(output=Output(buckets=((49, 480, 720),)))
