"""The shipped templates without a host: consistent, complete, and true to the code.

Our nodes' schemas are read from the source, because importing `nodes/` needs ComfyUI. What needs a host (the
values of combos that a host fills, a run) is in tests/host/test_workflows.py and tests/browser.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
EXPECTED = {
    "mimir_cogvideox_2b_text_to_video",
    "mimir_cogvideox_5b_text_to_video",
    "mimir_tiny_long_video",
    "mimir_tiny_saved_conditioning",
    "mimir_tiny_text_to_video",
    "mimir_tiny_video_to_video",
    "mimir_train_tiny",
    "mimir_with_ksampler",
}
OPTIONAL = 7  # the shape of an input that may stay open
GROWTH = 100  # pixels that a save node grows by in Nodes 2.0, when its video appears
MODEL_FOLDERS = {"diffusion_models", "text_encoders", "vae", "loras", "mimir"}
KINDS = {"Int": (int,), "Float": (int, float), "String": (str,), "Combo": (str,), "Boolean": (bool,)}
SOCKETS = {"Vae": "VAE", "LossMap": "LOSS_MAP", "MimirTokens": "MIMIR_TOKENS", "MimirFuser": "MIMIR_FUSER"}


@dataclass(frozen=True)
class Widget:
    """An input that the page draws as a widget. `options`: its literal keyword arguments."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schema:
    """What a node takes and gives: sockets by name and type, widgets in order, types of the outputs."""

    sockets: dict[str, str]
    widgets: tuple[Widget, ...]
    outputs: tuple[str, ...]
    display_name: str = ""


def _seed(name: str) -> Widget:
    return Widget(name, "Int", {"min": 0, "control_after_generate": True})


# Core nodes as both supported hosts have them; the newest one adds inputs behind these.
CORE = {
    "PrimitiveStringMultiline": Schema({}, (Widget("value", "String"),), ("STRING",)),
    "CreateVideo": Schema(
        {"images": "IMAGE", "audio": "AUDIO"}, (Widget("fps", "Float", {"min": 1, "max": 120}),), ("VIDEO",)
    ),
    "SaveVideo": Schema(
        {"video": "VIDEO"},
        (Widget("filename_prefix", "String"), Widget("format", "Combo"), Widget("codec", "Combo")),
        (),
    ),
    "VAEDecode": Schema({"samples": "LATENT", "vae": "VAE"}, (), ("IMAGE",)),
    "KSampler": Schema(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        (
            _seed("seed"),
            Widget("steps", "Int", {"min": 1, "max": 10000}),
            Widget("cfg", "Float", {"min": 0, "max": 100}),
            Widget("sampler_name", "Combo"),
            Widget("scheduler", "Combo"),
            Widget("denoise", "Float", {"min": 0, "max": 1}),
        ),
        ("LATENT",),
    ),
    "LossGraphNode": Schema({"loss": "LOSS_MAP"}, (Widget("filename_prefix", "String"),), ()),
    "WanContextWindowsManual": Schema(
        {"model": "MODEL"},
        (
            Widget("context_length", "Int", {"min": 1}),
            Widget("context_overlap", "Int", {"min": 0}),
            Widget("context_schedule", "Combo"),
            Widget("context_stride", "Int", {"min": 1}),
            Widget("closed_loop", "Boolean"),
            Widget("fuse_method", "Combo"),
        ),
        ("MODEL",),
    ),
    "MarkdownNote": Schema({}, (Widget("text", "String"),), ()),
}


@cache
def schemas() -> dict[str, Schema]:
    """CORE, and every `schema("Mimir...", ...)` in nodes/."""
    found = dict(CORE)
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "schema":
                found[ast.literal_eval(call.args[0])] = _schema(call)
    return found


def _schema(call: ast.Call) -> Schema:
    lists = {k.arg: k.value.elts for k in call.keywords if isinstance(k.value, ast.List)}
    calls = [element for element in lists["inputs"] if isinstance(element, ast.Call)]
    inputs = [_widget(call) for call in calls if _name(call.func) == "widget"]
    outputs = tuple(
        _socket_type(element.func.value)
        for element in lists["outputs"]
        if isinstance(element, ast.Call) and isinstance(element.func, ast.Attribute)
    )
    return Schema(
        {w.name: _socket_type(w.kind) for w in inputs if w.kind not in KINDS},
        tuple(w for w in inputs if w.kind in KINDS),
        outputs,
        ast.literal_eval(call.args[1]),
    )


def _widget(call: ast.Call) -> Widget:
    """`widget(io.Int, "width", default=720, ...)`."""
    literal = {}
    for keyword in call.keywords:
        try:
            literal[keyword.arg or ""] = ast.literal_eval(keyword.value)
        except ValueError:  # computed: only a host knows it
            continue
    return Widget(ast.literal_eval(call.args[1]), _name(call.args[0]), literal)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ast.unparse(node)


def _socket_type(kind: ast.expr | str) -> str:
    name = kind if isinstance(kind, str) else _name(kind)
    return SOCKETS.get(name, name.upper())


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_the_expected_templates_are_there_with_pictures() -> None:
    assert {path.stem for path in WORKFLOWS} == EXPECTED
    for path in WORKFLOWS:
        picture = path.with_suffix(".jpg")
        assert picture.read_bytes()[:2] == b"\xff\xd8", f"{picture.name} is no JPEG"
        assert picture.stat().st_size < 300_000, f"{picture.name} is too large for a thumbnail"


