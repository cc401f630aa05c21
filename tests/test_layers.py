"""The shape of the code: who may import whom, how long things are, and that importing does nothing.

`mimir_core` imports flow down ORDER and never reach ComfyUI; only `nodes/host` knows ComfyUI's insides.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE, NODES = ROOT / "mimir_core", ROOT / "nodes"
FILES = sorted([*CORE.rglob("*.py"), *NODES.rglob("*.py")])

ORDER = (
    "config attention positions diffusion tokens phi dit fuser vae sampling headers recognise scaled weights "
    "lora_names lora describe memory plan text llm provenance conditioning pipeline "
    "labels inspect compare data train bench tiny"
).split()
HOST = set("comfy comfy_api comfy_extras comfy_execution folder_paths nodes server node_helpers".split())
LOOPS = 120  # lines of a training loop
TRAINING = ("tiny/", "train/loop.py")
NETWORK_MODULES = {"dit", "phi", "fuser", "vae"}
MATHS_MODULES = {"diffusion"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(relative level, dotted name) of every import in a file, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)


def core_violations(folder: Path = CORE) -> list[str]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        where = path.relative_to(folder)
        depth = len(where.parts)  # 1 in mimir_core itself, 2 in mimir_core/tiny
        unit = where.parts[0].removesuffix(".py")
        allowed = ORDER[: ORDER.index(unit)] if unit in ORDER else []
        for level, name in imports(path):
            head = name.split(".")[0]
            inside = depth > 1 and level < depth and level > 0
            outside = level > depth or (level == 0 and head in HOST | {"mimir_core"})
            if outside or (level == depth and head not in allowed and not inside):
                found.append(f"{where}: {'.' * level}{name}")
        if unit not in [*ORDER, "__init__"]:
            found.append(f"{where}: not in the list")
    return found


def test_core_imports_flow_one_way():
    assert core_violations() == []


def test_the_rule_catches_violations(tmp_path):
    (tmp_path / "config.py").write_text("from .dit import Block\n")  # upwards
    (tmp_path / "dit.py").write_text("def f():\n    import comfy.ops\nfrom . import config\n")  # the host
    (tmp_path / "fuser.py").write_text("from ..nodes import host\n")  # out of the library
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "world.py").write_text("from ..dit import Block\nfrom .captions import x\n")
    expected = ["config.py: .dit", "dit.py: comfy.ops", "fuser.py: ..nodes"]
    assert core_violations(tmp_path) == expected


def test_networks_maths_and_samplers_are_apart():
    for module in NETWORK_MODULES | MATHS_MODULES | {"sampling"}:
        seen = {name.split(".")[0] for level, name in imports(CORE / f"{module}.py") if level == 1}
        banned = {"sampling", "weights"} | (NETWORK_MODULES | MATHS_MODULES) - {module}
        if module == "sampling":
            banned -= MATHS_MODULES
        assert not seen & banned, module


def test_only_the_host_package_knows_comfyui():
    found = []
    for path in sorted(NODES.glob("*.py")):
        for level, name in imports(path):
            head = name.split(".")[0]
            if level == 0 and head in HOST - {"comfy_api"}:
                found.append(f"{path.name}: {name}")
    assert found == []


def functions() -> list[tuple[str, int]]:
    """(where, lines) of every function; decorators and docstrings do not count."""
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                size = node.end_lineno - body[0].lineno + 2 if body and node.end_lineno else 1
                found.append((f"{path.relative_to(ROOT).as_posix()}:{node.name}", size))
    return found


def is_loop(where: str) -> bool:
    """A function of the training code whose name says train."""
    file, name = where.split(":")
    return "train" in name and any(part in file for part in TRAINING)


def test_functions_are_short():
    sizes = sorted(size for _, size in functions())
    assert sizes[len(sizes) // 2] <= 12, "median"
    assert sizes[len(sizes) * 9 // 10] <= 40, "90th percentile"
    too_long = [
        (where, size)
        for where, size in functions()
        if not where.endswith(":define_schema")  # a table of inputs, not code to follow
        and size > (LOOPS if is_loop(where) else 60)
    ]
    assert too_long == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_merely_called_at_import(path):
    """A statement that is only a call can have no other purpose than a side effect."""
    calls = [
        node.lineno
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    assert calls == []


PROBE = """
import builtins, importlib, logging, os, pathlib, socket, sys
import torch, safetensors.torch, transformers  # what other libraries do is their own affair
from diffusers import AutoencoderKLCogVideoX

def refuse(*args, **kwargs):
    raise AssertionError(f"side effect at import: {args[:2]}")

real_open = builtins.open
def reading_only(file, mode="r", *args, **kwargs):
    if any(letter in str(mode) for letter in "wax+"):
        refuse(file, mode)
    return real_open(file, mode, *args, **kwargs)

torch.cuda._lazy_init = torch.cuda.device_count = torch.cuda.is_available = refuse
socket.socket.connect = pathlib.Path.mkdir = os.mkdir = os.makedirs = refuse
builtins.open = reading_only
sys.dont_write_bytecode = True
root = logging.getLogger()
before = (list(root.handlers), root.level, torch.get_num_threads(), torch.get_default_dtype())
for name in sys.argv[1:]:
    importlib.import_module(name)
assert before == (list(root.handlers), root.level, torch.get_num_threads(), torch.get_default_dtype())
assert logging.getLogger("mimir_core").handlers == [] and not torch.cuda.is_initialized()
print("clean")
"""


def test_importing_has_no_side_effects(tmp_path):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted(CORE.rglob("*.py"))
        if path.stem != "__main__"
    ]
    empty = tmp_path / "empty"
    empty.mkdir(mode=0o555)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PROBE, *modules], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "clean" and list(empty.iterdir()) == []
