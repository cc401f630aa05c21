"""Shared by all tests: makes `mimir_core`, `launcher` and `run` importable from a plain checkout.

The root is appended, never put first: its folder `nodes/` has the name of a top module of ComfyUI's, and tests that
import ComfyUI (tests/host/inprocess) must get ComfyUI's.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
