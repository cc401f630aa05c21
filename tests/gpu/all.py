"""Everything that a machine with an NVIDIA GPU is wanted for, in one call.

    python tests/gpu/all.py --out DIR [--minutes 9] [--parts facts tests bench compile train]

Parts run in this order, each in a process of its own; one that fails or lacks a package is reported, and the
rest goes on. `tests` gets a third of the time at most; `train` begins the training of Mimir Tiny and is
stopped when the time is over. DIR gets one log for each part, gpu_tests.json (figures of the tests),
bench_gpu and bench_gpu_compiled (.json and .md), and all.json, which says what happened, where and when.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARE = 1 / 3  # of the time, for the tests and for each round of measuring
FACTS = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
if found["available"]:
    properties = torch.cuda.get_device_properties(0)
    found.update(device=properties.name, memory_gb=round(properties.total_memory / 1e9, 1))
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ b
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    found["matrix_product_tflops"] = round(10 * 2 * 8192**3 / start.elapsed_time(end) / 1e9, 1)
print(json.dumps(found))
"""


def parts(out: Path, minutes: float, comfyui: str | None) -> dict[str, list[str]]:
    """The command of each part."""
    python = sys.executable
    inside = ["-m", "launcher.inside", comfyui] if comfyui else ["-m", "mimir_core.bench"]
    bench = [python, *inside, "--minutes", f"{SHARE * minutes:.2f}", "--threads", "8"]
    bench += ["--repeats", "5", "--warmup", "1"]
    folder = tempfile.mkdtemp(prefix="mimir-tiny-")  # checkpoints; the shipped weights stay as they are
    train = ["-m", "mimir_core.tiny.train", "--device", "cuda", "--stages", "text", "vae", "--out", folder]
    return {
        "facts": [python, "-c", FACTS],
        "tests": [python, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-q", "-p", "no:cacheprovider"],
        "bench": [*bench, "--out", str(out / "bench_gpu")],
        "compile": [
            *bench,
            "--compile",
            "--only",
            "step",
            "--shapes",
            "5B 49x480",
            "--out",
            str(out / "bench_gpu_compiled"),
        ],
        "train": [python, *train],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if all that ran succeeded."""
    options = parser().parse_args(arguments)
    out = Path(options.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    commands = parts(out, options.minutes, options.comfyui)
    summary: dict[str, Any] = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    for name in options.parts:
        left = min(end - time.monotonic(), 60 * options.minutes * (SHARE if name == "tests" else 1))
        summary[name] = (
            run(commands[name], out / f"{name}.log", left, out) if left > 5 else {"state": "no time left"}
        )
        if name == "facts":
            summary["device"] = device_of(out / "facts.log")
        (out / "all.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"--- {name}: {summary[name]['state']}", flush=True)
    print(json.dumps(summary, indent=1))
    return 0 if all(summary[name]["state"] == "ok" for name in options.parts) else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("facts", "tests", "bench", "compile", "train")
    made.add_argument("--out", required=True, help="folder for logs and figures")
    made.add_argument("--minutes", type=float, default=9.0, help="for everything (default: %(default)s)")
    made.add_argument(
        "--parts", nargs="+", choices=names, default=list(names[:4]), help="default: all but train"
    )
    made.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH"), help="also: COMFYUI_PATH")
    return made


def run(command: Sequence[str], log: Path, seconds: float, out: Path) -> dict[str, Any]:
    """One part: its state, its seconds, and the end of what it printed when it failed."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "MIMIR_GPU_FIGURES": str(out / "gpu_tests.json")}
    with open(log, "wb") as file:
        try:
            code = subprocess.run(
                list(command),
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            ).returncode
            state = "ok" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            state = "stopped, the time was over"
    found: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - start, 1)}
    if state != "ok":
        found["end"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
    return found


def device_of(log: Path) -> str:
    """The name of the GPU that the facts tell, or why there is none."""
    try:
        facts = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    except (ValueError, IndexError):
        return "PyTorch does not run here"
    return facts.get("device", "no NVIDIA GPU that PyTorch can use")


if __name__ == "__main__":
    sys.exit(main())
