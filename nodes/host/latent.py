"""CogVideoX latents as the host describes them: 16 channels, each for 4 frames of 8 x 8 pixels."""

import math
from collections.abc import Mapping
from typing import Any

import comfy.latent_formats
import comfy.model_management as management
import torch
from torch import Tensor

CHANNELS, TIME, SPACE = 16, 4, 8


def empty_latent(width: int, height: int, frames: int, batch: int) -> Tensor:
    """Zeros (batch, 16, T, H, W), where the host keeps latents."""
    shape = (batch, CHANNELS, (frames - 1) // TIME + 1, height // SPACE, width // SPACE)
    return torch.zeros(shape, device=management.intermediate_device())


class MimirLatent(comfy.latent_formats.LatentFormat):
    """The VAE gives raw latents; the DiT sees them times `scale`.

    `preview` maps them, as the DiT sees them, to RGB in -1..1: {"factors": 16 x 3, "bias": 3 numbers}.
    """

    latent_channels = CHANNELS
    latent_dimensions = 3
    spacial_downscale_ratio = SPACE
    temporal_downscale_ratio = TIME

    def __init__(self, scale: float = 0.7, preview: Mapping[str, Any] | None = None) -> None:
        self.scale_factor = scale
        self.latent_rgb_factors = preview["factors"] if preview else FALSE_COLOURS
        self.latent_rgb_factors_bias = preview["bias"] if preview else [0.0, 0.0, 0.0]


# The live preview of a model whose file holds no fitted table: three orthonormal cosines over the channels,
# scaled so that normal latents fill the range. Shapes and motion show, colours are false: a table that gives
# true ones has to be fitted on pairs of frames and latents of that VAE.
FALSE_COLOURS = [
    [
        0.6 * math.sqrt(2 / CHANNELS) * math.cos(math.pi * (channel + 0.5) * (rgb + 1) / CHANNELS)
        for rgb in range(3)
    ]
    for channel in range(CHANNELS)
]
