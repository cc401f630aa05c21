"""Runs the benchmark inside a ComfyUI, whose own CogVideoX then takes part.

    python -m launcher.inside COMFYUI [--host-flags="--use-sage-attention"] [arguments of the benchmark]

The only module here that imports ComfyUI and torch, and only when it is called, in a process of its own.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import shlex
import shutil
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .comfyui import ROOT, Comfy, read_comfy

PACK = "mimir_pack"


def main(arguments: Sequence[str] | None = None) -> int:
    """Enter the host and measure; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m launcher.inside", add_help=False)
    parser.add_argument("comfyui", type=Path)
    parser.add_argument("--host-flags", default="", help="ComfyUI's own start-up flags, in one string")
    options, rest = parser.parse_known_args(arguments)
    comfy = read_comfy(options.comfyui)
    enter(comfy, shlex.split(options.host_flags))
    name_the_pack()
    bench = importlib.import_module(f"{PACK}.mimir_core.bench.__main__")
    host = importlib.import_module(f"{PACK}.nodes.host.bench")
    notes = [f"ComfyUI's start-up flags: {options.host_flags}."] if options.host_flags else []
    notes.append(
        "ComfyUI's CogVideoX stretches the rotary positions of 5B by 1.875; that is switched off here, so "
        "that outputs can be compared. Its sin-cos positions (2B) differ from diffusers' and are left as "
        "they are."
    )
    return bench.main(rest, [host.models], {"ComfyUI": comfy.version}, notes)


def enter(comfy: Comfy, flags: Sequence[str] = (), cpu: bool | None = None) -> None:
    """Put ComfyUI first on sys.path and set it up with nothing of the user's.

    `cpu`: have it use the CPU; None for that only where there is no GPU.
    """
    sys.path[:] = [str(comfy.path), *(p for p in sys.path if Path(p or ".").resolve() != ROOT.resolve())]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if flags:
        own, sys.argv = sys.argv, [sys.argv[0], *flags]
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.cli_args")
        sys.argv = own
    args: Any = importlib.import_module("comfy.cli_args").args
    args.cpu = args.cpu or (not _accelerator() if cpu is None else cpu)
    args.base_directory = tempfile.mkdtemp(prefix="mimir-inside-")
    atexit.register(shutil.rmtree, args.base_directory, ignore_errors=True)


def name_the_pack() -> None:
    """Make this checkout importable as the package `mimir_pack`, without running its __init__: nodes are
    imported by those who want them."""
    package = types.ModuleType(PACK)
    package.__path__ = [str(ROOT)]
    sys.modules[PACK] = package


def _accelerator() -> bool:
    torch: Any = importlib.import_module("torch")
    return torch.cuda.is_available() or torch.backends.mps.is_available()


if __name__ == "__main__":
    sys.exit(main())
