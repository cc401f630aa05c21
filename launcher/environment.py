"""The .venv in the checkout: made once, completed when requirements change, left alone otherwise.

What is installed is written down in .venv/mimir-installed.json, so that the next run starts without asking
pip.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .comfyui import CACHE, ROOT, Comfy
from .console import Failure, say, step

VENV = ROOT / ".venv"
STAMP = VENV / "mimir-installed.json"
PYTHONS = ((3, 10), (3, 13))
TORCH = ("torch==2.10.0", "torchvision==0.25.0", "torchaudio==2.10.0")
XFORMERS = "xformers==0.0.35"
# The CUDA build that comes from the index on Linux is 7 GB with its libraries; elsewhere it is the CPU build.
DISK_GB = 10 if sys.platform == "linux" else 4

NEEDED = ("torch", "aiohttp", "diffusers", "transformers", "safetensors", "einops", "tokenizers")
PROBE = """
import importlib.util, json, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
accelerator = False
if "torch" not in missing:
    import torch
    accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    accelerator = accelerator or (hasattr(torch, "xpu") and torch.xpu.is_available())
print(json.dumps({"missing": missing, "accelerator": accelerator}))
"""

PIP_REMEDIES = (
    ("No space left", "Free some space (about {gb} GB are needed) and run the same command again."),
    ("not enough space", "Free some space (about {gb} GB are needed) and run the same command again."),
    (
        "No matching distribution",
        "No wheel for this system and Python {python}; use Python 3.11 or 3.12.",
    ),
    ("SSLError", "A proxy seems to replace certificates: set PIP_CERT to its certificate file."),
    ("onnection", "Check the network; a proxy goes into HTTPS_PROXY, a mirror into PIP_INDEX_URL."),
)


@dataclass(frozen=True)
class Environment:
    """A Python that can run the host. `overlay`: the host's own pinned frontend, to come first on
    PYTHONPATH."""

    python: Path
    overlay: Path | None
    cpu: bool


def ensure_venv() -> Path:
    """Make .venv if there is none that works; returns its Python."""
    check_python()
    python = venv_python()
    if python.exists() and _runs(python, "-c", "import pip"):
        return python
    with step("Making .venv"):
        run = subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True
        )
    if run.returncode:
        raise Failure(
            f"Python could not make {VENV}: {(run.stdout + run.stderr).strip()}",
            "On Debian and Ubuntu: apt install python3-venv. Elsewhere install Python from python.org.",
        )
    return python


def check_python() -> None:
    """Raises Failure for a Python that the tested packages do not exist for."""
    low, high = PYTHONS
    if not low <= sys.version_info[:2] <= high:
        raise Failure(
            f"This is Python {sys.version.split()[0]}; Mimir's environment needs 3.{low[1]} to 3.{high[1]}.",
            f"Start it with one of those, for example: python3.11 {ROOT.name}/run.py demo",
        )


def ensure(comfy: Comfy, tests: bool = False) -> Environment:
    """Install what is missing for this host (and for the tests) and describe the result."""
    # The .venv is installed without bytecode: each module's is to be written when it is first imported.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    python = ensure_venv()
    with exclusive(CACHE / "install.lock"):
        _install(python, comfy, tests)
    return Environment(python, overlay_folder(comfy), cpu=not _stamp().get("accelerator"))


def _install(python: Path, comfy: Comfy, tests: bool) -> None:
    constraint = CACHE / "constraints.txt"
    constraint.write_text("\n".join(TORCH) + "\n", encoding="utf-8")
    limits = ["-c", str(constraint)]
    pins, others = split_requirements(comfy.requirements)
    if "torch" not in _stamp():
        _check_disk()
    _phase(python, "torch", "PyTorch (the largest part, some minutes)", list(TORCH))
    if nvidia():
        _phase(python, "xformers", "xformers", ["--no-deps", XFORMERS], optional=True)
    _phase(
        python,
        f"host {comfy.version}",
        f"ComfyUI's and Mimir's requirements ({comfy.version})",
        [*limits, *others, "-r", str(ROOT / "requirements.txt")],
    )
    _phase(
        python,
        f"frontend {comfy.version}",
        "ComfyUI's frontend",
        ["--upgrade", "--target", str(overlay_folder(comfy)), *pins],
    )
    if tests:
        _phase(python, "tests", "test tools", [*limits, "-r", str(ROOT / "requirements-test.txt")])
    _note_accelerator(python)


def split_requirements(file: Path) -> tuple[list[str], list[str]]:
    """A host's requirements as (its own comfyui-* packages, everything else). The first differ from host to
    host and go into a folder of their own, so that one environment serves several hosts."""
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    pins = [line for line in lines if line.startswith("comfyui")]
    return pins, [line for line in lines if line and line not in pins]


def overlay_folder(comfy: Comfy) -> Path:
    """Where the frontend of this host lies."""
    return CACHE / f"frontend-{_digest(split_requirements(comfy.requirements)[0])}"


def _phase(python: Path, name: str, title: str, arguments: list[str], optional: bool = False) -> None:
    """One pip call, unless the stamp says that exactly this has been installed."""
    digest = _digest([*arguments, *_contents(arguments)])
    if _stamp().get(name) == digest:
        return
    try:
        with step(f"Installing {title}"):
            pip(python, arguments)
    except Failure as failure:
        if not optional:
            raise
        say(f"Going on without {name}: {failure.problem}")
        return
    _write_stamp({name: digest})


def pip(python: Path, arguments: list[str]) -> None:
    """`pip install`; raises Failure with the reason and what to do."""
    # Without --no-compile pip compiles thousands of modules that nothing ever imports; see `ensure`.
    flags = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    command = [str(python), "-m", "pip", "install", *flags, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if run.returncode == 0:
        return
    output = run.stdout + run.stderr
    log = CACHE / "pip.log"
    log.write_text(" ".join(command) + "\n" + output, encoding="utf-8")
    errors = [line for line in output.splitlines() if line.startswith("ERROR")] or output.splitlines()
    raise Failure(
        "pip failed:\n" + "\n".join(errors[-6:]), pip_remedy(output) + f" pip's whole output is in {log}."
    )


def pip_remedy(output: str) -> str:
    """What to do about a failed pip, from what it printed."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for sign, remedy in PIP_REMEDIES:
        if sign in output:
            return remedy.format(gb=DISK_GB, python=python)
    return "Run the same command again; if it fails again, delete .venv and try once more."


