"""Turns a workflow as ComfyUI's page saves it into the prompt that its HTTP API takes, and puts values into
it.

The page does the same in JavaScript when Run is pressed. This covers what shipped workflows use: plain
nodes, notes and reroutes; no subgraphs, no muted or bypassed nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .client import Prompt
from .console import Failure

Workflow = dict[str, Any]
Schemas = dict[str, Any]  # the answer of /object_info

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
SEEDS = ("seed", "noise_seed")
ONLY_IN_THE_PAGE = ("Note", "MarkdownNote", "Reroute")
SAVED_WORKFLOW = "Give a file that ComfyUI's page wrote with Save or Export (not Export (API))."
IN_THE_PAGE = "Run it in the page that `python run.py serve` opens, or choose another workflow."
ALWAYS = 0  # the mode of a node that is neither muted (2) nor bypassed (4)


def check_saved(workflow: Any, name: str) -> None:
    """Raises Failure unless this is the JSON of a workflow as the page saves it."""
    if not isinstance(workflow, dict):
        kind = type(workflow).__name__
        raise Failure(f"{name} is not a workflow: it holds a {kind}, not an object.", SAVED_WORKFLOW)
    nodes, links = workflow.get("nodes"), workflow.get("links")
    if not nodes and any(isinstance(node, dict) and "class_type" in node for node in workflow.values()):
        raise Failure(f"{name} is in the API format, not a saved workflow.", SAVED_WORKFLOW)
    if not isinstance(nodes, list) or not all(
        isinstance(n, dict) and {"id", "type"} <= n.keys() for n in nodes
    ):
        raise Failure(f"{name} is not a workflow: it has no list of nodes.", SAVED_WORKFLOW)
    if not isinstance(links, list) or not all(isinstance(link, list) and len(link) > 2 for link in links):
        raise Failure(f"{name} is not a workflow: it has no list of links.", SAVED_WORKFLOW)


def to_prompt(workflow: Workflow, schemas: Schemas) -> Prompt:
    """The API prompt of a saved workflow; raises Failure for what it cannot express or the host does not
    have."""
    origins = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    prompt: Prompt = {}
    for node_id, node in nodes.items():
        if node["type"] in ONLY_IN_THE_PAGE:
            continue
        _check(node, schemas)
        inputs = _widget_inputs(node, schemas[node["type"]])
        for socket in node.get("inputs") or ():
            if socket.get("link") is not None:
                inputs[socket["name"]] = list(_origin(socket["link"], origins, nodes))
        prompt[node_id] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": _title(node, schemas)},
        }
    return prompt


def _check(node: dict[str, Any], schemas: Schemas) -> None:
    if node["type"] not in schemas:
        raise Failure(
            f"This ComfyUI has no node {node['type']} (node {node['id']} of the workflow).",
            "Name a ComfyUI that has it with --comfyui, or choose another workflow.",
        )
    if node.get("mode", ALWAYS) != ALWAYS:
        raise Failure(
            f"Node {node['id']} ({node['type']}) is muted or bypassed; only the page can run that.",
            IN_THE_PAGE,
        )


def _title(node: dict[str, Any], schemas: Schemas) -> str:
    return node.get("title") or schemas[node["type"]].get("display_name") or node["type"]


def _origin(link: int, origins: dict[int, tuple[str, int]], nodes: dict[str, Any]) -> tuple[str, int]:
    """The node and output at the start of a link, seen through reroutes."""
    node_id, slot = origins[link]
    if nodes[node_id]["type"] != "Reroute":
        return node_id, slot
    return _origin(nodes[node_id]["inputs"][0]["link"], origins, nodes)


def _widget_inputs(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The values of a node's widgets by input name. A saved node has them as a list, in the order of the
    schema."""
    saved = node.get("widgets_values") or []
    if isinstance(saved, dict):
        return {name: value for name, value in saved.items() if name in _names(schema)}
    values = iter(saved)
    inputs: dict[str, Any] = {}
    for name, spec in _specs(schema["input"], schema.get("input_order")):
        _take(name, spec, values, inputs)
    return inputs


def _names(schema: dict[str, Any]) -> list[str]:
    return [name for name, _ in _specs(schema["input"], schema.get("input_order"))]


def _specs(
    inputs: dict[str, Any], order: dict[str, list[str]] | None = None
) -> Iterator[tuple[str, list[Any]]]:
    """(name, [type, options]) of every input, required before optional."""
    for group in ("required", "optional"):
        specs = inputs.get(group) or {}
        for name in (order or {}).get(group) or specs:
            yield name, specs[name]


def _take(name: str, spec: list[Any], values: Iterator[Any], inputs: dict[str, Any]) -> None:
    """Move the value of one input, and what the page saves behind it, from `values` to `inputs`."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
        return
    value = next(values, _default(kind, options))
    if value is not None:
        inputs[name] = value
    if kind == DYNAMIC_COMBO:  # its inputs follow it and carry its name
        chosen = next((o for o in options["options"] if o["key"] == value), {"inputs": {}})
        for inner, inner_spec in _specs(chosen["inputs"]):
            _take(f"{name}.{inner}", inner_spec, values, inputs)
    elif _has_companion(name, kind, options):
        next(values, None)


def _default(kind: Any, options: dict[str, Any]) -> Any:
    """What the page puts where a saved workflow says nothing: the default, or the first choice of a combo."""
    choices: list[Any] = kind if isinstance(kind, list) else options.get("options") or []
    if kind == DYNAMIC_COMBO:
        choices = [choice["key"] for choice in choices]
    return options.get("default", choices[0] if choices else None)


def _has_companion(name: str, kind: Any, options: dict[str, Any]) -> bool:
    """Whether the page saves one more value behind this one: "randomize" behind seeds, "image" behind
    uploads."""
    seed = options.get("control_after_generate", kind == "INT" and name in SEEDS)
    return bool(seed) or any(key.endswith("_upload") and on is True for key, on in options.items())


def set_text(prompt: Prompt, text: str) -> None:
    """Put `text` into every encoder that a sampler's `positive` comes from."""
    samplers = [node for node in prompt.values() if is_link(node["inputs"].get("positive"))]
    reached = [n for sampler in samplers for n in upstream(prompt, sampler["inputs"]["positive"][0])]
    encoders = [prompt[n] for n in reached if "text" in prompt[n]["inputs"]]
    if not encoders:
        raise Failure(
            "The workflow has no encoder with a text that leads to a sampler's positive input.", IN_THE_PAGE
        )
    for node in encoders:
        _set(prompt, node, "text", text)


def set_value(prompt: Prompt, names: tuple[str, ...], value: Any) -> None:
    """Set every input of one of these names."""
    for node in prompt.values():
        for name in names:
            if name in node["inputs"]:
                _set(prompt, node, name, value)


def _set(prompt: Prompt, node: dict[str, Any], name: str, value: Any) -> None:
    """Set an input, or the `value` of the primitive node that it is linked to."""
    linked = node["inputs"][name]
    if is_link(linked):
        prompt[linked[0]]["inputs"]["value"] = value
    else:
        node["inputs"][name] = value


def upstream(prompt: Prompt, node_id: str) -> list[str]:
    """This node and all that it depends on."""
    seen, waiting = [], [node_id]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.append(current)
            waiting += [value[0] for value in prompt[current]["inputs"].values() if is_link(value)]
    return seen


def is_link(value: Any) -> bool:
    """Whether an input's value is a link [node id, output]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
    )
