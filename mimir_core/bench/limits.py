"""Where the time of a call goes, as PyTorch's profiler sees it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from .measure import Run

# A group and the beginnings of the operator names in it; the first that fits counts.
GROUPS: dict[str, tuple[str, ...]] = {
    "matrix products": (
        "addmm",
        "mm",
        "bmm",
        "baddbmm",
        "linear",
        "convolution",
        "mkldnn_conv",
        "cudnn_conv",
    ),
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention"),
    "GELU": ("gelu",),
    "norms": ("native_layer_norm", "layer_norm", "_fused_rms_norm"),
    "copies": ("copy_", "cat", "clone", "_to_copy", "contiguous", "stack", "flip"),
}
OTHER = "everything else"
CALLS = 3


def shares(run: Run, device: torch.device) -> dict[str, float]:
    """Part of the time that each group takes of some calls; they sum to 1. Empty where nothing was seen."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cycles, which this use does not have
        with profile(activities=activities) as seen:
            for _ in range(CALLS):
                run()
            if cuda:
                torch.cuda.synchronize()
    times = {name: 0.0 for name in (*GROUPS, OTHER)}
    for event in seen.key_averages():
        if event.key.startswith(("aten::", "xformers", "flash_attn")):
            times[group(event.key.split("::")[-1])] += _self_time(event, cuda)
    total = sum(times.values())
    return {name: value / total for name, value in times.items()} if total else {}


def group(operator: str) -> str:
    """The group of an operator, by its name without the namespace."""
    for name, beginnings in GROUPS.items():
        if operator.startswith(beginnings):
            return name
    return "attention" if "attention" in operator else OTHER


def _self_time(event: Any, cuda: bool) -> float:
    """Microseconds in the operator itself; the attribute for a device has had two names."""
    if not cuda:
        return event.self_cpu_time_total
    return getattr(event, "self_device_time_total", None) or getattr(event, "self_cuda_time_total", 0.0)
