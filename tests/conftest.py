"""Shared by all tests: makes `mimir_core`, `launcher` and `run` importable from a plain checkout.

The root is appended, never put first: its folder `nodes/` has the name of a top module of ComfyUI's, and
tests that import ComfyUI (tests/host/inprocess) must get ComfyUI's.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

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
