"""A graphics card for hosts that have none: part of the main memory, which the host manages as one.

`torch.device("cpu", 0)` differs from `torch.device("cpu")`, and computes the same. So the host moves weights
to it, counts them, leaves out what does not fit and evicts what is not at work, by its own code; only the
questions "how large, how full, which device" are answered here.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import pytest
import torch

DEVICE = torch.device("cpu", 0)


class Card:
    """A card of `size` bytes. What is on it: the weights of the host's `current_loaded_models`."""

    def __init__(self, size: float) -> None:
        self.size = size
        self.most = 0.0  # bytes of weights that were on it at once

    @property
    def used(self) -> int:
        return sum(loaded.model.loaded_size() for loaded in self.models())

    def models(self) -> list[Any]:
        return [one for one in management.current_loaded_models if one.model is not None]

    def names(self) -> set[str]:
        """Classes of the networks that are on it."""
        return {type(one.model.model).__name__ for one in self.models() if one.model.loaded_size() > 0}

    def free(self, device: Any = None, torch_free_too: bool = False) -> Any:
        self.most = max(self.most, self.used)
        free = max(self.size - self.used, 0)
        return (free, free) if torch_free_too else free

    def total(self, device: Any = None, torch_total_too: bool = False) -> Any:
        return (self.size, self.size) if torch_total_too else self.size


def insert(monkeypatch: pytest.MonkeyPatch, size: float, *patchers: Any) -> Card:
    """From now on there is a card of `size` bytes, on which `patchers` run; nothing is kept in reserve."""
    card = Card(size)
    management.unload_all_models()
    for patcher in patchers:
        monkeypatch.setattr(patcher, "load_device", DEVICE)
    answers = {
        "get_free_memory": card.free,
        "get_total_memory": card.total,
        "is_device_cpu": lambda device: device == torch.device("cpu"),
        "extra_reserved_memory": lambda: 0,
        "minimum_inference_memory": lambda: 0,
        "vram_state": management.VRAMState.NORMAL_VRAM,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(management, name, answer)
    return card
