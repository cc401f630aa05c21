"""The shipped workflows in the real page: they open, they say what run.py says, and Run makes a video."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.client import Client
from launcher.server import PACK_FOLDER
from launcher.workflow import to_prompt

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
MISSING = (
    "JSON.stringify(app.graph._nodes.map(n => n.type).filter(t => !(t in LiteGraph.registered_node_types)))"
)
PROMPT = "app.graphToPrompt().then(p => JSON.stringify(p.output))"
WAIT = """() => new Promise(done => {
  for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    app.api.addEventListener(kind, event => done(JSON.stringify([kind, event.detail])));
  document.querySelector(
    'button[data-testid="queue-button"], [data-testid="queue-button"] button[aria-label="Run"]').click();
})"""


def load(page: Any, name: str) -> None:
    text = (ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")
    page.evaluate("([data, name]) => app.loadGraphData(JSON.parse(data), true, true, name)", [text, name])
    page.wait_for_timeout(500)


def inputs_only(prompt: dict[str, Any]) -> dict[str, Any]:
    return {node_id: (node["class_type"], node["inputs"]) for node_id, node in prompt.items()}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_template_opens_and_means_what_run_py_takes_it_for(page: Any, host: Client, name: str) -> None:
    load(page, name)
    assert json.loads(page.evaluate(MISSING)) == []
    theirs = json.loads(page.evaluate(PROMPT))
    saved = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    assert inputs_only(theirs) == inputs_only(to_prompt(saved, host.object_info()))
    assert page.errors == []


def test_run_makes_a_video(page: Any) -> None:
    load(page, "mimir_tiny_text_to_video")
    page.set_default_timeout(300_000)
    kind, detail = json.loads(page.evaluate(WAIT))
    assert kind == "execution_success", detail
    page.wait_for_selector("video", state="attached", timeout=30_000)
    assert page.errors == []


def test_the_link_that_serve_prints_opens_the_template(page: Any, host: Client) -> None:
    page.goto(f"{host.url}/?template=mimir_tiny_text_to_video&source={PACK_FOLDER}")
    page.wait_for_function("window.app?.graph?._nodes?.some(n => n.type === 'MimirSampler')", timeout=120_000)
