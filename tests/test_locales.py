"""Translations say what English says: the same keys, in their own script, with every name and number kept.

That English is what the nodes themselves say is tested where nodes can be had (host/inprocess).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LOCALES = Path(__file__).resolve().parents[1] / "locales"
SCRIPT = {"zh": re.compile("[\u4e00-\u9fff]"), "ja": re.compile("[\u3040-\u30ff\u4e00-\u9fff]")}
# What is the same in every language: numbers, %placeholders%, files and settings, options in quotes.
KEPT = re.compile(r"\d+(?:\.\d+)?|%[^%\s]+%|\w+(?:[_/]\w+)+|\w+\.json|(?<!\w)'[^']+'(?!\w)", re.ASCII)
# vue-i18n reads these as placeholders, links and plurals, and then shows something else or throws.
SYNTAX = re.compile(r"[{}@|]")


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


def leaves(tree: dict[str, Any], at: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def pairs(language: str) -> list[tuple[str, str, str]]:
    """(key, English, translation) of everything."""
    both = [(read("en", name), read(language, name)) for name in ("nodeDefs.json", "main.json")]
    return [
        (key, text, translated[key])
        for english, other in both
        for translated in [dict(leaves(other))]
        for key, text in leaves(english)
    ]


def test_the_languages_are_these() -> None:
    assert {path.name for path in LOCALES.iterdir()} == {"en", *SCRIPT}


@pytest.mark.parametrize("name", ["nodeDefs.json", "main.json"])
@pytest.mark.parametrize("language", SCRIPT)
def test_the_keys_are_those_of_english_in_its_order(language: str, name: str) -> None:
    assert [key for key, _ in leaves(read(language, name))] == [key for key, _ in leaves(read("en", name))]


@pytest.mark.parametrize("language", SCRIPT)
def test_everything_is_translated(language: str) -> None:
    missing = [key for key, _, text in pairs(language) if not SCRIPT[language].search(text)]
    assert not missing


@pytest.mark.parametrize("language", SCRIPT)
def test_names_and_numbers_are_kept(language: str) -> None:
    sentences = [entry for entry in pairs(language) if entry[0].endswith((".tooltip", ".description"))]
    assert sentences
    for key, english, text in sentences:
        assert [part for part in KEPT.findall(english) if part not in text] == [], key


@pytest.mark.parametrize("language", SCRIPT)
def test_other_nodes_are_called_as_they_are_shown(language: str) -> None:
    shown = {
        plain(entry["display_name"]): plain(read(language, "nodeDefs.json")[node]["display_name"])
        for node, entry in read("en", "nodeDefs.json").items()
    }
    astray = {}
    for key, english, text in pairs(language):
        for name in sorted(shown, key=len, reverse=True):  # "Load Token Fuser" before "Token Fuser"
            if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", english):
                english = english.replace(name, "")
                if shown[name] not in text:
                    astray[key] = shown[name]
    assert not astray


def plain(name: str) -> str:
    """A node's name without what stands in brackets behind it."""
    return re.sub(r" \([^)]*\)$", "", name)


@pytest.mark.parametrize("language", ["en", *SCRIPT])
def test_nothing_is_read_as_syntax(language: str) -> None:
    texts = [entry for name in ("nodeDefs.json", "main.json") for entry in leaves(read(language, name))]
    assert texts and all(text.strip() == text and text for _, text in texts)
    assert not [key for key, text in texts if SYNTAX.search(text)]


@pytest.mark.parametrize("language", SCRIPT)
def test_different_inputs_of_a_node_have_different_names(language: str) -> None:
    for node, entry in read(language, "nodeDefs.json").items():
        names = [words["name"] for words in entry["inputs"].values()]
        assert len(set(names)) == len(names), node


def test_our_wires_have_names() -> None:
    types = (LOCALES.parent / "nodes/types.py").read_text(encoding="utf-8")
    assert set(read("en", "main.json")["dataTypes"]) == set(re.findall(r'io\.Custom\("(\w+)"\)', types))
