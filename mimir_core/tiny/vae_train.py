"""The VAE of Mimir Tiny: diffusers' AutoencoderKLCogVideoX, trained on rendered clips.

Stages: single frames, then clips (encoder and decoder), then the decoder alone on noisy latents of the frozen encoder,
which teaches it to forgive what a small DiT leaves behind. The DiT may start as soon as the encoder is frozen.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

from .loop import LoopConfig, train
from .world import random_scene, render, stage

VAE_CONFIG = {
    "block_out_channels": (16, 32, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "sample_height": 64,
    "sample_width": 64,
}
IMAGES = LoopConfig(steps=500, muon_rate=0.01, adam_rate=2e-3, final=0.4)
CLIPS = LoopConfig(steps=1200, muon_rate=0.01, adam_rate=2e-3, final=0.1, flat=0.6, ema=0.98, save_every=100)
DECODER = LoopConfig(steps=2000, muon_rate=0.006, adam_rate=1e-3, ema=0.995, save_every=100)
LATENT_NOISE = 0.10  # standard deviation added to normalised latents in the decoder stage


def clips(seed: int, step: int, number: int) -> Tensor:
    """(B, 3, F, H, W) rendered training clips; the same for the same seed and step."""
    rng = random.Random(f"{seed}/{step}")
    return render([stage(random_scene(rng), rng) for _ in range(number)])


def weighted_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error in which coloured pixels weigh five times as much as grey ones.

    Shapes cover a tenth of the picture; without the weight the network first learns backgrounds.
    """
    colour = target.amax(1, keepdim=True) - target.amin(1, keepdim=True)  # (B, 1, F, H, W)
    weight = 1 + 4 * (colour > 0.1)
    error = (output - target).abs() + 0.5 * (output - target).square()
    return (weight * error).mean()


def psnr(output: Tensor, target: Tensor) -> float:
    """Peak signal to noise ratio in dB for pictures in -1..1."""
    return float(10 * torch.log10(4 / (output - target).square().mean()))


class VaeTraining:
    """Losses of the three stages over one network."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.vae = AutoencoderKLCogVideoX(**VAE_CONFIG)
        self.quality = 0.0

    def _autoencode(self, video: Tensor) -> Tensor:
        with torch.autocast(video.device.type, torch.bfloat16):
            posterior = self.vae.encode(video).latent_dist
            output = self.vae.decode(posterior.sample()).sample.float()
        self.quality = psnr(output.detach(), video)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return weighted_error(output, video) + 1e-4 * kl

    def images(self, step: int) -> Tensor:
        """Single frames, four from each of four clips."""
        video = clips(self.seed, step, 4)
        frames = torch.randint(video.shape[2], (4,))
        return self._autoencode(video[:, :, frames].transpose(1, 2).flatten(0, 1)[:, :, None])

    def videos(self, step: int) -> Tensor:
        """Whole clips."""
        return self._autoencode(clips(self.seed, 10_000_000 + step, 3))

    def decoder(self, step: int) -> Tensor:
        """Whole clips from noisy latents; the encoder gets no gradient."""
        video = clips(self.seed, 20_000_000 + step, 3)
        with torch.no_grad():
            latents = self.vae.encode(video).latent_dist.mean
        spread = latents.std() * LATENT_NOISE * torch.rand(len(video), 1, 1, 1, 1)
        with torch.autocast(video.device.type, torch.bfloat16):
            output = self.vae.decode(latents + spread * torch.randn_like(latents)).sample.float()
        self.quality = psnr(output.detach(), video)
        return weighted_error(output, video)


def train_vae(folder: Path, seed: int = 0) -> AutoencoderKLCogVideoX:
    """Single frames, then clips. Writes checkpoints into `folder`; returns the network with a settled encoder."""
    training = VaeTraining(seed)

    def report() -> str:
        return f"{training.quality:.1f} dB"

    train("vae-images", training.vae, training.images, IMAGES, folder, seed, report)
    train("vae-clips", training.vae, training.videos, CLIPS, folder, seed, report)
    return training.vae
