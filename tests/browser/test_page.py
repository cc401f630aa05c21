"""The templates as a person meets them: opened in ComfyUI's page, and run with its Run button."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.client import Client
from launcher.server import PACK_FOLDER, Server
from launcher.workflow import to_prompt

TEMPLATES = sorted(p.stem for p in (Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
TINY = "mimir_tiny_text_to_video"
RUN_BUTTON = 'button[data-testid="queue-button"], [data-testid="queue-button"] button[aria-label="Run"]'
RUN_SECONDS = 180

OPEN = """async ([url, name]) => {
    const graph = await (await fetch(url)).json();
    await app.loadGraphData(graph, true, true, name);
    return app.graph._nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type);
}"""
LISTEN = """() => { window.ended = null;
    for (const end of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(end, event => { window.ended = [end, JSON.stringify(event.detail)]; }); }"""
VIDEO = """() => [...document.querySelectorAll('video')]
    .filter(v => v.videoWidth && v.getClientRects().length && v.offsetWidth)
    .map(v => ({width: v.videoWidth, height: v.videoHeight, seconds: v.duration, shown: v.offsetWidth}))[0]"""


def open_template(page: Any, name: str) -> None:
    """Open a template from where the host serves it; every node type must be known to the page."""
    missing = page.evaluate(OPEN, [f"/api/workflow_templates/{PACK_FOLDER}/{name}.json", name])
    assert not missing, f"{name} has nodes that the page does not know: {missing}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_opens_as_it_was_saved(page: Any, server: Server, name: str) -> None:
    """What the page would queue is what the launcher queues: links, widgets and their order agree."""
    open_template(page, name)
    queued = json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))
    client = Client(server.url)
    schemas = client.object_info()
    ours = to_prompt(client.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}.json"), schemas)
    assert {n: node["class_type"] for n, node in queued.items()} == {
        n: node["class_type"] for n, node in ours.items()
    }
    for number, node in queued.items():
        expected = ours[number]["inputs"]
        optional = schemas[node["class_type"]]["input"].get("optional") or {}
        extra = node["inputs"].keys() - expected.keys()  # ComfyUI 0.33 also sends SaveVideo's old `codec`
        assert extra <= optional.keys(), f"{node['class_type']}: only the page sends {extra}"
        assert {key: node["inputs"].get(key) for key in expected} == expected, node["class_type"]


def test_the_run_button_makes_a_visible_video(page: Any) -> None:
    open_template(page, TINY)
    page.evaluate(LISTEN)
    page.locator(RUN_BUTTON).first.click(timeout=20_000)
    page.wait_for_function(
        "() => window.ended || Object.keys(app.lastNodeErrors ?? {}).length", timeout=RUN_SECONDS * 1000
    )
    ended = page.evaluate("window.ended")
    assert ended and ended[0] == "execution_success", ended or page.evaluate("app.lastNodeErrors")
    page.wait_for_function(VIDEO, timeout=30_000)
    video = page.evaluate(VIDEO)
    assert (video["width"], video["height"]) == (64, 64)
    assert video["seconds"] == pytest.approx(9 / 8, abs=0.2)


def test_the_link_that_serve_prints_opens_the_template(page: Any, server: Server) -> None:
    page.goto(f"{server.url}/?template={TINY}&source={PACK_FOLDER}")
    opened = "() => window.app?.graph?._nodes?.some(n => n.type === 'MimirSampler')"
    page.wait_for_function(opened, timeout=120_000)
