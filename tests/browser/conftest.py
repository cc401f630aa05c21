"""Tests in the real page: headless Chromium on a running ComfyUI with this pack.

They need the Python package playwright and a Chromium of the system (`apt install chromium`, or its path in
CHROMIUM); without them they are skipped with the reason.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.client import Client
from launcher.comfyui import find
from launcher.environment import overlay_folder
from launcher.server import Server

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
]
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
READY = (
    "window.app && app.graph && app.canvas && app.vueAppReady && app.extensionManager.workflow.activeWorkflow"
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    comfy = find()
    if comfy is None:
        pytest.skip("no ComfyUI: `python run.py test` fetches one, or set COMFYUI_PATH")
    overlay = overlay_folder(comfy)
    base = tmp_path_factory.mktemp("browser")
    with Server(comfy, Path(sys.executable), base, overlay=overlay if overlay.is_dir() else None) as running:
        yield running


@pytest.fixture(scope="session")
def host(server: Server) -> Client:
    return Client(server.url, alive=server.raise_if_dead)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt install chromium, or set CHROMIUM")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, host: Client) -> Iterator[Any]:
    """ComfyUI's page, ready, in a fresh profile. `page.errors`: its complaints that are ours."""
    host.post("/api/settings", SETTINGS)
    context = browser.new_context(viewport={"width": 1500, "height": 950})
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: _note(page.errors, message))
    page.goto(host.url)
    page.wait_for_function(READY, timeout=120_000)
    yield page
    context.close()


def _note(errors: list[str], message: Any) -> None:
    if message.type == "error" and "mimir" in message.text.lower():
        errors.append(message.text)
