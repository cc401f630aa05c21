"""Starts a ComfyUI with this pack in a base directory of its own, on 127.0.0.1 only, and stops it again."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from .client import Client
from .comfyui import CACHE, ROOT, Comfy
from .console import Failure, say
from .environment import exclusive

PACK_FOLDER = "ComfyUI-Mimir"
HOST_ADDRESS = "127.0.0.1"
START_SECONDS = 180.0
JUNCTION_TAG = 0xA0000003
# Copied where the system allows no link: everything that ComfyUI reads from a pack.
PACK_CONTENTS = (
    "__init__.py",
    "mimir_core",
    "nodes",
    "js",
    "workflows",
    "subgraphs",
    "locales",
    "pyproject.toml",
)


@dataclass
class Server:
    """A ComfyUI process. A context manager: entering starts it and waits until it answers, leaving ends
    it."""

    comfy: Comfy
    python: Path
    base: Path
    port: int = 0  # 0: any free one
    cpu: bool = True
    overlay: Path | None = None  # a folder that comes first on PYTHONPATH: the host's own pinned frontend
    arguments: tuple[str, ...] = ()
    pack: bool = True
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def url(self) -> str:
        return f"http://{HOST_ADDRESS}:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.base / "comfyui.log"

    @property
    def log(self) -> str:
        """All that the host has printed so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the host and wait until it answers; raises Failure with the end of its log if it does not."""
        self._prepare()
        self.port = free_port(self.port)
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.comfy.path,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Away from the terminal's group, so that a Ctrl-C reaches the host only when we end it.
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the process and wait for its end."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)

    def raise_if_dead(self) -> None:
        """Raises Failure with the last lines of the log when the host has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise Failure(
                f"ComfyUI ended with code {self.process.returncode}. Its last lines:\n{self.log_tail()}",
                f"The whole log is in {self.log_path}.",
            )

    def _prepare(self) -> None:
        for name in ("custom_nodes", "models", "input", "output", "temp", "user/default"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        settings = self.base / "user" / "default" / "comfy.settings.json"
        if not settings.exists():  # no welcome dialog over the graph
            settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}), encoding="utf-8")
        if self.pack:
            link_pack(self.base / "custom_nodes" / PACK_FOLDER)

    def _command(self) -> list[str]:
        command = [
            str(self.python),
            "main.py",
            "--listen",
            HOST_ADDRESS,
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base),
            "--database-url",
            "sqlite:///:memory:",
            "--disable-api-nodes",
            "--disable-auto-launch",
            *self.arguments,
        ]
        if self.cpu:
            command.append("--cpu")
        if not self.comfy.managed:
            command += ["--extra-model-paths-config", str(self._model_paths())]
        return command

    def _model_paths(self) -> Path:
        """A file that lets this base directory see the models of the ComfyUI that is used (JSON is YAML
        too)."""
        models = self.comfy.path / "models"
        folders = sorted(p.name for p in models.iterdir() if p.is_dir()) if models.is_dir() else []
        path = self.base / "model_paths.yaml"
        entries = {name: name for name in folders if name != "configs"}
        path.write_text(json.dumps({"comfyui": {"base_path": str(models), **entries}}), encoding="utf-8")
        return path

    def _environment(self) -> dict[str, str]:
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
        paths = [str(p) for p in (self.overlay, os.environ.get("PYTHONPATH")) if p]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "PYTHONUTF8": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }

    def _wait_until_ready(self) -> None:
        client, end = Client(self.url), time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            self.raise_if_dead()
            if client.answers():
                return
            time.sleep(0.1)
        raise Failure(
            f"ComfyUI did not answer in {START_SECONDS:.0f} s. Its last lines:\n{self.log_tail()}",
            f"The whole log is in {self.log_path}.",
        )


def free_port(wanted: int) -> int:
    """`wanted` if it is free, any free one for 0; raises Failure if it is taken."""
    with socket.socket() as probe:
        if sys.platform != "win32":  # as the server itself does: a port just left is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST_ADDRESS, wanted))
        except OSError as error:
            raise Failure(
                f"Port {wanted} is taken ({error.strerror}).",
                "Stop the program that has it, or choose another with --port.",
            ) from error
        return probe.getsockname()[1]


def link_pack(place: Path) -> None:
    """Make this checkout appear at `place`: a link, a junction on Windows, a copy where neither is
    allowed."""
    if place.is_symlink() or _is_junction(place):
        if place.exists() and place.resolve() == ROOT.resolve():
            return
        place.unlink() if place.is_symlink() else place.rmdir()
    if place.is_dir():
        shutil.rmtree(place)
    try:
        place.symlink_to(ROOT, target_is_directory=True)
    except (OSError, NotImplementedError):
        if not _junction(place):
            _copy_pack(place)


def _is_junction(place: Path) -> bool:
    """Whether it is a Windows junction, which Python before 3.12 takes for a plain folder."""
    return os.path.lexists(place) and getattr(place.lstat(), "st_reparse_tag", 0) == JUNCTION_TAG


def _junction(place: Path) -> bool:
    if sys.platform != "win32":
        return False
    made = subprocess.run(["cmd", "/c", "mklink", "/J", str(place), str(ROOT)], capture_output=True)
    return made.returncode == 0


def _copy_pack(place: Path) -> None:
    place.mkdir(parents=True)
    for name in PACK_CONTENTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, place / name)


def base_folder(command: str) -> Path:
    """The base directory of a command of run.py: `demo` and `serve` can run side by side. Hold `claimed`
    while using it."""
    return CACHE / command


def claimed(command: str) -> AbstractContextManager[None]:
    """Keep the command's base directory from a second run.py, whose host would mix its videos, temporary
    files and log with ours. A second demo waits, a second serve (it might wait for ever) raises Failure."""

    def busy() -> None:
        if command == "serve":
            raise Failure(
                "Another `run.py serve` is running in this folder.", "Use its page, or stop it with Ctrl-C."
            )
        say(f"Another `run.py {command}` is running in this folder; this one starts when that has ended.")

    return exclusive(CACHE / f"{command}.lock", busy)
