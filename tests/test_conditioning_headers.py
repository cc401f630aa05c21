"""A saved condition whose header somebody has edited: it loads whole, or is called damaged."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mimir_core.conditioning import MARK, load_conditions, save_conditions, zeros_like
from mimir_core.provenance import RECORD, differences, fused_record, sealed, text_record

TOKENS = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
ORIGIN = {"file": "a.safetensors", "fingerprint": "a" * 64}
MADE = fused_record(
    text_record("a red circle", ORIGIN, 6),
    {**ORIGIN, "prompt": "a red circle", "instructions": "Name it.", "answer": "One circle.", "seed": 5},
    {**ORIGIN, "preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0},
)
ENTRY: list[Any] = [TOKENS, {"pooled_output": None, RECORD: sealed(MADE, TOKENS, "0.1.0")}]


def with_header(file: Path, whole: Path, header: Any) -> Path:
    with safe_open(str(whole), "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file(tensors, str(file), {MARK: json.dumps(header)})
    return file


def header_of(file: Path) -> Any:
    with safe_open(str(file), "pt") as opened:
        return json.loads(opened.metadata()[MARK])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in items for found in places(item, (*path, key))]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("options", "start_percent"), "abc"),
        (("options", "start_percent"), math.nan),
        (("options", "end_percent"), 1.5),
        (("options", "strength"), "abc"),
        (("options", "pooled_output"), "abc"),
        (("options", "mimir"), {"dict": {}}),
        (("tokens",), None),
        (("made", "t5"), "abc"),
        (("made", "prompt"), ["a", "b"]),
    ],
)
def test_what_was_written_into_a_header_by_hand_is_damage(path: Any, value: Any, tmp_path: Path) -> None:
    save_conditions(tmp_path / "whole.safetensors", [ENTRY])
    header = header_of(tmp_path / "whole.safetensors")
    at = header["positive"][0]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    if path == ("tokens",):
        header["positive"][0]["checksum"] = None
    file = with_header(tmp_path / "x.safetensors", tmp_path / "whole.safetensors", header)
    with pytest.raises(ValueError, match="^x.safetensors is a saved condition, but a damaged one"):
        load_conditions(file)


def test_edits_of_the_header_load_or_are_refused(tmp_path: Path) -> None:
    """Any value anywhere: the file loads and can be read, compared and zeroed, or an error names it."""
    whole, file, chance = tmp_path / "whole.safetensors", tmp_path / "x.safetensors", random.Random(0)
    options = {"start_percent": 0.1, "end_percent": 0.9, "strength": 1.0, "pooled_output": TOKENS[:, 0]}
    save_conditions(whole, [[TOKENS, {**ENTRY[1], **options, "t": (1, {"a": [2]})}]], [ENTRY])
    values = [None, True, -1, 0, 3, 0.5, 1e400, math.nan, 10**400, "", "abc", "\ud800", [], [[]], {},
              {"a": 1}, {"tensor": "positive.0.tokens"}, {"tensor": []}, {"dict": []}]  # fmt: skip
    loaded = 0
    for path in places(header_of(whole)) * 6:
        header = header_of(whole)
        at = header
        for key in path[:-1]:
            at = at[key]
        if chance.random() < 0.2:
            del at[path[-1]]
        else:
            at[path[-1]] = chance.choice(values)
        try:
            saved = load_conditions(with_header(file, whole, header))
        except ValueError as error:
            assert "x.safetensors" in str(error) and "\n" not in str(error)
            continue
        loaded += 1
        assert saved.text().encode() and zeros_like(saved.positive)
        differences(saved.positive, [ENTRY])
    assert loaded > 20
