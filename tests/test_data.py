"""The data pipeline on videos that are made here: every file ends where its construction says."""

from __future__ import annotations

import json
import os
import struct
import wave
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimir_core.data import video as reading
from mimir_core.data.clips import read_index, read_kept
from mimir_core.data.config import Captions, DataConfig, Scoring
from mimir_core.data.prepare import Where, prepare

Make = Callable[..., Path]
HEIGHT, WIDTH = 96, 160
SETTINGS = {
    "basic": {"min_width": 96, "min_height": 96, "min_aspect": 1.2, "max_seconds": 4.125},
    "output": {"buckets": [[33, 96, 160], [17, 96, 160]], "examples": 3},
}
CONFIG = DataConfig.from_dict(SETTINGS)


def texture(seed: int, height: int, width: int) -> np.ndarray:
    """A smooth coloured picture with some detail, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3)) + rng.integers(60, 196, 3)
    for cells, strength in ((6, 120), (24, 48), (64, 28)):
        noise = rng.integers(0, 256, (cells, 2 * cells, 3), dtype=np.uint8)
        large = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(large) / 255 - 0.5) * strength
    return total.clip(16, 240).astype(np.uint8)


def scene(
    seed: int, count: int, height: int = HEIGHT, width: int = WIDTH, speed: int = 3
) -> Iterator[np.ndarray]:
    """A camera that moves over a texture."""
    large = texture(seed, 2 * height, 4 * width)
    return (np.roll(large, (-index, -speed * index), (0, 1))[:height, :width] for index in range(count))


def letterbox(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for frame in frames:
        frame = frame.copy()
        frame[:12] = frame[-12:] = 0
        yield frame


def watermark(frames: Iterator[np.ndarray], opacity: float = 1.0) -> Iterator[np.ndarray]:
    """Some white letters in the upper right corner."""
    letters = np.kron(np.random.default_rng(9).random((3, 7)) > 0.5, np.ones((4, 4))) > 0
    for frame in frames:
        frame = frame.copy()
        corner = frame[4:16, WIDTH - 32 : WIDTH - 4]
        corner[letters] = (corner[letters] * (1 - opacity) + 255 * opacity).astype(np.uint8)
        yield frame


def turned(path: Path, target: Path, matrix: tuple[int, int, int, int]) -> Path:
    """A copy whose header asks players to apply (a, b, c, d), as a phone writes it."""
    data = path.read_bytes()
    at = data.find(b"tkhd") + 44  # of the first track, the video: version 0
    a, b, c, d = (value << 16 for value in matrix)
    target.write_bytes(data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :])
    return target


def cut(path: Path, target: Path, share: float) -> Path:
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


VARIABLE = np.cumsum(np.where(np.arange(75) % 3, 0.03, 0.08))

# file -> (stage, what was measured, note) of each of its entries
EXPECTED: dict[str, list[tuple[str, str, str]]] = {
    "black.mp4": [("quality", "black_frames", "")],
    "cuts.mp4": [("basic", "seconds", "")] * 5,
    "dark.mp4": [("quality", "brightness", "")],
    "empty.mp4": [("read", "", "")],
    "fast.mp4": [("kept", "", "")],
    "flat.mp4": [("aesthetic", "aesthetic", "")],
    "good/one.mp4": [("kept", "", "")],
    "good/three shots.mp4": [("kept", "", ""), ("basic", "seconds", ""), ("kept", "", "")],
    "good/long.mp4": [("kept", "", ""), ("kept", "", "")],
    "half.mkv": [("read", "decoded", "")],
    "headless.mp4": [("read", "", "")],
    "letterbox.mp4": [("quality", "black_area", "")],
    "nocaption.mp4": [("caption", "characters", "")],
    "oneframe.mp4": [("read", "frames", "")],
    "picture.mp4": [("read", "", "")],
    "portrait.mp4": [("basic", "aspect", "rotated by 90 degrees")],
    "silent.mp4": [("kept", "", "no sound")],
    "slow.mp4": [("basic", "fps", "")],
    "small.mp4": [("basic", "width", "")],
    "sound.wav": [("read", "", "")],
    "text.mp4": [("read", "", "")],
    "turned.mp4": [("kept", "", "rotated by 270 degrees")],
    "variable.mkv": [("kept", "", "variable frame rate")],
    "watermark.mp4": [("watermark", "watermark", "")],
}


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory, make_video: Make) -> Path:
    root = tmp_path_factory.mktemp("videos")
    (root / "good").mkdir()
    good = make_video(root / "good" / "one.mp4", scene(1, 75))
    shots = [*scene(2, 75), *scene(3, 25), *scene(4, 60)]
    make_video(root / "good" / "three shots.mp4", shots)
    make_video(root / "good" / "long.mp4", scene(5, 170))
    make_video(root / "black.mp4", np.zeros((60, HEIGHT, WIDTH, 3), np.uint8))
    make_video(root / "cuts.mp4", (frame for seed in range(10, 15) for frame in scene(seed, 25)))
    make_video(root / "dark.mp4", ((frame * 0.15 + 4).astype(np.uint8) for frame in scene(6, 60)))
    make_video(root / "fast.mp4", scene(7, 150, speed=1), fps=60)
    make_video(root / "flat.mp4", (np.full((HEIGHT, WIDTH, 3), 110 + i // 10, np.uint8) for i in range(60)))
    make_video(root / "letterbox.mp4", letterbox(scene(8, 60)))
    make_video(root / "nocaption.mp4", scene(9, 60))
    make_video(root / "oneframe.mp4", scene(1, 1))
    make_video(root / "silent.mp4", scene(20, 60), sound=False)
    make_video(root / "slow.mp4", scene(21, 20), fps=5)
    make_video(root / "small.mp4", scene(22, 60, height=64, width=80))
    make_video(root / "variable.mkv", scene(23, 75), times=VARIABLE)
    make_video(root / "watermark.mp4", watermark(scene(24, 60)))
    upright = make_video(root / "upright.mp4", (np.rot90(frame, -1) for frame in scene(25, 60)))
    turned(upright, root / "turned.mp4", (0, -1, 1, 0))
    turned(good, root / "portrait.mp4", (0, 1, -1, 0))
    upright.unlink()
    cut(make_video(root / "whole.mkv", scene(26, 100)), root / "half.mkv", 0.5)
    cut(root / "whole.mkv", root / "headless.mp4", 0.0)
    (root / "whole.mkv").unlink()
    not_videos(root, good)
    return root


def not_videos(root: Path, good: Path) -> None:
    """The rest of the files, and captions for all but one."""
    cut(good, root / "headless.mp4", 0.5)  # the index of this kind of file is at its end
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("This is no video.\n" * 50, encoding="utf-8")
    Image.fromarray(texture(1, HEIGHT, WIDTH)).save(root / "picture.png")
    os.replace(root / "picture.png", root / "picture.mp4")
    with wave.open(str(root / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    (root / ".hidden.mp4").write_bytes(b"never looked at")
    told = {name: f"a camera moves over {Path(name).stem}" for name in EXPECTED if name != "nocaption.mp4"}
    (root / "captions.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.fixture(scope="session")
def finished(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    prepare(videos, out, CONFIG)
    return out


def test_every_file_ends_where_its_construction_says(finished: Path) -> None:
    found: dict[str, list[tuple[str, str, str]]] = {}
    for entry in read_index(finished):
        told = (entry["stage"], entry["measure"], "; ".join(entry["notes"]))
        found.setdefault(entry["file"], []).append(told)
    assert found == EXPECTED
    assert list(found) == sorted(found)


def test_every_rejection_says_why(finished: Path) -> None:
    for entry in read_index(finished):
        if entry["stage"] == "kept":
            assert (
                entry["reason"] == ""
                and entry["caption"] == f"a camera moves over {Path(entry['file']).stem}"
            )
        else:
            assert len(entry["reason"]) > 10 and entry["caption"] == "", entry
        if entry["measure"]:
            least = entry["value"] < entry["limit"]
            assert ("the least" in entry["reason"]) == least or entry["measure"] in ("decoded", "characters")


def test_clips_are_the_shots(finished: Path) -> None:
    times = {}
    for clip, verdict, _ in read_kept(finished):
        times.setdefault(clip.file, []).append((clip.start, clip.end, verdict.bucket))
    assert times["good/three shots.mp4"] == [(0.0, 3.0, (17, 96, 160)), (4.0, 6.4, (17, 96, 160))]
    assert times["good/long.mp4"] == [(0.0, 4.125, (33, 96, 160)), (4.125, 6.8, (17, 96, 160))]
    assert times["fast.mp4"] == [(0.0, 2.5, (17, 96, 160))]


def test_the_summary_adds_up(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    entries = list(read_index(finished))
    left = len(entries)
    for stage in summary["stages"].values():
        assert stage["judged"] == left and sum(stage["reasons"].values()) == stage["rejected"]
        left -= stage["rejected"]
    assert left == summary["kept"] == sum(entry["stage"] == "kept" for entry in entries)
    assert summary["files"] == len(EXPECTED) and summary["problems"] == []


def test_every_stage_that_saw_a_picture_has_a_sheet(finished: Path) -> None:
    sheets = {path.stem for path in (finished / "sheets").iterdir()}
    assert sheets == {"read", "basic", "quality", "aesthetic", "watermark", "caption", "kept"}
    for path in (finished / "sheets").iterdir():
        with Image.open(path) as page:
            assert page.height > 160 and np.asarray(page).std() > 5


def same(one: Path, other: Path) -> None:
    names = ["clips.jsonl", "summary.json", *(f"sheets/{path.name}" for path in (one / "sheets").iterdir())]
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_two_processes_give_the_same(videos: Path, finished: Path, tmp_path: Path) -> None:
    prepare(videos, tmp_path, CONFIG, Where(workers=2))
    same(finished, tmp_path)


CRASH = """
import os

