"""Tests that need an NVIDIA GPU. Without one they are skipped with the reason; `python tests/gpu/all.py` runs
them with everything else that a machine with a GPU is wanted for.

Fixture `figure(name, value)`: a number worth keeping. They are written as JSON to the file that
MIMIR_GPU_FIGURES names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REASON = "no NVIDIA GPU here that PyTorch can use"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def figures() -> Iterator[dict[str, float | str]]:
    found: dict[str, float | str] = {}
    yield found
    path = os.environ.get("MIMIR_GPU_FIGURES")
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@pytest.fixture
def figure(figures: dict[str, float | str]) -> Callable[[str, float | str], None]:
    return figures.__setitem__


@pytest.fixture(autouse=True)
def exact_and_empty() -> Iterator[None]:
    """float32 means float32, and each test starts with an empty card."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
