"""Decoding, shots and measurements of the data pipeline, against the frames that the videos are made of."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mimir_core.data import measure
from mimir_core.data.captions import caption_for, read_notes
from mimir_core.data.clips import Clip, Frames
from mimir_core.data.config import DataConfig
from mimir_core.data.judge import bucket, judge, sample_times
from mimir_core.data.plugins import load_plugins
from mimir_core.data.prepare import prepare
from mimir_core.data.shots import Scan, Shots, pieces, scan
from mimir_core.data.video import TURNS, Unreadable, cover, read_frames, read_times, timed

Make = Callable[..., Path]


def grey(levels: Iterator[int] | range | list[int], size: tuple[int, int] = (48, 64)) -> Iterator[np.ndarray]:
    """Flat frames: what is decoded says which frame it is."""
    return (np.full((*size, 3), level, np.uint8) for level in levels)


def levels(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean())) for frame in frames]


LEVELS = [20 + 5 * (index % 43) for index in range(120)]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, make_video: Make) -> Path:
    colon = "" if os.name == "nt" else ":"  # FFmpeg must not take what is before it for a protocol
    return make_video(tmp_path_factory.mktemp("steps") / f"steps{colon} 100%.mp4", grey(LEVELS), sound=False)


# --- the picture -----------------------------------------------------------------------------------------


def corners() -> np.ndarray:
    """(48, 64, 3): every corner another colour."""
    image = np.full((48, 64, 3), 90, np.uint8)
    image[:24, :32], image[:24, 32:], image[24:, :32] = (220, 30, 30), (30, 220, 30), (30, 30, 220)
    return image


@pytest.mark.parametrize("matrix", TURNS, ids=str)
def test_every_display_matrix(matrix: tuple[int, int, int, int], tmp_path: Path, make_video: Make) -> None:
    """x' = a x + c y, y' = b x + d y: applied to the picture by indices, it is what the reader shows."""
    image = corners()
    data = make_video(tmp_path / "plain.mp4", [image] * 5, sound=False).read_bytes()
    at = data.find(b"tkhd") + 44
    a, b, c, d = matrix
    fields = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data[:at] + struct.pack(">9i", *fields) + data[at + 36 :])
    ys, xs = np.mgrid[:48, :64]
    to_x, to_y = a * xs + c * ys, b * xs + d * ys
    expected = np.zeros_like(image if a else image.transpose(1, 0, 2))
    expected[to_y - to_y.min(), to_x - to_x.min()] = image
    shown = read_times(path, 0.0, 1.0, [0.0], 64)[0]
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).mean() < 6


def test_a_slanted_display_matrix_is_refused(tmp_path: Path, make_video: Make) -> None:
    data = make_video(tmp_path / "plain.mp4", [corners()] * 5, sound=False).read_bytes()
    at = data.find(b"tkhd") + 44
    path = tmp_path / "slanted.mp4"
    path.write_bytes(data[:at] + struct.pack(">5i", 46341, 46341, 0, -46341, 46341) + data[at + 20 :])
    with pytest.raises(Unreadable, match="not a turn by a multiple of 90 degrees"):
        scan(path, Shots("none"))


def test_wide_pixels_are_shown_square(tmp_path: Path) -> None:
    path = tmp_path / "anamorphic.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        for image in grey([90] * 5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    assert read_times(path, 0.0, 1.0, [0.0], 256).shape == (1, 48, 128, 3)


def test_frames_cover_the_bucket_and_lose_only_the_edges(tmp_path: Path, make_video: Make) -> None:
    path = make_video(tmp_path / "wide.mp4", [np.hstack([corners(), corners()[:, ::-1]])] * 20, sound=False)
    frames = read_frames(path, 0.0, 0.8, (5, 96, 96), 8.0)
    assert frames.shape == (5, 96, 96, 3)
    middle = frames[0, 20, 48].astype(int)  # the middle of the upper edge was and is green
    assert middle[1] > 180 and middle[0] < 80 and middle[2] < 80
    assert cover(128, 48, (96, 96)) == (256, 96) and cover(720, 480, (720, 480)) == (720, 480)


# --- time ------------------------------------------------------------------------------------------------


def test_seeking_shows_what_decoding_from_the_start_shows(steps: Path) -> None:
    """25 fps, a key frame at every twelfth: wherever a clip starts, its frames are the ones made for it."""
    for first in (0, 1, 11, 12, 13, 49, 50, 51, 60, 95, 118):
        frames = read_times(steps, first / 25, 4.8, [0.0, 0.04], 64)
        assert np.allclose(levels(frames), LEVELS[first : first + 2], atol=3), first
        assert [round(time * 25) for time, _, _ in timed(steps, first / 25)] == list(range(first, 120))


def test_a_clip_ends_before_its_end(steps: Path) -> None:
    """Asked for more than a clip has, its last frame stays; the next shot is never shown."""
    assert np.allclose(levels(read_times(steps, 2.0, 2.2, [0.0, 0.1, 0.16, 5.0], 64)),
                       [LEVELS[50], LEVELS[52], LEVELS[54], LEVELS[54]], atol=3)  # fmt: skip
    with pytest.raises(Unreadable, match="no frame between 9 and 10 s"):
        read_times(steps, 9.0, 10.0, [0.0], 64)


def test_variable_rates_are_read_by_their_times(tmp_path: Path, make_video: Make) -> None:
    times = np.cumsum(np.where(np.arange(60) % 5, 0.03, 0.2)) - 0.2
    path = make_video(tmp_path / "variable.mkv", grey(LEVELS[:60]), times=times, sound=False)
    found = scan(path, Shots("none"))
    assert found.variable_rate and found.frames == 60
    assert found.uneven == pytest.approx(0.19, abs=0.02) and found.seconds == pytest.approx(times[-1] + 0.03)
    frames = read_frames(path, 0.0, found.seconds, (17, 48, 64), 8.0)
    on_screen = [LEVELS[np.flatnonzero(times <= index / 8 + 1e-6)[-1]] for index in range(17)]
    assert np.allclose(levels(frames), on_screen, atol=3)


@pytest.mark.parametrize("rate", [24, 25, 30, 60, Fraction(30000, 1001)])
def test_constant_rates_are_constant(rate: float, tmp_path: Path, make_video: Make) -> None:
    for name in ("a.mp4", "a.mkv"):  # the second rounds its times to milliseconds
        found = scan(make_video(tmp_path / name, grey(range(60)), fps=rate, sound=False), Shots("none"))
        assert not found.variable_rate and found.fps == pytest.approx(float(rate), rel=2e-3)
        assert found.seconds == pytest.approx(60 / rate, rel=2e-3)


def test_ten_hours_in_little_memory(tmp_path: Path, make_video: Make) -> None:
    """Ten hours at one frame in ten seconds: 33 MB of frames, of which never more than a few live."""
    count = 3600
    path = make_video(tmp_path / "long.mp4", grey([100] * count), times=np.arange(count) * 10.0, sound=False)
    settings = {
        "shots": {"detector": "adaptive"},
        "basic": {"min_fps": 0.01, "min_width": 16, "min_height": 16, "max_seconds": 3600.0},
        "aesthetic": {"plugin": "none"},
        "captions": {"required": False},
        "output": {"buckets": [[17, 48, 64]]},
    }
    prepare(path, tmp_path / "warm", DataConfig.from_dict({**settings, "shots": {"detector": "none"}}))
    tracemalloc.start()
    summary = prepare(path, tmp_path / "out", DataConfig.from_dict(settings))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary["kept"] == 10 and summary["kept_seconds"] == pytest.approx(36000, abs=10)
    assert summary["notes"]["long: 10.0 hours"] == 1
    assert peak < 8e6


def test_pieces_are_the_whole_video() -> None:
    found = Scan(frames=500, seconds=20.0, fps=25.0, cuts=(3.0, 3.4, 15.4), uneven=0.0, broken=0)
    clips = pieces(found, 6.0)
    assert clips == [(0.0, 3.0), (3.0, 3.4), (3.4, 9.4), (9.4, 15.4), (15.4, 20.0)]
    assert pieces(Scan(1, 0.0, 0.0, (), 0.0, 0), 6.0) == [(0.0, 0.0)]


@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_detectors_find_the_cuts(detector: str, tmp_path: Path, make_video: Make) -> None:
    shots = [level for level in (30, 200, 90, 220) for _ in range(30)]
    path = make_video(tmp_path / "cuts.mp4", grey(shots), sound=False)
    threshold = 3.0 if detector == "adaptive" else 27.0
    assert scan(path, Shots(detector, threshold)).cuts == (1.2, 2.4, 3.6)
    assert scan(path, Shots(detector, threshold, min_seconds=2.0)).cuts == (2.4,)


# --- what is no video ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile steps.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
        "\x00\x00\x00\x18ftypmp42",
        "",
    ],
)
def test_playlists_and_scraps_are_no_videos(text: str, steps: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.mp4").write_bytes(steps.read_bytes())
    (tmp_path / "list.mp4").write_text(text, encoding="utf-8")
    with pytest.raises(Unreadable):
        scan(tmp_path / "list.mp4", Shots("none"))


def test_damage_in_the_middle_is_counted(steps: Path, tmp_path: Path) -> None:
    """Wherever a byte is wrong, the file is read to its end or refused with a reason; never another error."""
    data = bytearray(steps.read_bytes())
    outcomes = set()
    for at in range(len(data) // 40, len(data), len(data) // 20):
        hurt = bytes(data[:at]) + bytes(64) + bytes(data[at + 64 :])
        (tmp_path / "hurt.mp4").write_bytes(hurt)
        try:
            found = scan(tmp_path / "hurt.mp4", Shots("none"))
            outcomes.add("damaged" if found.broken or found.frames < 120 else "hidden")
        except Unreadable as error:
            assert str(error)
            outcomes.add("refused")
    assert outcomes & {"damaged", "refused"}


def test_a_picture_that_changes_its_size_is_refused(tmp_path: Path) -> None:
    parts = []
    for size in ((48, 64), (96, 128)):
        path = tmp_path / f"{size[0]}.ts"
        with av.open(str(path), "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for index, image in enumerate(grey([90] * 30, size)):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = index + (30 if parts else 0)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        parts.append(path.read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(Unreadable, match="its picture changes from 64x48 to 128x96"):
        scan(tmp_path / "both.ts", Shots("none"))


# --- measurements ----------------------------------------------------------------------------------------


def pan(count: int = 16, height: int = 96, width: int = 160) -> np.ndarray:
    """A camera over blocks of grey: luma (T, H, W)."""
    large = np.random.default_rng(3).random((30, 60)).repeat(8, axis=0).repeat(8, axis=1).astype(np.float32)
    return np.stack([np.roll(large, (-2 * t, -11 * t), (0, 1))[:height, :width] for t in range(count)])


def letters(light: np.ndarray, opacity: float) -> np.ndarray:
    mark = np.kron(np.random.default_rng(9).random((3, 7)) > 0.5, np.ones((4, 4))) > 0
    light = light.copy()
    corner = light[:, 80:92, 4:32]
    corner[:, mark] = corner[:, mark] * (1 - opacity) + opacity
    return light


def test_overlay_sees_a_mark_and_no_camera() -> None:
    limit = DataConfig().watermark.limit
    assert measure.overlay(pan()) < limit / 2
    assert measure.overlay(letters(pan(), 1.0)) > limit
    assert measure.overlay(letters(0.5 * pan(), 0.5)) > limit, "a faint one over a dark picture"
    still = np.repeat(pan()[:1], 16, axis=0)
    assert measure.overlay(still) == 0, "a still camera on a sharp picture"
    passing = still.copy()
    for t in range(16):
        passing[t, :, 10 * t : 10 * t + 30] = 0.2
    assert measure.overlay(passing) == 0, "something that passes before a still background"
    assert measure.overlay(letters(np.full((16, 96, 160), 0.3, np.float32), 1.0)) == 0, "what it cannot see"


def test_black_area_is_the_area_of_the_bars() -> None:
    light = np.full((4, 100, 200), 0.5, np.float32)
    assert measure.black_area(light, 0.1) == 0
    light[:, :10], light[:, -5:], light[:, :, :20] = 0.02, 0.02, 0.02
    assert measure.black_area(light, 0.1) == pytest.approx(1 - 85 * 180 / 20000)
    light[2, 3, 50:150] = 0.9
    assert measure.black_area(light, 0.1) < 1 - 85 * 180 / 20000, "lit once is no bar"
    assert measure.black_area(np.zeros((4, 10, 10), np.float32), 0.1) == 1


def test_black_frames_and_brightness() -> None:
    light = np.full((8, 10, 10), 0.5, np.float32)
    light[:2] = 0.01
    assert measure.black_frames(light, 0.1) == 0.25
    light[0, 0, :3] = 0.9
    assert measure.black_frames(light, 0.1) == 0.125, "3 % of its pixels are lit"
    white = measure.luma(np.full((1, 2, 2, 3), 255, np.uint8))
    assert white == pytest.approx(1) and measure.luma(np.zeros((1, 2, 2, 3), np.uint8)).max() == 0


def test_plain_aesthetic_orders_what_it_can_order() -> None:
    sharp = pan()
    shifted = [np.roll(sharp, (dy, dx), (1, 2)) for dy in range(8) for dx in range(8)]
    blurred = np.mean(shifted, axis=0)
    assert measure.sharpness(sharp) > measure.sharpness(blurred) > measure.sharpness(0 * sharp + 0.5) == 0
    colours = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    faded = (colours * 0.3 + 90).astype(np.uint8)
    assert measure.colourfulness(colours) > measure.colourfulness(faded) > 0
    assert measure.colourfulness(colours[..., :1].repeat(3, axis=-1)) == pytest.approx(0, abs=1e-6)
    assert measure.contrast(sharp) > measure.contrast(0.5 * sharp) > 0


# --- the judgement ---------------------------------------------------------------------------------------

CLIP = Clip("a.mp4", 1.0, 4.0, 720, 480, 25.0, text="a caption")


def test_judge_is_a_function_of_its_arguments() -> None:
    images = (pan()[..., None] * [255, 128, 60]).astype(np.uint8)
    frames = Frames(images, tuple(sample_times(3.0)))
    config = DataConfig()
    plugins = load_plugins(config)
    before = images.copy()
    verdicts = [judge(CLIP, frames, config, plugins) for _ in range(3)]
    assert verdicts[0] == verdicts[1] == verdicts[2] and np.array_equal(images, before)
    assert verdicts[0].stage == "kept" and verdicts[0].caption == "a caption"
    assert set(verdicts[0].measured) == {"black_frames", "brightness", "black_area", "aesthetic", "watermark"}


def test_sample_times_are_inside_the_clip() -> None:
    for seconds in (0.04, 2.0, 6.125, 3600.0):
        times = sample_times(seconds)
        assert 6 <= len(times) <= 48 and times == sorted(times) and 0 < times[0] and times[-1] < seconds


def test_the_bucket_that_loses_least() -> None:
    output = DataConfig.from_dict(
        {"output": {"buckets": [[17, 480, 720], [49, 480, 720], [49, 720, 480], [17, 960, 1440]]}}
    ).output
    clip = lambda seconds, width, height: Clip("a", 0.0, seconds, width, height, 25.0)
    assert bucket(clip(6.1, 720, 480), output) == (49, 480, 720)
    assert bucket(clip(6.1, 1080, 1920), output) == (49, 720, 480)
    assert bucket(clip(2.5, 720, 480), output) == (17, 480, 720)
    assert bucket(clip(2.5, 1440, 960), output) == (17, 960, 1440)


# --- settings and captions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"basics": {}}, "no setting 'basics': did you mean 'basic'"),
        ({"basic": 3}, "expected an object"),
        ({"basic": {"min_fps": "8"}}, "basic.min_fps is '8', expected a value of type float"),
        ({"output": {"write_clips": 1}}, "expected a value of type bool"),
        ({"shots": {"detector": "magic"}}, "expected one of adaptive, content, none"),
        ({"output": {"buckets": [[48, 480, 720]]}}, "8k [+] 1 frames"),
        ({"basic": {"min_seconds": 9}}, "0 < min_seconds <= max_seconds"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig.from_dict(values)


def test_settings_survive_json() -> None:
    config = DataConfig.from_dict({"basic": {"min_fps": 12}, "output": {"buckets": [[17, 96, 160]]}})
    assert DataConfig.from_dict(config.to_dict()) == config and hash(config) is not None
    assert config.basic.min_fps == 12.0 and isinstance(config.basic.min_fps, float)


def test_captions_of_every_kind(tmp_path: Path) -> None:
    texts = {
        "a.txt": "\ufeffA caption\nin two lines",
        "b.json": '{"captions": [{"end": 2, "caption": "first"}, {"start": 2, "caption": "second"}]}',
        "c.json": '{"caption": "one"}',
        "captions.csv": 'file,caption,start,end\na.mp4,from the table,,\nd.mp4,"yes, d",1,2\nz.mp4,no,,\n',
        "e.json": "{broken",
        "stray.txt": "of no video",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    notes = read_notes(tmp_path, [f"{letter}.mp4" for letter in "abcde"], texts)
    said = lambda video, start, end, title="": caption_for(notes.of.get(video, []), title, start, end)
    assert said("a.mp4", 0, 3) == ("A caption in two lines", "a.txt")
    assert said("b.mp4", 0.5, 2.5) == ("first", "b.json") and said("b.mp4", 1.5, 4)[0] == "second"
    assert said("c.mp4", 7, 9) == ("one", "c.json")
    assert said("d.mp4", 0, 3) == ("yes, d", "captions.csv") and said("d.mp4", 2, 3) == ("", "")
    assert said("e.mp4", 0, 1, "its title") == ("its title", "title")
    assert len(notes.problems) == 3
    for words in ("captions.csv names z.mp4", "e.json cannot be read", "stray.txt belongs to no video"):
        assert any(words in problem for problem in notes.problems)
