"""The VAE of Mimir Tiny: diffusers' AutoencoderKLCogVideoX, trained on rendered clips.

Stages: single frames, then clips (encoder and decoder), then the decoder alone on noisy latents of the frozen
encoder, which teaches it to forgive what a small DiT leaves behind. The DiT may start as soon as the encoder
is frozen.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..vae import VAE_PRESETS, build_vae
from .loop import LoopConfig, train
from .world import random_scene, render, stage

Vae = Any  # AutoencoderKLCogVideoX, whose methods' types allow for results that ours never ask for

VAE_CONFIG = VAE_PRESETS["tiny"]
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

    def __init__(self, seed: int, device: str = "cpu") -> None:
        torch.manual_seed(seed)
        self.seed, self.device = seed, device
        self.vae: Vae = build_vae(VAE_CONFIG).to(device)
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
        video = clips(self.seed, step, 4).to(self.device)
        frames = torch.randint(video.shape[2], (4,))
        return self._autoencode(video[:, :, frames].transpose(1, 2).flatten(0, 1)[:, :, None])

    def videos(self, step: int) -> Tensor:
        """Whole clips."""
        return self._autoencode(clips(self.seed, 10_000_000 + step, 3).to(self.device))

    def report(self) -> str:
        """Quality of the last batch."""
        return f"{self.quality:.1f} dB"

    def decoder(self, step: int) -> Tensor:
        """Whole clips from noisy latents; the encoder gets no gradient."""
        video = clips(self.seed, 20_000_000 + step, 3).to(self.device)
        with torch.no_grad():
            latents = self.vae.encode(video).latent_dist.mean
        spread = latents.std() * LATENT_NOISE * torch.rand(len(video), 1, 1, 1, 1)
        with torch.autocast(video.device.type, torch.bfloat16):
            output = self.vae.decode(latents + spread * torch.randn_like(latents)).sample.float()
        self.quality = psnr(output.detach(), video)
        return weighted_error(output, video)


def train_vae(folder: Path, seed: int = 0, device: str = "cpu") -> Vae:
    """Single frames, then clips. Writes checkpoints into `folder`; returns the network with a settled
    encoder.
    """
    training = VaeTraining(seed, device)
    train("vae-images", training.vae, training.images, IMAGES, folder, seed, training.report)
    train("vae-clips", training.vae, training.videos, CLIPS, folder, seed, training.report)
    return whiten(training.vae.eval(), seed)


def train_decoder(training: VaeTraining, folder: Path) -> Vae:
    """The decoder on noisy latents, the encoder as it is."""
    training.vae.encoder.requires_grad_(False)
    return train(
        "vae-decoder", training.vae, training.decoder, DECODER, folder, training.seed, training.report
    )


@torch.no_grad()
def whiten(vae: Vae, seed: int) -> Vae:
    """Gives every latent channel unit standard deviation by rescaling weights; what the VAE reconstructs is
    unchanged.

    CogVideoX has one scale for all channels, and a DiT learns channels of small variance last.
    """
    latents = torch.cat(
        [vae.encode(part).latent_dist.mean for part in clips(seed, 40_000_000, 64).to(vae.device).split(8)]
    )
    spread = latents.std((0, 2, 3, 4))  # (C,)
    out = vae.encoder.conv_out.conv  # mean and log-variance of each channel
    channels = len(spread)
    out.weight[:channels] /= spread[:, None, None, None, None]
    out.bias[:channels] /= spread
    out.bias[channels:] -= 2 * spread.log()
    readers = [vae.decoder.conv_in.conv]
    readers += [m.conv for name, m in vae.decoder.named_modules() if name.endswith(("conv_y", "conv_b"))]
    for conv in readers:
        conv.weight *= spread[None, :, None, None, None]
    return vae


def latent_scale(latents: Tensor) -> float:
    """What brings latents to unit standard deviation, rounded for the file header."""
    return round(1 / float(latents.float().std()), 4)


def preview_factors(vae: Vae, scale: float, seed: int) -> dict[str, list]:
    """RGB in -1..1 of a scaled latent pixel as an affine map, by least squares: {"factors": (16, 3), "bias":
    (3,)}.
    """
    video = clips(seed, 30_000_000, 64)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in video.split(8)]) * scale
    small = torch.nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8))  # (B, 3, T, H / 8, W / 8)
    x = latents.movedim(1, -1).flatten(0, -2)
    y = small.movedim(1, -1).flatten(0, -2)
    solution = torch.linalg.lstsq(torch.cat((x, torch.ones(len(x), 1)), 1), y).solution
    rows = [[round(v, 4) for v in row] for row in solution.tolist()]
    return {"factors": rows[:-1], "bias": rows[-1]}
