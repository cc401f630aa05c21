"""Videos in: opening, upright frames, seeking. PyAV (FFmpeg's libraries) does all of it, one frame at a time.

Times are seconds after the file's first frame, rounded to microseconds, so that they survive JSON.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError, InvalidDataError
from av.filter import Graph
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

# What FFmpeg opens but is no video: pictures, playlists that would read other files, text art.
NO_VIDEO = {"concat", "hls", "dash", "image2", "tty", "gif_pipe", "ffmetadata", "lrc", "srt"}
MICRO = 1e-6
SEEK_FROM = 2.0  # seconds; below, decoding from the start is as fast as seeking

# (a, b, c, d) of a display matrix, x' = a x + c y, y' = b x + d y with y down -> FFmpeg filters, and words.
TURNS: dict[tuple[int, int, int, int], tuple[tuple[tuple[str, str], ...], str]] = {
    (1, 0, 0, 1): ((), ""),
    (0, 1, -1, 0): ((("transpose", "clock"),), "rotated by 90 degrees"),
    (-1, 0, 0, -1): ((("hflip", ""), ("vflip", "")), "rotated by 180 degrees"),
    (0, -1, 1, 0): ((("transpose", "cclock"),), "rotated by 270 degrees"),
    (-1, 0, 0, 1): ((("hflip", ""),), "mirrored"),
    (1, 0, 0, -1): ((("vflip", ""),), "upside down"),
    (0, 1, 1, 0): ((("transpose", "cclock_flip"),), "transposed"),
    (0, -1, -1, 0): ((("transpose", "clock_flip"),), "transposed"),
}


class Unreadable(ValueError):
    """A file that cannot be used, with the reason. `retry`: it may work another time (disk, permissions)."""

    def __init__(self, reason: str, retry: bool = False) -> None:
        super().__init__(reason)
        self.retry = retry


@dataclass
class Tally:
    """What a decoder had to pass over."""

    broken: int = 0


@dataclass(frozen=True)
class Picture:
    """How the frames of a file are shown."""

    width: int  # upright, square pixels
    height: int
    coded: tuple[int, int]  # width and height of the decoder's frames
    matrix: tuple[int, int, int, int]
    origin: int  # time stamp of the first frame

    @property
    def turn(self) -> str:
        return TURNS[self.matrix][1]


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first real video stream. Unreadable for everything that FFmpeg cannot decode,
    also when it notices within the block."""
    container = None
    try:
        if not path.is_file():
            raise Unreadable("there is no such file", retry=True)
        if path.stat().st_size == 0:
            raise Unreadable("the file is empty (0 bytes)")
        # "file:" and the whitelist: a name with a colon or a playlist in disguise must not reach the network.
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
        yield container, _stream(container)
    except (OSError, MemoryError, FFmpegError, UnicodeError, struct.error) as error:
        raise _unreadable(error) from error
    finally:
        if container is not None:
            container.close()


def _unreadable(error: Exception) -> Unreadable:
    if isinstance(error, InvalidDataError) or not isinstance(error, (OSError, MemoryError)):
        return Unreadable("not a video, or its header is damaged (FFmpeg: invalid data)")
    return Unreadable(
        f"cannot be read: {error.strerror if isinstance(error, OSError) else error}", retry=True
    )


def _stream(container: InputContainer) -> VideoStream:
    name = container.format.name
    if name in NO_VIDEO or name.endswith("_pipe"):
        raise Unreadable(f"not a video: FFmpeg reads it as {name}")
    cover = Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise Unreadable("it has no video stream")
    if streams[0].codec_context is None:
        raise Unreadable("FFmpeg has no decoder for its video stream")
    # One thread: the same errors and frames on every machine; other cores work on other clips.
    streams[0].codec_context.thread_count = 1
    return streams[0]


