"""The README says what is true: its tree, its tables, its links."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from mimir_core.config import DIT_PRESETS, FUSER_PRESETS, PHI_PRESETS
from mimir_core.dit import CogVideoXTransformer
from mimir_core.fuser import TokenFuser
from mimir_core.phi import Phi3ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATED = {"runs"}  # named in .gitignore


def tree() -> dict[str, str]:
    """{path: remark} of the tree in the README; folders end in a slash."""
    block = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert block, "the README has no tree"
    found: dict[str, str] = {}
    folder = ""
    for line in block[1].splitlines():
        match = re.fullmatch(r"(  )?(\S+)\s+(\S.*)", line)
        assert match, f"a line of the tree without a remark: {line!r}"
        indent, name, remark = match.groups()
        folder = folder if indent else ""
        found[folder + name] = remark
        folder = folder or (name if name.endswith("/") else "")
    return found


def listed(folder: Path) -> set[str]:
    """What is in a folder, without what Python and editors leave there; folders end in a slash."""
    names = {p.name + "/" * p.is_dir() for p in folder.iterdir() if p.name[0] not in "._"}
    return names - {f"{name}/" for name in GENERATED}


def test_the_tree_names_everything_at_the_top() -> None:
    top = {path for path in tree() if "/" not in path.rstrip("/")}
    assert top == listed(ROOT) | {"__init__.py"}


@pytest.mark.parametrize("folder", ["mimir_core", "nodes", "launcher"])
def test_the_tree_names_every_module(folder: str) -> None:
    named = {path.removeprefix(f"{folder}/") for path in tree() if path.startswith(f"{folder}/")} - {""}
    assert named == listed(ROOT / folder)


def shown_names() -> Iterator[tuple[str, str]]:
    """(id, display name) of every node, from `schema("MimirX", "Display Name", ...)` in nodes/."""
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "schema":
                yield ast.literal_eval(call.args[0]), ast.literal_eval(call.args[1])


def test_the_node_table_is_the_pack() -> None:
    rows = dict(re.findall(r"^\| `(Mimir\w+)` \| ([^|]+?) \|", README, re.MULTILINE))
    assert rows == dict(shown_names())


def test_the_template_table_is_the_folder() -> None:
    rows = re.findall(r"^\| `(mimir_\w+)` \|", README, re.MULTILINE)
    assert sorted(rows) == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


MEMORY = {
    "DiT, CogVideoX-5B": lambda: CogVideoXTransformer(DIT_PRESETS["5b"]),
    "DiT, CogVideoX-1.5-5B": lambda: CogVideoXTransformer(DIT_PRESETS["1.5-5b"]),
    "DiT, CogVideoX-2B": lambda: CogVideoXTransformer(DIT_PRESETS["2b"]),
    "Phi-3.5-mini": lambda: Phi3ForCausalLM(PHI_PRESETS["phi-3.5-mini"]),
    "Token Fuser": lambda: TokenFuser(FUSER_PRESETS["mimir"]),
}


@pytest.mark.parametrize("part", MEMORY)
def test_the_memory_table_is_computed_right(part: str) -> None:
    row = re.search(rf"^\| {re.escape(part)} \| ([\d.]+) B \| ([\d.]+) \| ([\d.]+)?", README, re.MULTILINE)
    assert row, f"no row for {part}"
    with torch.device("meta"):
        module = MEMORY[part]()
    billions = sum(parameter.numel() for parameter in module.parameters()) / 1e9
    assert row[1] == f"{billions:.2f}"
    assert row[2] == f"{2 * billions:.2f}"
    assert row[3] in (None, f"{fp8(module):.2f}")


def fp8(module: nn.Module) -> float:
    """Gigabytes where the matrices of the blocks are fp8 and all else stays 16 bit."""
    blocks = ("transformer_blocks.", "model.layers.")
    sizes = [(1 if name.startswith(blocks) and parameter.ndim == 2 else 2, parameter.numel())
             for name, parameter in module.named_parameters()]  # fmt: skip
    return sum(size * count for size, count in sizes) / 1e9


@pytest.mark.parametrize(("marker", "alone"), [("tiny results", "t5"), ("tiny control", "control")])
def test_the_tables_of_mimir_tiny_are_its_results(marker: str, alone: str) -> None:
    results = json.loads((ROOT / "docs" / f"{marker.replace(' ', '_')}.json").read_text(encoding="utf-8"))
    block = re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", README, re.DOTALL)
    assert block, f"no table between <!-- {marker} -->"
    header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in block[1].splitlines()]
    assert [row[0] for row in rows] == list(results["truth"])
    for column, title in enumerate(header[1:], 1):
        style, reader = title.replace("plain", "simple").replace("T5 alone", alone).split(", ")
        for row in rows:
            assert row[column] == f"{100 * results[f'{style}/{reader}'][row[0]]:.0f}", (row[0], title)
