"""Scaled fp8 weights, kept in memory as they are on the host's mixed precision operations."""

import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch
from torch import Tensor, nn

from ...mimir_core.scaled import Scaled, dequantised, is_scaled, scaled

log = logging.getLogger(__name__)

CANNOT_KEEP = "This ComfyUI cannot keep scaled fp8 weights: they become 16 bit and take twice the memory."


class Weights(NamedTuple):
    """A state as this host loads it, and the operations that read it; None: the usual ones."""

    state: dict[str, Tensor]
    operations: Any | None
    layers: dict[str, Any]  # what the host calls the quantisation of each layer
    note: str = ""  # for the person who loads it

    @property
    def kept(self) -> bool:
        return self.operations is not None


def as_they_are(
    state: Mapping[str, Tensor], compute: torch.dtype, instead: torch.dtype, fast: bool = False
) -> Weights:
    """Weights for a network that computes in `compute`: scaled fp8 stays fp8 where this host can do that.

    instead: what scaled weights become where it cannot; fast: matrix products in fp8, where the device can.
    """
    if not is_scaled(state):
        return Weights(dict(state), None, {})
    found = keep(scaled(state), compute, fast)
    if found is None:
        log.warning("Mimir: %s", CANNOT_KEEP)
        return Weights(dequantised(state, instead), None, {}, CANNOT_KEEP)
    return found


def keep(found: Scaled, compute: torch.dtype, fast: bool = False) -> Weights | None:
    """`found` on the host's mixed precision operations, or None where it has none for these formats."""
    make, known = getattr(comfy.ops, "mixed_precision_ops", None), getattr(comfy.ops, "QUANT_ALGOS", {})
    able = getattr(comfy.quant_ops, "_CK_AVAILABLE", True)  # newer hosts: comfy_kitchen is there
    if make is None or not able or not set(found.formats.values()) <= set(known):
        return None
    layers = {name: {"format": form} for name, form in found.formats.items()}
    exact = not (fast and management.supports_fp8_compute(management.get_torch_device()))
    state = dict(found.state)
    if hasattr(comfy.utils, "convert_old_quants"):  # since 0.4 each layer says so itself
        marks = {name: json.dumps(values).encode() for name, values in layers.items()}
        state.update({f"{name}.comfy_quant": _bytes(mark) for name, mark in marks.items()})
    return Weights(state, make(layers, compute, full_precision_mm=exact), layers)


def _bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def keep_fine_parts(network: nn.Module, state: Mapping[str, Tensor], cast: bool) -> None:
    """In a network that stores fp8, what is small and sensitive keeps the dtype that it has in `state`.

    That is every vector (norms, biases) and all that lies outside the blocks: less than one per cent of a
    CogVideoX. cast: the person chose fp8, so the blocks' matrices become it; else they keep theirs as well.
    """
    for path, module in network.named_modules():
        for key in ("weight", "bias"):
            name = f"{path}.{key}"
            tensor = state.get(name)
            if tensor is None or tensor.dtype.itemsize == 1:
                continue
            if not (cast and tensor.ndim > 1 and name.startswith("transformer_blocks.")):
                _store(module, key, tensor.dtype)


def _store(module: nn.Module, key: str, dtype: torch.dtype) -> None:
    """Sets what a parameter will be loaded as; 0.33 may build it later and notes its dtype beside it."""
    parameter = getattr(module, key, None)
    if parameter is not None and parameter.dtype.itemsize == 1:
        parameter.data = parameter.data.to(dtype)
    if hasattr(module, f"{key}_comfy_model_dtype"):
        setattr(module, f"{key}_comfy_model_dtype", dtype)
