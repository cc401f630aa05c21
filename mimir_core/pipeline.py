"""From a prompt to frames without ComfyUI: the five stages in one function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import DiffusionConfig
from .diffusion import cfg_schedule, trailing_timesteps
from .dit import CogVideoXTransformer
from .fuser import TokenFuser
from .llm import encode_prompt
from .phi import Phi3ForCausalLM
from .sampling import SAMPLERS, Callback, guided
from .text import PhiTokenizer, T5Encoder
from .vae import SPACE, check_frames, check_size, decode, latent_frames


@dataclass(frozen=True)
class Models:
    """The parts, on one device. Without `phi`, its tokenizer and `fuser` the prompt is read by T5 alone."""

    transformer: CogVideoXTransformer
    diffusion: DiffusionConfig
    t5: T5Encoder
    vae: Any
    phi: Phi3ForCausalLM | None = None
    phi_tokenizer: PhiTokenizer | None = None
    fuser: TokenFuser | None = None


@torch.inference_mode()
def text_to_video(
    models: Any,  # Models, or anything with its attributes
    prompt: str,
    negative_prompt: str | None = "",
    *,
    width: int = 720,
    height: int = 480,
    frames: int = 49,
    steps: int = 50,
    cfg: float = 6.0,
    cfg_curve: str = "constant",
    sampler: str = "ddim",
    seed: int = 0,
    strength: float = 1.0,
    max_answer_tokens: int = 64,
    callback: Callback | None = None,
) -> Tensor:
    """A video (frames, height, width, 3), float32 in 0..1 on the CPU. A seed means the same on every device.

    negative_prompt: what guidance leads away from; None for zeros instead of an encoded text. strength: of
    the fuser, 0 for T5 alone. ValueError for sizes and settings that cannot work, before any work starts.
    """
    check_size(width, height, SPACE * models.transformer.config.patch_size)
    check_frames(frames)
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    timesteps = trailing_timesteps(steps, models.diffusion)
    guidance = cfg_schedule(cfg_curve, cfg, timesteps)

    def read(text: str) -> Tensor:
        return condition(models, text, strength, max_answer_tokens)

    positive = read(prompt)  # (1, n + K, D)
    negative = torch.zeros_like(positive) if negative_prompt is None else read(negative_prompt)
    noise = torch.Generator().manual_seed(seed)
    latents, extra = _noise(
        models.transformer, latent_frames(frames), height, width, noise
    )  # (1, C, T, h, w)
    denoise = guided(models.transformer, positive, negative, guidance)
    run: Callable[..., Tensor] = SAMPLERS[sampler]
    latents = run(denoise, latents, timesteps, schedule=models.diffusion, generator=noise, callback=callback)
    latents = latents[:, :, extra:] / models.diffusion.latent_scale
    video = decode(models.vae, latents.to(next(models.vae.parameters()).dtype))  # (1, 3, F, H, W)
    return ((video[0].float() + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0).cpu()


@torch.no_grad()
def condition(models: Any, prompt: str, strength: float, max_answer_tokens: int) -> Tensor:
    """What the DiT reads: T5's tokens (1, n, D), or fused ones (1, n + K, D) where there is a fuser."""
    target = models.transformer.proj_out.weight
    text = models.t5.encode(prompt).hidden.to(target.device)
    if models.fuser is not None and strength != 0:
        tokens = encode_prompt(models.phi, models.phi_tokenizer, prompt, max_answer_tokens=max_answer_tokens)
        like = {"device": target.device, "dtype": next(models.fuser.parameters()).dtype}
        llm = tokens.sequence(models.fuser.config.llm_tokens).to(**like)
        instruction = tokens.instruction.to(**like)
        text = models.fuser(text.to(**like), llm, instruction, strength=strength)
    return text.to(target.dtype)


def _noise(
    transformer: CogVideoXTransformer, frames: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Starting noise, and how many frames of it only fill the first temporal patch (CogVideoX 1.5)."""
    config = transformer.config
    extra = -frames % (config.patch_size_t or 1)
    shape = (1, config.in_channels, frames + extra, height // SPACE, width // SPACE)
    return torch.randn(shape, generator=generator).to(transformer.proj_out.weight.device), extra
