"""A real ComfyUI hands our translations and help pages to its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.client import Client

ROOT = Path(__file__).resolve().parents[2]


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_the_host_serves_our_translations(language: str, host: Client) -> None:
    served = host.get("/i18n")[language]
    assert {**served["nodeDefs"], **read(language, "nodeDefs")} == served["nodeDefs"]
    assert {**served["dataTypes"], **read(language, "main")["dataTypes"]} == served["dataTypes"]


def test_every_translated_thing_exists(object_info: dict[str, Any]) -> None:
    for node, words in read("en", "nodeDefs").items():
        shown = object_info[node]
        inputs = {name for group in ("required", "optional") for name in shown["input"].get(group, {})}
        assert set(words["inputs"]) == inputs and len(words["outputs"]) == len(shown["output"]), node
        assert words["display_name"] == shown["display_name"]