def test_the_templates_are_plain_ascii_in_the_older_form(workflow: dict[str, Any]) -> None:
    text = json.dumps(workflow, ensure_ascii=False)
    assert text.isascii()
    assert workflow["version"] == 0.4 and "definitions" not in workflow
    assert all("widgets_values_named" not in node for node in workflow["nodes"])


def test_every_node_exists_with_its_sockets(workflow: dict[str, Any]) -> None:
    for node in workflow["nodes"]:
        schema = schemas()[node["type"]]
        widgets = {w.name for w in schema.widgets}
        for socket in node["inputs"]:
            if "widget" in socket:
                assert socket["name"] == socket["widget"]["name"] and socket["name"] in widgets, node["type"]
            else:
                assert schema.sockets.get(socket["name"]) == socket["type"], (node["type"], socket)
        given = {socket["name"] for socket in node["inputs"]}
        assert set(schema.sockets) <= given, f"{node['type']} lacks {set(schema.sockets) - given}"
        assert tuple(out["type"] for out in node["outputs"]) == schema.outputs, node["type"]


def test_every_widget_value_fits_its_schema(workflow: dict[str, Any]) -> None:
    for node in workflow["nodes"]:
        values = iter(node["widgets_values"])
        for widget in schemas()[node["type"]].widgets:
            value = next(values, None)
            if value is None:  # saved before this widget was added: it must be optional, and gets its default
                assert widget.options.get("optional") and "default" in widget.options, widget.name
                continue
            where = f"{node['type']}.{widget.name} = {value!r}"
            assert isinstance(value, KINDS[widget.kind]), where
            low, high = widget.options.get("min"), widget.options.get("max")
            assert low is None or value >= low, where
            assert high is None or value <= high, where
            options = widget.options.get("options")
            assert options is None or value in options, where
            if widget.options.get("control_after_generate"):
                assert next(values) in ("fixed", "randomize", "increment", "decrement"), where
        assert not list(values), f"{node['type']} has values left over"


def test_links_are_the_same_from_both_ends(workflow: dict[str, Any]) -> None:
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: link for link in workflow["links"]}
    assert len(nodes) == len(workflow["nodes"]) and len(links) == len(workflow["links"])
    for number, origin, slot, target, socket, kind in links.values():
        assert number in nodes[origin]["outputs"][slot]["links"]
        assert nodes[origin]["outputs"][slot]["type"] == kind
        assert nodes[target]["inputs"][socket]["link"] == number
        assert nodes[target]["inputs"][socket]["type"] == kind
    ends = [s["link"] for n in nodes.values() for s in n["inputs"] if s["link"] is not None]
    starts = [number for n in nodes.values() for out in n["outputs"] for number in out["links"]]
    assert sorted(ends) == sorted(starts) == sorted(links)
    assert workflow["last_link_id"] == max(links) and workflow["last_node_id"] == max(nodes)


def test_every_needed_socket_is_connected(workflow: dict[str, Any]) -> None:
    open_sockets = [
        f"{node['type']}.{socket['name']}"
        for node in workflow["nodes"]
        for socket in node["inputs"]
        if socket["link"] is None and socket.get("shape") != OPTIONAL
    ]
    assert not open_sockets


def _box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top with the title bar, right, bottom."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - 30, x + width, y + height


def test_no_node_lies_on_another(workflow: dict[str, Any]) -> None:
    boxes = [(_box(node), node["type"]) for node in workflow["nodes"]]
    for i, (a, first) in enumerate(boxes):
        for b, second in boxes[i + 1 :]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{first} and {second} overlap"


def test_nothing_lies_close_below_a_save_node(workflow: dict[str, Any]) -> None:
    for save in (node for node in workflow["nodes"] if node["type"] == "SaveVideo"):
        left, _, right, bottom = _box(save)
        close = [
            n for n in workflow["nodes"] if bottom <= _box(n)[1] < bottom + GROWTH and _box(n)[0] < right
        ]
        assert not [n["type"] for n in close if _box(n)[2] > left]


def test_offered_downloads_are_what_the_loaders_name(workflow: dict[str, Any]) -> None:
    for node in workflow["nodes"]:
        for model in node["properties"].get("models", ()):
            assert model["name"] in node["widgets_values"], f"the page ignores {model['name']}"
            assert model["url"].endswith("/" + model["name"])
            assert re.match(r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/", model["url"])
            assert model["name"].endswith(".safetensors") and model["directory"] in MODEL_FOLDERS
        named = [v for v in node["widgets_values"] if isinstance(v, str) and v.endswith(".safetensors")]
        assert sorted(named) == sorted(m["name"] for m in node["properties"].get("models", ()))


def test_every_template_explains_itself(workflow: dict[str, Any]) -> None:
    assert any(node["type"] == "MarkdownNote" for node in workflow["nodes"])


def test_each_prompt_is_typed_once(workflow: dict[str, Any]) -> None:
    """One text feeds T5 and Phi-3.5; the two lanes end in the sampler's two inputs."""
    texts = {n["title"]: n for n in workflow["nodes"] if n["type"] == "PrimitiveStringMultiline"}
    reads = any(node["type"] == "MimirPhiEncode" for node in workflow["nodes"])
    assert set(texts) == ({"Prompt", "Negative prompt"} if reads else set())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    targets = {link[0]: nodes[link[3]]["type"] for link in workflow["links"]}
    for text in texts.values():
        reached = sorted(targets[number] for number in text["outputs"][0]["links"])
        assert reached == ["MimirPhiEncode", "MimirT5Encode"]