def nvidia() -> bool:
    """Whether this machine has an NVIDIA GPU with a driver."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and "GPU" in subprocess.run([tool, "-L"], capture_output=True, text=True).stdout


def probe(python: Path) -> dict[str, list[str] | bool]:
    """What that Python lacks of NEEDED, and whether its torch can use a GPU (CUDA, ROCm, XPU or Apple's)."""
    run = subprocess.run([str(python), "-c", PROBE, *NEEDED], capture_output=True, text=True)
    try:
        return json.loads(run.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise Failure(
            f"{python} does not work: {(run.stderr.strip() or 'no output').splitlines()[-1]}"
        ) from error


def _note_accelerator(python: Path) -> None:
    """Ask torch for a GPU once; again when an NVIDIA GPU has come or gone, and while torch cannot use it."""
    here, stamp = nvidia(), _stamp()
    if "accelerator" in stamp and stamp.get("nvidia") == here and (stamp["accelerator"] or not here):
        return
    with step("Looking for a GPU that PyTorch can use") as state:
        found = bool(probe(python)["accelerator"])
        state.note = "found" if found else "none: everything runs on the CPU"
    _write_stamp({"accelerator": found, "nvidia": here})
    if here and not found:
        say(
            "There is an NVIDIA GPU, but this PyTorch cannot use it. "
            "On Windows install PyTorch's CUDA build into .venv; elsewhere update the driver."
        )


def _check_disk() -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB:
        raise Failure(
            f"{ROOT} has {free:.1f} GB free; the environment needs about {DISK_GB} GB.",
            "Free some space, or clone to another disk, or pass --comfyui with a ComfyUI that has its own.",
        )


def own_python(comfy: Comfy) -> Path | None:
    """The Python that a ComfyUI brings itself: a virtual environment in or beside it, or the portable
    build's."""
    folders = [top / name for top in (comfy.path, comfy.path.parent) for name in (".venv", "venv")]
    candidates = [venv_python(folder) for folder in folders if folder != VENV]
    candidates.append(comfy.path.parent / "python_embeded" / "python.exe")
    return next((p for p in candidates if p.exists()), None)


def use_own_python(python: Path) -> Environment:
    """Use a ComfyUI's own Python as it is; raises Failure when it lacks something that the nodes import."""
    with step(f"Looking at ComfyUI's own Python, {python}"):
        found = probe(python)
    if found["missing"]:
        raise Failure(
            f"ComfyUI's own Python lacks {', '.join(found['missing'])}.",  # type: ignore[arg-type]
            f"Install it there: {python} -m pip install -r {ROOT / 'requirements.txt'}",
        )
    return Environment(python, None, cpu=not found["accelerator"])


def venv_python(folder: Path = VENV) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


@contextmanager
def exclusive(path: Path, busy: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file: two pips in one environment mix their packages, two hosts in one base directory
    their files. `busy` is called once if another process has it; unless it raises, that one is waited for."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as file:
        if not _locked(file.fileno()):
            busy()
            while not _locked(file.fileno()):
                time.sleep(0.2)
        yield  # closing the file gives the lock back, and so does the end of the process


def _locked(descriptor: int) -> bool:
    """Take the lock if nobody has it; returns whether it was taken."""
    if sys.platform != "win32":
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
    import msvcrt

    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def _runs(python: Path, *arguments: str) -> bool:
    try:
        return subprocess.run([str(python), *arguments], capture_output=True).returncode == 0
    except OSError:
        return False


def _contents(arguments: list[str]) -> list[str]:
    """The text of the requirement files among pip's arguments."""
    return [
        Path(a).read_text(encoding="utf-8") for a in arguments if a.endswith(".txt") and Path(a).is_file()
    ]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _stamp() -> dict[str, str | bool]:
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_stamp(news: dict[str, str | bool]) -> None:
    STAMP.write_text(json.dumps({**_stamp(), **news}, indent=1), encoding="utf-8")
