"""Inspect Tokens and Token Map in the queue: what the page gets is the STRING output, and pictures arrive."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from launcher.client import Client, File

from .graph import Graph

HOSTILE = '"$x^2$" <script>alert(1)</script> \U0001f642 \u0645\u0631\u062d\u0628\u0627'


@pytest.mark.parametrize("prompt", ["a red circle moves left", HOSTILE])
def test_the_panel_gets_the_report(host: Client, prompt: str) -> None:
    graph = Graph(host)
    loaded = graph.add("MimirLoadTiny", fuser_preset="mimir")[0]
    t5, phi, fuser = ([loaded, output] for output in (1, 2, 3))
    tokens = graph.add(
        "MimirPhiEncode", clip=phi, text=prompt, instructions="a\nb\nc\nd", answer_length=8,
        temperature=0.0, seed=0, layer=-1,
    )  # fmt: skip
    text = graph.add("MimirT5Encode", clip=t5, text=prompt)
    louder = graph.add("MimirT5Gain", conditioning=text, piece=prompt.split()[1], occurrence=1, gain=2.0)
    inspected = graph.add(
        "MimirInspectTokens", conditioning=louder, tokens=tokens, fuser=fuser, preset="as trained",
        strength=1.0,
    )  # fmt: skip
    name = inspected[0]
    graph.prompt["string"] = {"class_type": "PreviewAny", "inputs": {"source": [name, 1]}}
    graph.prompt["image"] = {"class_type": "PreviewImage", "inputs": {"images": [name, 0]}}
    outputs = host.run(graph.prompt).outputs
    (report,) = outputs[name]["mimir_inspect"]
    assert json.loads(outputs["string"]["text"][0]) == report and report["prompt"] == prompt
    assert "".join(piece["text"] for piece in report["t5"]["pieces"]) == prompt
    assert "Gain on T5's tokens" in report["notes"][0]
    picture = Image.open(io.BytesIO(host.view(File(**outputs["image"]["images"][0]))))
    assert picture.width == 1000 and picture.height > 1000


def test_a_map_in_the_queue(host: Client) -> None:
    graph = Graph(host)
    loaded = graph.add("MimirLoadTiny", fuser_preset="mimir")[0]
    t5, phi, fuser = ([loaded, output] for output in (1, 2, 3))
    drawn = graph.add(
        "MimirTokenMap", prompts="a red circle\na blue square", t5=t5, phi=phi, fuser=fuser, method="PCA",
        runs=3, answer_length=8, temperature=1.0, seed=0,
    )  # fmt: skip
    graph.prompt["string"] = {"class_type": "PreviewAny", "inputs": {"source": [drawn[0], 1]}}
    outputs = host.run(graph.prompt).outputs
    numbers = json.loads(outputs["string"]["text"][0])
    assert numbers["scatter"]["query"]["identical"] and numbers["runs"] == 3
    assert "query tokens coincide exactly" in outputs[drawn[0]]["text"][0]
