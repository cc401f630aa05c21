"""The judgement of one clip: a pure function of its description and its decoded frames."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from . import measure
from .clips import KEPT, Clip, Frames, Verdict
from .config import Basic, DataConfig, Output, Quality, Reading
from .plugins import Captioner, Plugins
from .shots import Scan

SAMPLES_PER_SECOND = 4.0
SAMPLES = (6, 48)  # least and most
SAMPLE_SIZE = 320  # longest side


def sample_times(seconds: float) -> list[float]:
    """Where a clip is looked at: evenly spread, in the middle of equal parts."""
    count = min(max(math.ceil(seconds * SAMPLES_PER_SECOND), SAMPLES[0]), SAMPLES[1])
    return [round((index + 0.5) * seconds / count, 6) for index in range(count)]


Check = tuple[str, float, float | None, float | None]  # measure, value, least, most


def first_failure(stage: str, checks: Iterable[Check]) -> Verdict | None:
    """The rejection of the first value that is below its least or above its most; None if all are within."""
    for name, value, least, most in checks:
        if least is not None and value < least:
            return Verdict(stage, f"{name} is {value:.4g}, the least is {least:g}", name, value, least)
        if most is not None and value > most:
            return Verdict(stage, f"{name} is {value:.4g}, the most is {most:g}", name, value, most)
    return None


def judge_size(width: int, height: int, limits: Basic) -> Verdict | None:
    """Basic filter of a whole file, by what its first frame shows: before the work of finding shots."""
    checks: list[Check] = [
        ("width", width, limits.min_width, None),
        ("height", height, limits.min_height, None),
        ("aspect", round(width / height, 4), limits.min_aspect, limits.max_aspect),
    ]
    return first_failure("basic", checks)


def judge_scan(found: Scan, declared: float | None, limits: Reading) -> Verdict | None:
    """Whether a file, decoded to its end, is whole. `declared`: the seconds that its header promises."""
    decoded = round(found.seconds / declared, 4) if declared else 1.0
    checks: list[Check] = [
        ("frames", found.frames, limits.min_frames, None),
        ("decoded", decoded, limits.min_decoded, None),
        ("broken_packets", found.broken, None, limits.max_broken_packets),
    ]
    verdict = first_failure("read", checks)
    if verdict and verdict.measure == "decoded":
        reason = f"it breaks off after {found.seconds:.2f} of {declared:.2f} s: a truncated file"
        return replace(verdict, reason=reason)
    if verdict is None and found.variable_rate and not limits.variable_rate:
        reason = f"variable frame rate: {found.uneven:.0%} of the gaps between frames are unusual"
        return Verdict("read", reason, "uneven", found.uneven, 0.0)
    return verdict


def judge_basic(clip: Clip, limits: Basic) -> Verdict | None:
    """Basic filter of a clip: its duration and its frame rate."""
    checks: list[Check] = [
        ("fps", clip.fps, limits.min_fps, limits.max_fps),
        # A piece as long as the longest one allowed is never too long by rounding.
        ("seconds", clip.seconds, limits.min_seconds, limits.max_seconds + 1e-4),
    ]
    return judge_size(clip.width, clip.height, limits) or first_failure("basic", checks)


def quality(frames: Frames, limits: Quality) -> list[Check]:
    """What the quality filter measures, in the order in which it judges."""
    light = measure.luma(frames.images)
    level = limits.black_level
    return [
        ("black_frames", round(measure.black_frames(light, level), 4), None, limits.max_black_frames),
        ("brightness", round(float(light.mean()), 4), limits.min_brightness, limits.max_brightness),
        ("black_area", round(measure.black_area(light, level), 4), None, limits.max_black_area),
    ]


def judge(clip: Clip, frames: Frames, config: DataConfig, plugins: Plugins) -> Verdict:
    """Where `clip` ends, with everything that was measured until then. The same arguments always give the
    same verdict, as long as the plug-ins are pure too. ValueError when a plug-in fails."""
    failed = judge_basic(clip, config.basic)
    if failed:
        return failed
    checks = quality(frames, config.quality)
    measured = {name: value for name, value, _, _ in checks}
    failed = first_failure("quality", checks)
    if failed is None and plugins.aesthetic is not None:
        measured["aesthetic"] = value = round(float(plugins.aesthetic(clip, frames)), 4)
        failed = first_failure("aesthetic", [("aesthetic", value, config.aesthetic.limit, None)])
    if failed is None and plugins.watermark is not None:
        measured["watermark"] = value = round(float(plugins.watermark(clip, frames)), 4)
        failed = first_failure("watermark", [("watermark", value, None, config.watermark.limit)])
    caption = "" if failed else _caption(clip, frames, plugins.captions)
    if failed is None and config.captions.required and not caption:
        failed = Verdict("caption", "it has no caption", "characters", 0.0, 1.0)
    if failed:
        return replace(failed, measured=measured)
    return Verdict(KEPT, measured=measured, caption=caption, bucket=bucket(clip, config.output))


def _caption(clip: Clip, frames: Frames, captioner: Captioner | None) -> str:
    return " ".join(captioner(clip, frames).split()) if captioner is not None else ""


def bucket(clip: Clip, output: Output) -> tuple[int, int, int]:
    """The bucket that loses least: of those that the clip is long enough for, the nearest shape, then no
    enlarging, then the most frames, then the largest picture."""
    fitting = [found for found in output.buckets if (found[0] - 1) / output.fps <= clip.seconds + 1e-6]

    def loss(found: tuple[int, int, int]) -> tuple[float, bool, int, int]:
        frames, height, width = found
        shape = abs(math.log(clip.width / clip.height * height / width))
        enlarged = width > clip.width or height > clip.height
        return round(shape, 3), enlarged, -frames, -height * width

    return min(fitting, key=loss)
