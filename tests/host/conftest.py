"""Tests on a real ComfyUI.

Two kinds:

* `tests/host/test_*.py` talk HTTP to one ComfyUI process, started once per session with this pack in it.
  Use the fixtures `host` (a `launcher.client.Client`: `host.run(prompt)`, `host.object_info()`,
  `host.view(file)`), `server` (its process: `server.log`, `server.base`) and `object_info`.

* `tests/host/inprocess/test_*.py` import ComfyUI itself (CPU), for numerics: see the conftest.py there.
  They live in a process of their own, because ComfyUI's top modules (`nodes`, `comfy`, `utils`) must not
  leak into the other tests. `pytest` runs that process by itself (test_inprocess.py); `pytest
  tests/host/inprocess/test_x.py` runs one directly.

The ComfyUI is the one of `--comfyui`, COMFYUI_PATH, or the one that run.py has fetched. Without any, these
tests are skipped with the reason, except under `python run.py test`, where that is a failure.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.client import Client
from launcher.comfyui import Comfy, find
from launcher.environment import overlay_folder
from launcher.server import Server

INPROCESS = Path(__file__).parent / "inprocess"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave inprocess/ to a process that runs nothing else."""
    if collection_path != INPROCESS:
        return None
    named = [Path(str(argument).split("::")[0]).absolute() for argument in config.args]
    return None if all(path.is_relative_to(INPROCESS) for path in named) else True


@pytest.fixture(scope="session")
def comfy() -> Comfy:
    """The ComfyUI sources that the host tests use."""
    found = find()
    if found is None:
        reason = "no ComfyUI: `python run.py test` fetches one, or set COMFYUI_PATH"
        if os.environ.get("MIMIR_NEEDS_HOST"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def server(comfy: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with this pack in a fresh base directory."""
    overlay = overlay_folder(comfy)
    base = tmp_path_factory.mktemp("comfyui")
    with Server(comfy, Path(sys.executable), base, overlay=overlay if overlay.is_dir() else None) as running:
        yield running


@pytest.fixture(scope="session")
def host(server: Server) -> Client:
    """The HTTP API of the running ComfyUI."""
    return Client(server.url, alive=server.raise_if_dead)


@pytest.fixture(scope="session")
def object_info(host: Client) -> dict[str, Any]:
    """The schemas of every node of the host."""
    return host.object_info()
