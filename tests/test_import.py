"""Importing the core in a fresh interpreter: whatever xformers does, and without any side effect.

The same with a whole ComfyUI around it is in tests/host/test_startup.py.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

IMPORT_ALL = """
import importlib, pkgutil, sys
import mimir_core
for module in pkgutil.walk_packages(mimir_core.__path__, "mimir_core."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
# Only what the nodes use: training Mimir Tiny imports diffusers' classes, which a broken xformers forbids.
IMPORT_CORE = IMPORT_ALL.replace('endswith("__main__")', 'startswith("mimir_core.tiny.")')
BUILD_VAE = """
from mimir_core.vae import VAE_PRESETS, build_vae
build_vae(VAE_PRESETS["tiny"], device="meta")
"""
SAY_ATTENTION = """
import torch
from mimir_core.attention import _xformers_problem, choose_attention, sdpa
chosen, reason = choose_attention("cpu")
assert chosen is sdpa, chosen
q = torch.ones(1, 1, 2, 4)
assert torch.equal(chosen(q, q, q), q)
print(reason)
print("PROBLEM", _xformers_problem(torch.device("cpu")))
"""
ABSENT = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == "xformers" else find(name, *rest)
"""


def run_python(code: str, cwd: Path, path: list[Path], **environ: str) -> str:
    """Run `code` in a new interpreter with `path` first; returns what it printed, fails on an error."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in (*path, ROOT)), **environ}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("xformers", ["broken", "useless"])
def test_a_bad_xformers_breaks_no_import_and_is_reported(xformers, fake_xformers, tmp_path):
    said = run_python(IMPORT_CORE + BUILD_VAE + SAY_ATTENTION, tmp_path, [fake_xformers(xformers)])
    assert "Attention: PyTorch SDPA, because" in said
    problem = said.split("PROBLEM")[1]
    assert {"broken": "does not import", "useless": "cannot run"}[xformers] in problem
    assert "xformers build made for this torch" in problem, "the remedy is missing"


def test_without_xformers(tmp_path):
    said = run_python(ABSENT + IMPORT_ALL + SAY_ATTENTION, tmp_path, [])
    assert "PROBLEM xFormers is not installed" in said


def test_imports_touch_nothing(tmp_path):
    """No file or folder made, no CUDA started, no logging set up, no download."""
    check = """
import logging, torch
assert not torch.cuda.is_initialized()
assert not logging.getLogger().handlers, logging.getLogger().handlers
"""
    home = tmp_path / "home"
    work = tmp_path / "work"
    home.mkdir()
    work.mkdir()
    run_python(
        IMPORT_ALL + check,
        work,
        [],
        HOME=str(home),
        USERPROFILE=str(home),
        CUDA_VISIBLE_DEVICES="",
        HF_HUB_OFFLINE="1",
        HF_HOME=str(home / "hf"),
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert list(work.iterdir()) == []
    assert [p for p in home.rglob("*") if p.is_file()] == []


def test_the_pack_without_comfyui_imports_nothing(tmp_path):
    """The root package is guarded, so that tools which import it (pytest, a linter) do not need ComfyUI."""
    code = f"""
import importlib.util, sys
file = {str(ROOT / "__init__.py")!r}
spec = importlib.util.spec_from_file_location("pack", file, submodule_search_locations=[])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not hasattr(module, "comfy_entrypoint") and not hasattr(module, "NODE_CLASS_MAPPINGS")
"""
    run_python(code, tmp_path, [])


HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server"}
OPTIONAL = {"xformers", "sklearn", "accelerate"}  # used where it is there, or asked for by name
NAMES = {"PIL": "Pillow"}  # module -> package
TOOLS = {"tiny", "data", "train", "bench"}  # started by hand, not by a graph; they say what they need


def test_a_graph_needs_nothing_beyond_requirements() -> None:
    """And these are the packages they may name: a new one is a decision, and can break an installation."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    required = set(re.findall(r"^[A-Za-z]+", text, re.MULTILINE))
    assert required == {
        "torch", "diffusers", "transformers", "safetensors", "einops", "tokenizers", "numpy", "Pillow",
        "matplotlib",
    }  # fmt: skip
    core = (path for path in (ROOT / "mimir_core").rglob("*.py") if path.parent.name not in TOOLS)
    found: set[str] = set()
    for path in [*core, *(ROOT / "nodes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module.split(".")[0])
    third_party = found - set(sys.stdlib_module_names) - HOST - OPTIONAL
    assert {NAMES.get(name, name) for name in third_party} <= required
