"""For tests that import ComfyUI into their own process: on the CPU, in float32, with nothing of the user's.

    import comfy.sd, nodes                            # ComfyUI's own modules
    from mimir_pack.nodes.host import load_model      # this pack, as ComfyUI would load it: one package
    from mimir_pack.mimir_core.config import PRESETS  # its core, the same objects that its nodes use

Here the plain name `mimir_core` is out of reach on purpose: it would be a second copy of every class, and
`isinstance` between the two fails. Calls of nodes need `torch.inference_mode()`, as the host has it:
`run_node`.

Fixture `run_node(NodeClass, **inputs) -> tuple`: executes one of our V3 nodes or one of ComfyUI's V3 nodes
and returns its outputs. Run one file alone: `COMFYUI_PATH=... python -m pytest
tests/host/inprocess/test_x.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def _enter_comfyui() -> None:
    """Put ComfyUI first on sys.path and have its modules set themselves up for the CPU."""
    from launcher.comfyui import find
    from launcher.inside import enter, name_the_pack

    comfy = find()
    if comfy is None:
        pytest.exit("no ComfyUI: `python run.py test` fetches one, or set COMFYUI_PATH", returncode=2)
    enter(comfy, cpu=True)
    name_the_pack()


_enter_comfyui()


@pytest.fixture
def run_node() -> Callable[..., tuple[Any, ...]]:
    """Execute a V3 node class as the host does and return its outputs."""
    import torch

    def run(node: Any, **inputs: Any) -> tuple[Any, ...]:
        with torch.inference_mode():
            output = node.EXECUTE_NORMALIZED(**inputs)
        return tuple(output.result)

    return run
