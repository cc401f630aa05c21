"""Building the host's CLIP and patchers, where the host's versions differ."""

import inspect
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from torch import Tensor, nn


def core_patcher() -> type[comfy.model_patcher.ModelPatcher]:
    """The patcher class of the host's own models (0.33 may have bound a dynamic one at start-up)."""
    return getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)


def module_patcher(module: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A patcher for a small network of ours, on the devices that diffusion models use."""
    if hasattr(management, "archive_model_dtypes"):
        management.archive_model_dtypes(module)
    devices = {
        "load_device": management.get_torch_device(),
        "offload_device": management.unet_offload_device(),
    }
    return core_patcher()(module, **devices)


def build_clip(
    target: Any,
    state: dict[str, Tensor],
    disable_dynamic: bool = False,
    dtype: torch.dtype | None = None,
    operations: Any | None = None,
    device: torch.device | None = None,
) -> comfy.sd.CLIP:
    """comfy.sd.CLIP with its weights; the caller has checked that they are complete.

    `dtype` they are stored in, `operations` that read them and the `device` that they never leave; None: as
    the host decides.
    """
    chosen = {
        "dtype": dtype,
        "custom_operations": operations,
        "load_device": device,
        "offload_device": device,
    }
    options: dict[str, Any] = {"parameters": comfy.utils.calculate_parameters(state)}
    options["model_options"] = {name: value for name, value in chosen.items() if value is not None}
    if "state_dict" in inspect.signature(comfy.sd.CLIP.__init__).parameters:  # 0.33
        return comfy.sd.CLIP(target, state_dict=[state], disable_dynamic=disable_dynamic, **options)
    clip = comfy.sd.CLIP(target, **options)
    clip.load_sd(state)
    clip.patcher.size = 0  # the host has counted before the weights were there
    clip.patcher.model_size()
    return clip
