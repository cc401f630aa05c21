"""Tests in ComfyUI's real page: a host of their own, and Chromium driven by Playwright.

Without Chromium or Playwright these tests are skipped, which pytest's summary says with the reason; with
MIMIR_NEEDS_BROWSER=1 that is a failure. `apt-get install chromium` and `pip install playwright` bring both
(Playwright's own browsers are not needed). MIMIR_CHROMIUM names a browser that is somewhere else.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from launcher.client import Client
from launcher.comfyui import find
from launcher.environment import overlay_folder
from launcher.server import Server

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Nothing but the page itself: no sandbox (root in containers), no GPU, no calls home.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-extensions",
    "--no-first-run", "--autoplay-policy=no-user-gesture-required",
)  # fmt: skip
# No welcome, no warning dialog over the graph, the same rendering on every host.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.VueNodes.Enabled": False,
}
DISMISSED = "localStorage.setItem('vueNodesBannerDismissed', 'true')"
# The default workflow is loaded last; before it is there it could replace what a test opens.
READY = "() => window.app?.graph && window.app?.vueAppReady && app.extensionManager?.workflow?.activeWorkflow"


def unavailable(reason: str) -> NoReturn:
    """Skip with the reason, or fail where the browser tests are demanded."""
    if os.environ.get("MIMIR_NEEDS_BROWSER"):
        pytest.fail(reason)
    pytest.skip(f"BROWSER TESTS NOT RUN: {reason}")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A Playwright browser."""
    named = os.environ.get("MIMIR_CHROMIUM")
    path = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        unavailable("no Chromium (apt-get install chromium, or set MIMIR_CHROMIUM)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("no Playwright (pip install playwright)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(chromium: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running ComfyUI with this pack in a fresh base directory."""
    comfy = find()
    if comfy is None:
        unavailable("no ComfyUI (`python run.py test` fetches one, or set COMFYUI_PATH)")
    overlay = overlay_folder(comfy)
    base = tmp_path_factory.mktemp("browser")
    with Server(comfy, Path(sys.executable), base, overlay=overlay if overlay.is_dir() else None) as running:
        Client(running.url).post("/api/settings", SETTINGS)
        yield running


@pytest.fixture
def page(chromium: Any, server: Server) -> Iterator[Any]:
    """The page, ready for use, in a browser that remembers nothing."""
    context = chromium.new_context(viewport={"width": 1600, "height": 900})
    page = context.new_page()
    page.add_init_script(DISMISSED)
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_selector("#graph-canvas", timeout=120_000)
    page.wait_for_function(READY, timeout=120_000)
    yield page
    context.close()
