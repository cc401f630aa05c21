"""A real ComfyUI on the GPU: partial loading, and the shipped workflow with every way it manages memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.client import Client
from launcher.comfyui import Comfy, find
from launcher.environment import overlay_folder
from launcher.server import Server
from launcher.workflow import to_prompt

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "workflows" / "mimir_tiny_text_to_video.json"
DYNAMIC = "DynamicVRAM support detected and enabled"


@pytest.fixture(scope="module")
def comfy() -> Comfy:
    found = find()
    if found is None:
        pytest.skip("no ComfyUI here: set COMFYUI_PATH")
    return found


def test_a_third_of_the_dit_gives_the_same_numbers(comfy: Comfy, figure):
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "partial_load.py"), str(comfy.path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    figure("partial load", json.dumps(found))
    assert found["device"].startswith("cuda")
    assert found["loaded"]["whole"] > 0.99 and 0 < found["loaded"]["partial"] < 0.6
    assert found["equal"]


@pytest.mark.parametrize("flags", [(), ("--disable-dynamic-vram",), ("--novram",)], ids=" ".join)
def test_the_workflow_runs_however_memory_is_managed(comfy: Comfy, tmp_path, figure, flags):
    if flags == ("--disable-dynamic-vram",) and not knows_flag(comfy, "disable-dynamic-vram"):
        pytest.skip(f"ComfyUI {comfy.version} has no dynamic VRAM")
    overlay = overlay_folder(comfy)
    overlay = overlay if overlay.is_dir() else None
    with Server(comfy, Path(sys.executable), tmp_path, cpu=False, overlay=overlay, arguments=flags) as server:
        client = Client(server.url, alive=server.raise_if_dead)
        workflow = json.loads(TEMPLATE.read_text(encoding="utf-8"))
        run = client.run(to_prompt(workflow, client.object_info()), timeout=300)
        videos = [file for file in run.files() if file.filename.endswith((".mp4", ".webm"))]
        figure(f"host {comfy.version} {' '.join(flags)}: seconds", sum(run.seconds.values()))
        figure(f"host {comfy.version} {' '.join(flags)}: dynamic VRAM", str(DYNAMIC in server.log))
    assert (
        videos
        and (server.base / videos[0].type / videos[0].subfolder / videos[0].filename).stat().st_size > 1000
    )


def knows_flag(comfy: Comfy, flag: str) -> bool:
    return f'"--{flag}"' in (comfy.path / "comfy" / "cli_args.py").read_text(encoding="utf-8")
