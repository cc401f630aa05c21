"""locales/en is what the nodes say, word for word; tests/test_locales.py holds the others against it."""

from __future__ import annotations

import json

import pytest
from mimir_pack.tests.host.inprocess.locales import ROOT, english

SHIPPED = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))


def test_every_node_of_the_pack_has_its_words():
    assert list(SHIPPED) == list(english()), "run python tests/host/inprocess/locales.py, then translate"


@pytest.mark.parametrize("node", SHIPPED)
def test_english_is_what_the_node_says(node):
    assert SHIPPED[node] == english()[node], "run python tests/host/inprocess/locales.py, then translate"
