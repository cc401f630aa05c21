"""Clips out: a file of the training bucket's size and frame rate, with its caption beside it."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
from av.codec.codec import UnknownCodecError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .config import Output
from .video import stream_frames


def check_codec(output: Output) -> None:
    """ValueError when the installed FFmpeg cannot encode with the codec that is asked for."""
    try:
        av.Codec(output.codec, "w")
    except UnknownCodecError as error:
        raise ValueError(
            f"output.codec is {output.codec!r}, which this PyAV cannot write; try libx264, h264 or mpeg4"
        ) from error


def write_clip(
    source: Path, start: float, end: float, bucket: tuple[int, int, int], output: Output, target: Path
) -> int:
    """Encode `bucket` (frames, height, width) of the clip [start, end) in seconds; returns the size in
    bytes. The file appears under its name only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.stem}.{os.getpid()}.unfinished{target.suffix}")
    try:
        with av.open(str(unfinished), "w", options={"movflags": "+faststart"}) as container:
            rate = Fraction(output.fps).limit_denominator(1001)
            stream = container.add_stream(output.codec, rate=rate, options={"crf": str(output.crf)})
            assert isinstance(stream, VideoStream), f"{output.codec} is no video codec"
            _, stream.height, stream.width = bucket
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            for image in stream_frames(source, start, end, bucket, output.fps):
                container.mux(stream.encode(VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target.stat().st_size


def write_text(target: Path, text: str) -> None:
    """Only when it says something else than what is there."""
    if not target.is_file() or target.read_bytes() != text.encode():
        target.write_bytes(text.encode())