def crash(clip, frames):
    if clip.file.endswith("fast.mp4"):
        os._exit(3)
    return 1.0
"""


def test_ray_gives_the_same(
    videos: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that crashes its process costs one clip there too; Ray alone would try it for ever."""
    import ray

    (tmp_path / "crashing.py").write_text(CRASH, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    few = tmp_path / "few.txt"
    few.write_text(f"{videos / 'fast.mp4'}\n{videos / 'silent.mp4'}\n", encoding="utf-8")
    crashing = replace(CONFIG, aesthetic=Scoring(0.5, "crashing:crash"), captions=Captions("none", False))
    where = Where(workers=1, ray="local")
    try:
        prepare(videos, tmp_path / "out", CONFIG, where)
        prepare(few, tmp_path / "few", crashing, where)
    finally:
        ray.shutdown()
    same(finished, tmp_path / "out")
    found = [(Path(entry["file"]).name, entry["stage"]) for entry in read_index(tmp_path / "few")]
    assert found == [("fast.mp4", "read"), ("silent.mp4", "kept")]


def test_read_frames_is_the_picture_on_screen(videos: Path) -> None:
    """Against the texture that the video was made of: frame i shows what was on screen at start + i / fps."""
    made = np.stack(list(scene(5, 170)))
    frames = reading.read_frames(videos / "good" / "long.mp4", 4.125, 6.8, (17, 96, 160), 8.0)
    assert frames.shape == (17, 96, 160, 3)
    shown = [min(int((4.125 + i / 8) * 25 + 1e-6), 169) for i in range(17)]
    shown[0] = 104  # the first frame of the clip: 4.125 s lies between two frames
    errors = [np.abs(frame.astype(int) - made[index]).mean() for frame, index in zip(frames, shown)]
    assert max(errors) < 6
    wrong = [np.abs(frame.astype(int) - made[index - 1]).mean() for frame, index in zip(frames, shown)]
    assert min(wrong) > 2 * max(errors)
