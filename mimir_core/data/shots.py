"""One pass over a whole video: its cuts by PySceneDetect, its real length and frame rate, its damage.

Constant memory: one small frame at a time, and a list of cuts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from .config import Shots
from .video import Tally, converter, fit, timed

DETECTOR_SIZE = 256  # longest side of the frames that the detector sees, as PySceneDetect itself would choose
UNEVEN = 0.1  # a gap between frames that differs this much from the usual one ...
UNEVEN_SHARE = 0.01  # ... and the share of such gaps from which a frame rate is variable
INSTALL = 'pip install "scenedetect-headless>=0.7,<0.8"'


@dataclass(frozen=True)
class Scan:
    """What a whole video turned out to be."""

    frames: int
    seconds: float  # from the first frame to the end of the last
    fps: float
    cuts: tuple[float, ...]  # seconds of each first frame of a new shot
    uneven: float  # share of gaps between frames that differ from the usual one
    broken: int  # packets and frames that had to be passed over

    @property
    def variable_rate(self) -> bool:
        return self.uneven > UNEVEN_SHARE


def scan(path: Path, settings: Shots) -> Scan:
    """Decode all of `path` once. Unreadable when it cannot be decoded."""
    tally, gaps, cuts = Tally(), Gaps(), list[float]()
    detect = None
    count, last = 0, 0.0
    for time, frame, shown_as in timed(path, tally=tally):
        if detect is None:
            size = fit(shown_as.width, shown_as.height, DETECTOR_SIZE)
            detect = _detector(settings, converter(frame, shown_as, size, size, "bgr24"))
        else:
            gaps.add(time - last)
        cuts += detect(time, frame)
        count, last = count + 1, time
    usual, uneven = gaps.usual()
    seconds = round(last + usual, 6)
    fps = round(count / seconds, 3) if seconds else 0.0
    return Scan(count, seconds, fps, tuple(cuts), uneven, tally.broken)


class Gaps:
    """Times between frames, counted per millisecond, so that hours of them take no memory."""

    def __init__(self) -> None:
        self.count: Counter[int] = Counter()
        self.total: Counter[int] = Counter()  # microseconds

    def add(self, gap: float) -> None:
        bin = round(gap * 1000)
        self.count[bin] += 1
        self.total[bin] += round(gap * 1_000_000)

    def usual(self) -> tuple[float, float]:
        """(the usual gap in seconds, the share of gaps that differ from it)."""
        if not self.count:
            return 0.0, 0.0
        most = self.count.most_common(1)[0][0]
        tolerance = max(1.5, UNEVEN * most)  # some containers round times to milliseconds
        near = [bin for bin in self.count if abs(bin - most) <= tolerance]
        number = sum(self.count[bin] for bin in near)
        mean = sum(self.total[bin] for bin in near) / number / 1_000_000
        return mean, round(1 - number / sum(self.count.values()), 4)


def check_detector(settings: Shots) -> None:
    """ValueError with the remedy when the detector that `settings` ask for is not installed."""
    if settings.detector != "none":
        _scenedetect()


def _scenedetect() -> Any:
    try:
        import scenedetect
    except ImportError as error:
        raise ValueError(
            f"finding shots needs PySceneDetect, which cannot be imported ({error}). Install it: {INSTALL}. "
            'Or set shots.detector to "none": then every file is one shot.'
        ) from error
    return scenedetect


def _detector(settings: Shots, convert: Callable[[Any], np.ndarray]) -> Callable[[float, Any], list[float]]:
    """A function of (seconds, frame) that returns the times of the cuts it is sure of by then."""
    if settings.detector == "none":
        return lambda time, frame: []
    package = _scenedetect()
    if settings.detector == "content":
        # SUPPRESS keeps the first of several close cuts, as the adaptive detector does.
        suppress = package.detector.FlashFilter.Mode.SUPPRESS
        detector = package.ContentDetector(
            threshold=settings.threshold, min_scene_len=settings.min_seconds, filter_mode=suppress
        )
    else:
        detector = package.AdaptiveDetector(
            adaptive_threshold=settings.threshold,
            min_scene_len=settings.min_seconds,
            min_content_val=settings.min_content,
        )
    micro = Fraction(1, 1_000_000)

    def detect(time: float, frame: Any) -> list[float]:
        stamp = package.common.Timecode(pts=round(time * 1_000_000), time_base=micro)
        cuts = detector.process_frame(package.FrameTimecode(stamp, fps=Fraction(30)), convert(frame))
        return [round(cut.seconds, 6) for cut in cuts]

    return detect


def pieces(found: Scan, longest: float) -> list[tuple[float, float]]:
    """(start, end) of the clips of a video: its shots, those longer than `longest` seconds cut into pieces
    of that length; what is left of a shot is a clip of its own. Together they are the whole video."""
    edges = [0.0, *(cut for cut in found.cuts if 0 < cut < found.seconds), found.seconds]
    clips = []
    for start, end in zip(edges[:-1], edges[1:]):
        count = max(int((end - start) / longest + 1 - 1e-6), 1)
        marks = [round(start + index * longest, 6) for index in range(count)]
        clips += list(zip(marks, [*marks[1:], end]))
    return clips
