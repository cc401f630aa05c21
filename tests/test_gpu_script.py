"""tests/gpu/all.py on any machine: what fails or lacks something is reported, and the rest goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "gpu" / "all.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_all", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_is_reported_and_the_next_one_runs(script, tmp_path, monkeypatch):
    commands = {
        "facts": [sys.executable, "-c", "import json; print(json.dumps({'device': 'a card'}))"],
        "tests": [sys.executable, "-c", "import a_package_that_is_not_there"],
        "bench": [sys.executable, "-c", "import os; print(os.environ['MIMIR_GPU_FIGURES'])"],
    }
    monkeypatch.setattr(script, "parts", lambda *_: commands)
    assert script.main(["--out", str(tmp_path / "out"), "--parts", "facts", "tests", "bench"]) == 1
    found = json.loads((tmp_path / "out" / "all.json").read_text())
    assert found["device"] == "a card" and len(found["date"]) == 10
    assert [found[name]["state"] for name in commands] == ["ok", "ended with 1", "ok"]
    assert "a_package_that_is_not_there" in found["tests"]["end"][-1]
    assert (tmp_path / "out" / "bench.log").read_text().strip() == str(tmp_path / "out" / "gpu_tests.json")


def test_a_part_without_end_is_stopped(script, tmp_path):
    waiting = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    found = script.run(waiting, tmp_path / "x.log", 2.0, tmp_path)
    assert found["state"] == "stopped, the time was over" and found["end"] == ["begun"]


def test_every_part_has_a_command(script, tmp_path):
    for comfyui, module in ((None, "mimir_core.bench"), ("/comfy", "launcher.inside")):
        made = script.parts(tmp_path, 9.0, comfyui)
        assert list(made) == ["facts", "tests", "bench", "compile", "train"] and module in made["bench"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_a_gpu_it_says_so(script, tmp_path):
    assert script.main(["--out", str(tmp_path), "--parts", "facts"]) == 0
    assert "no NVIDIA GPU" in json.loads((tmp_path / "all.json").read_text())["device"]
