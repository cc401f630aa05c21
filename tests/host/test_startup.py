"""The pack in a real ComfyUI: it loads without complaint, shows every node, and listens here only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.client import Client
from launcher.server import PACK_FOLDER, Server

ROOT = Path(__file__).resolve().parents[2]

NODES = {
    "MimirLoadTiny", "MimirLoadModel", "MimirLoadT5", "MimirLoadPhi", "MimirLoadFuser", "MimirLoadVAE",
    "MimirT5Encode", "MimirPhiEncode", "MimirTokenFuser", "MimirSampler", "MimirVAEDecode",
    "MimirEmptyLatent", "MimirVAEEncode", "MimirLoadLora", "MimirSaveConditioning", "MimirLoadConditioning",
    "MimirInspectFile", "MimirPlan",
}  # fmt: skip
OURS = re.compile(r"(?<!\.)mimir", re.IGNORECASE)  # .mimir is the folder that run.py keeps a ComfyUI in
# How ComfyUI logs a prompt that it refuses before running it, which other tests ask for on purpose.
REFUSED = re.compile(r"Failed to validate prompt|Exception when validating inner node|\* Mimir\w+ \S+:$")
TROUBLE = re.compile(r"error|warning|traceback|exception|failed|deprecat", re.IGNORECASE)


def test_the_pack_loads_without_complaint(host: Client, server: Server) -> None:
    lines = server.log.splitlines()
    assert any(PACK_FOLDER in line for line in lines), server.log_tail(40)
    assert not [line for line in lines if "IMPORT FAILED" in line and PACK_FOLDER in line]
    ours = [line for line in lines if OURS.search(line) and TROUBLE.search(line) and not REFUSED.search(line)]
    assert not ours, ours


def test_every_node_is_there(object_info: dict[str, Any]) -> None:
    missing = NODES - set(object_info)
    assert not missing, f"the host lacks {sorted(missing)}"


def our_nodes(object_info: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, schema) for name, schema in object_info.items() if name.startswith("Mimir")]


def test_every_node_explains_itself(object_info: dict[str, Any]) -> None:
    assert our_nodes(object_info)
    for name, schema in our_nodes(object_info):
        assert schema["description"], name
        assert schema["display_name"] and schema["category"].startswith("Mimir"), name
        for group in ("required", "optional"):
            for entry, spec in (schema["input"].get(group) or {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{name}.{entry} has no tooltip"
        assert all(schema.get("output_tooltips") or ()), f"{name}: an output has no tooltip"


def test_the_server_listens_on_this_machine_only(server: Server, host: Client) -> None:
    assert server.process is not None
    listening = [
        c.laddr.ip for c in psutil.Process(server.process.pid).net_connections() if c.status == "LISTEN"
    ]
    assert listening and set(listening) == {"127.0.0.1"}


def test_templates_are_offered_with_a_picture(host: Client) -> None:
    shipped = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert shipped, "no templates"
    assert sorted(host.get("/workflow_templates")[PACK_FOLDER]) == shipped
    for name in shipped:
        assert host.get(f"/api/workflow_templates/{PACK_FOLDER}/{name}.json")["nodes"]
        assert host.get_bytes(f"/api/workflow_templates/{PACK_FOLDER}/{name}.jpg")[:2] == b"\xff\xd8"


def test_the_versions_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-comfyui = ">=0.3.75"' in project
    version = re.search(r'^version = "([^"]+)"', project, re.MULTILINE)
    assert version and f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["broken", "useless"])
def test_a_bad_xformers_keeps_nothing_out(kind, server, fake_xformers, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(fake_xformers(kind)))
    with Server(server.comfy, server.python, tmp_path / "base", overlay=server.overlay) as running:
        assert NODES <= set(Client(running.url).object_info()), running.log_tail(40)
