"""Runs tests/host/inprocess in a process of its own and reports each of its files."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from launcher.comfyui import Comfy

INPROCESS = Path(__file__).parent / "inprocess"
ROOT = INPROCESS.parents[2]
FILES = sorted(path.name for path in INPROCESS.glob("test_*.py"))


@pytest.fixture(scope="module")
def results(
    comfy: Comfy, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[ElementTree.Element]], str]:
    """Test cases by file name, and everything the process has printed."""
    report = tmp_path_factory.mktemp("inprocess") / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(INPROCESS),
        f"--junitxml={report}",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-o",
        "junit_family=xunit1",
    ]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "COMFYUI_PATH": str(comfy.path)}, capture_output=True, text=True
    )
    cases: dict[str, list[ElementTree.Element]] = {}
    if report.exists():
        for case in ElementTree.parse(report).iter("testcase"):
            cases.setdefault(Path(case.get("file") or case.get("classname") or "").name, []).append(case)
    return cases, run.stdout + run.stderr


@pytest.mark.parametrize("file", FILES)
def test_inprocess(file: str, results: tuple[dict[str, list[ElementTree.Element]], str]) -> None:
    cases, output = results
    assert cases.get(file), f"{file} did not run:\n{output[-6000:]}"
    wrong = [
        c.get("name") for c in cases[file] if c.find("failure") is not None or c.find("error") is not None
    ]
    assert not wrong, f"{len(wrong)} of {len(cases[file])} failed: {wrong}\n{output[-12000:]}"
