"""Plan Memory in a queued graph on the real host: its text is on the node and on its output."""

from __future__ import annotations

import pytest

from launcher.client import Client
from launcher.console import Failure

from .graph import Graph

PARTS = ("dit", "t5", "phi", "fuser", "vae")


def plan(host: Client, **changes: object) -> str:
    schema = host.object_info("MimirPlan")["MimirPlan"]["input"]["required"]
    widgets = {name: spec[1]["default"] for name, spec in schema.items()}
    graph = Graph(host)
    text = graph.add("MimirPlan", **{**widgets, **changes})
    graph.add("PreviewAny", source=text)
    graph.run()
    return graph.notes[text[0]]


def test_plan_of_what_is_not_on_disk_yet(host):
    text = plan(host, card="12")
    assert "CogVideoX-5B, bfloat16: partly" in text and "What helps" in text
    assert text != plan(host, card="24")


def test_plan_of_the_built_in_model(host):
    tiny = dict.fromkeys(PARTS, "built-in tiny")
    text = plan(host, **tiny, width=64, height=64, frames=9)
    assert text.count("Mimir Tiny") == 5 and "TOO LARGE" not in text


def test_a_size_that_no_model_makes_is_refused(host):
    with pytest.raises(Failure, match="frames is 50: use 49 or 57"):
        plan(host, frames=50)
