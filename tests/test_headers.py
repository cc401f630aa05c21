"""Fingerprints: the same weights are known again, others are told apart, large files in milliseconds."""

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimir_core.config import FuserConfig
from mimir_core.fuser import untrained_state
from mimir_core.headers import BLOCK, BLOCKS, fingerprint
from mimir_core.weights import read_fuser, save_fuser

SIZE = 4 * BLOCK * BLOCKS  # bytes: four times what is read of it


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("large") / "model.safetensors"
    save_file({"a": torch.arange(SIZE // 4, dtype=torch.int32)}, file)
    return file


def test_a_copy_under_another_name_is_known(large, tmp_path):
    copy = tmp_path / "renamed.safetensors"
    copy.write_bytes(large.read_bytes())
    assert fingerprint(copy) == fingerprint(large) and len(fingerprint(large)) == 64


@pytest.mark.parametrize("change", ["cast", "noise", "renamed", "metadata", "longer"])
def test_other_weights_differ(large, tmp_path, change):
    state, notes = load_file(large), {"format": "pt"}
    if change == "cast":
        state["a"] = state["a"].float()
    if change == "noise":
        state["a"] += 1
    if change == "renamed":
        state = {"b": state["a"]}
    if change == "metadata":
        notes["config"] = "{}"
    if change == "longer":
        state["a"] = torch.cat((state["a"], state["a"][:1]))
    save_file(state, tmp_path / "x.safetensors", notes)
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(large), plain, {"format": "pt"})
    assert fingerprint(tmp_path / "x.safetensors") != fingerprint(plain)


def test_every_byte_of_a_small_file_counts(tmp_path):
    file = tmp_path / "small.safetensors"
    save_file({"a": torch.zeros(BLOCK)}, file)
    before, data = fingerprint(file), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert fingerprint(file) != before


def test_a_huge_file_takes_milliseconds(tmp_path):
    file = tmp_path / "huge.safetensors"
    save_file({"a": torch.zeros(8)}, file)
    with file.open("r+b") as opened:
        opened.truncate(12_000_000_000)  # sparse
    start = time.perf_counter()
    fingerprint(file)
    assert time.perf_counter() - start < 1


def test_a_folder_is_its_files_and_a_reader_says_the_same(tmp_path):
    config = FuserConfig(text_dim=12, llm_dim=8)
    save_fuser(tmp_path / "fuser.safetensors", config, untrained_state(config))
    found = read_fuser(tmp_path / "fuser.safetensors").origin
    assert found == {"file": "fuser.safetensors", "fingerprint": fingerprint(tmp_path)}


def test_the_order_of_a_headers_entries_does_not_count(tmp_path):
    """safetensors writes metadata in an order of chance: the same content has one fingerprint."""
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    metadata = {name: name * 3 for name in ("config", "training", "format", "preset")}
    marks = set()
    for index in range(8):
        file = tmp_path / f"{index}.safetensors"
        save_file(tensors, file, metadata=metadata)
        marks.add(fingerprint(file))
    assert len(marks) == 1