def decode(container: InputContainer, stream: VideoStream, tally: Tally) -> Iterator[VideoFrame]:
    """Every frame that decodes. Packets that do not are counted; a container that breaks ends the video."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            frames = packet.decode() if packet is not None else None
        except InvalidDataError:
            tally.broken += 1
            continue
        if frames is None:
            return
        yield from frames


def picture(stream: VideoStream, first: VideoFrame) -> Picture:
    """From the first frame: display matrix and pixel aspect ratio applied."""
    if first.pts is None:
        raise Unreadable("its frames have no time stamps; remux it with ffmpeg first")
    matrix = _matrix(first)
    ratio = stream.sample_aspect_ratio or Fraction(1)
    width, height = max(round(first.width * ratio), 1), first.height
    if matrix[0] == 0:
        width, height = height, width
    return Picture(width, height, (first.width, first.height), matrix, first.pts)


def _matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    side_data: Any = frame.side_data  # PyAV's stub calls it a dictionary; it is a sequence of SideData
    for data in side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("5i", bytes(data)[:20])
            matrix = (round(a / 65536), round(b / 65536), round(c / 65536), round(d / 65536))
            if matrix not in TURNS or max(map(abs, (a, b, c, d))) > 66000:
                raise Unreadable(f"its display matrix {a, b, c, d} is not a turn by a multiple of 90 degrees")
            return matrix
    return (1, 0, 0, 1)


def timed(
    path: Path, start: float = 0.0, tally: Tally | None = None
) -> Iterator[tuple[float, VideoFrame, Picture]]:
    """(seconds, frame, picture) from the first frame at or after `start` to the end. Unreadable when a file
    breaks in a way that FFmpeg cannot pass over, or when its picture size changes."""
    tally = tally if tally is not None else Tally()
    with opened(path) as (container, stream):
        frames = decode(container, stream, tally)
        first = next(frames, None)
        if first is None:
            raise Unreadable("no frame of it can be decoded")
        shown_as = picture(stream, first)
        seconds = _clock(stream, shown_as)
        if start > SEEK_FROM:
            frames = _from_keyframe(path, container, stream, shown_as, start, seconds, tally)
        else:
            frames = _chain(first, frames)
        last = -MICRO
        for frame in frames:
            time = seconds(frame)
            if time is None or time <= last:
                tally.broken += 1
                continue
            last = time
            if (frame.width, frame.height) != shown_as.coded:
                raise Unreadable(
                    f"its picture changes from {shown_as.coded[0]}x{shown_as.coded[1]} to "
                    f"{frame.width}x{frame.height} after {time:.1f} s"
                )
            if time >= start - MICRO / 2:
                yield time, frame, shown_as


def _clock(stream: VideoStream, shown_as: Picture) -> Callable[[VideoFrame], float | None]:
    base = stream.time_base or Fraction(1, 90000)
    return lambda frame: None if frame.pts is None else round(float((frame.pts - shown_as.origin) * base), 6)


def _chain(first: VideoFrame, rest: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    yield first
    yield from rest


def _from_keyframe(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    shown_as: Picture,
    start: float,
    seconds: Callable[[VideoFrame], float | None],
    tally: Tally,
) -> Iterator[VideoFrame]:
    """Frames from a key frame at or before `start`; from the beginning where the file cannot seek."""
    base = stream.time_base or Fraction(1, 90000)
    try:
        container.seek(shown_as.origin + int(start / base), stream=stream, backward=True)
        frames = decode(container, stream, tally)
        first = next(frames, None)
    except (FFmpegError, OSError):
        first = None
    time = seconds(first) if first is not None else None
    if first is not None and time is not None and time <= start + MICRO:
        yield from _chain(first, frames)
        return
    with opened(path) as (again, again_stream):
        yield from decode(again, again_stream, tally)


def shown(
    frames: Iterable[tuple[float, VideoFrame, Picture]], times: Sequence[float]
) -> Iterator[tuple[VideoFrame, Picture]]:
    """For each of the rising `times` the frame on screen: the last one that begins at or before it (before
    the first frame: the first). Exact with any frame rate, also a variable one."""
    waiting = list(reversed(times))
    last: tuple[VideoFrame, Picture] | None = None
    for time, frame, shown_as in frames:
        while last is not None and waiting and time > waiting[-1] + MICRO:
            waiting.pop()
            yield last
        if not waiting:
            return
        last = frame, shown_as
    while last is not None and waiting:
        waiting.pop()
        yield last


def converter(
    frame: VideoFrame, shown_as: Picture, size: tuple[int, int], crop: tuple[int, int], pixels: str
) -> Callable[[VideoFrame], np.ndarray]:
    """A function from frames to (crop height, crop width, 3) arrays of `pixels` ("rgb24", "bgr24"): turned
    upright, scaled to `size` (width, height), the middle `crop` (width, height) cut out."""
    graph = Graph()
    nodes = [
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 90000)
        )
    ]
    # bitexact: the same bytes on every kind of processor.
    scale = f"{size[0]}:{size[1]}:flags=bicubic+accurate_rnd+bitexact"
    chain = [*TURNS[shown_as.matrix][0], ("scale", scale), ("format", pixels)]
    if crop != size:
        chain.append(("crop", f"{crop[0]}:{crop[1]}"))
    nodes += [graph.add(name, arguments or None) for name, arguments in [*chain, ("buffersink", "")]]
    graph.link_nodes(*nodes).configure()

    def convert(frame: VideoFrame) -> np.ndarray:
        graph.vpush(frame)
        return graph.vpull().to_ndarray()

    return convert


def fit(width: int, height: int, longest: int) -> tuple[int, int]:
    """Size with the same shape whose longer side is at most `longest`; never larger than the original."""
    scale = min(1.0, longest / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def cover(width: int, height: int, target: tuple[int, int]) -> tuple[int, int]:
    """The smallest size with the same shape that covers `target` (width, height)."""
    scale = max(target[0] / width, target[1] / height)
    return max(round(width * scale), target[0]), max(round(height * scale), target[1])


def read_times(path: Path, start: float, end: float, times: Sequence[float], longest: int) -> np.ndarray:
    """Frames on screen at `times` (seconds after `start`) of the clip [start, end), as (T, H, W, 3) uint8
    RGB of at most `longest` pixels a side. Unreadable when there is no frame between start and end."""

    def sizes(width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        size = fit(width, height, longest)
        return size, size

    return np.stack(list(_converted(path, start, end, times, sizes)))


def read_frames(path: Path, start: float, end: float, bucket: tuple[int, int, int], fps: float) -> np.ndarray:
    """The training view of a clip: (frames, height, width, 3) uint8 RGB of `bucket` (frames, height, width)
    at `fps`, from the clip's start, scaled to cover the bucket and cropped to its middle."""
    return np.stack(list(stream_frames(path, start, end, bucket, fps)))


def stream_frames(
    path: Path, start: float, end: float, bucket: tuple[int, int, int], fps: float
) -> Iterator[np.ndarray]:
    """`read_frames`, one frame (height, width, 3) at a time."""
    count, height, width = bucket
    target = (width, height)
    times = [index / fps for index in range(count)]
    return _converted(path, start, end, times, lambda w, h: (cover(w, h, target), target))


def _converted(
    path: Path,
    start: float,
    end: float,
    times: Sequence[float],
    sizes: Callable[[int, int], tuple[tuple[int, int], tuple[int, int]]],
) -> Iterator[np.ndarray]:
    within = _until(timed(path, start), end)
    convert = None
    for frame, shown_as in shown(within, [start + time for time in times]):
        if convert is None:
            size, crop = sizes(shown_as.width, shown_as.height)
            convert = converter(frame, shown_as, size, crop, "rgb24")
        yield convert(frame)
    if convert is None:
        raise Unreadable(f"no frame between {start:g} and {end:g} s can be decoded")


def _until(
    frames: Iterator[tuple[float, VideoFrame, Picture]], end: float
) -> Iterator[tuple[float, VideoFrame, Picture]]:
    for item in frames:
        if item[0] >= end - MICRO / 2:
            return
        yield item
