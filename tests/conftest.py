"""Shared by all tests: makes `mimir_core`, `launcher` and `run` importable from a plain checkout.

The root is appended, never put first: its folder `nodes/` has the name of a top module of ComfyUI's, and
tests that import ComfyUI (tests/host/inprocess) must get ComfyUI's.
"""

import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FAKE_XFORMERS = {
    "broken": 'raise ImportError("libcudart.so.11.0: cannot open shared object file")\n',
    "useless": "def memory_efficient_attention(*args, **kwargs):\n"
    '    raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")\n',
}


@pytest.fixture
def fake_xformers(tmp_path: Path) -> Callable[[str], Path]:
    """fake_xformers("broken" | "useless"): a folder for PYTHONPATH with an xformers of that kind."""

    def make(kind: str) -> Path:
        folder = tmp_path / f"{kind}_xformers"
        package, info = folder / "xformers", folder / "xformers-0.0.35.dist-info"
        package.mkdir(parents=True)
        info.mkdir()
        (package / "__init__.py").write_text('__version__ = "0.0.35"\n', encoding="utf-8")
        (package / "ops.py").write_text(FAKE_XFORMERS[kind], encoding="utf-8")
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n", encoding="utf-8"
        )
        return folder

    return make


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    """make_video(path, frames, fps=25, times=None, sound=True): (H, W, 3) uint8 RGB frames as a small H.264
    file, at a constant rate or at `times` in seconds."""
    import av
    import numpy as np

    def make(
        path: Path, frames: Any, fps: float = 25, times: Any = None, sound: bool = True, **kept: Any
    ) -> Path:
        with av.open(str(path), "w", options=kept.pop("options", {})) as container:
            stream: Any = None
            for index, image in enumerate(frames):
                if stream is None:
                    options = {"crf": "16", "preset": "veryfast", "g": "12"}
                    stream = container.add_stream("libx264", rate=fps, options=options)
                    stream.height, stream.width = image.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.codec_context.thread_count = 1
                    stream.codec_context.time_base = (
                        Fraction(1, 1000) if times is not None else 1 / Fraction(fps)
                    )
                    voice: Any = container.add_stream("aac", rate=8000, layout="mono") if sound else None
                    container.metadata.update(kept)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if sound:
                quiet = av.AudioFrame.from_ndarray(
                    np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
                )
                quiet.sample_rate, quiet.pts = 8000, 0
                container.mux([*voice.encode(quiet), *voice.encode(None)])
        return path

    return make
