"""The diffusion mathematics of CogVideoX: pure functions, each with its source.

x0 clean latents, eps unit noise, x_t = sqrt(a) x0 + sqrt(1-a) eps, a = alphas_cumprod[t], t in 0..999.
`a` is a float, or a tensor that broadcasts against the latents (`alpha_of` makes one).
Sources: [PD] Salimans and Ho 2022, "Progressive Distillation", section 4 and appendix D; [ZSNR] Lin et al.
2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed"; [CVX] CogVideoX, arXiv 2408.06072, and
its released code (SAT); [D] diffusers' schedulers and pipeline for it.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .config import DiffusionConfig

Alpha = Tensor | float


def alphas_cumprod(config: DiffusionConfig) -> Tensor:
    """(num_train_timesteps,) float64: the product of the alphas, SNR-shifted and then rescaled, as in [D]."""
    start, end = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
    betas = torch.linspace(start, end, config.num_train_timesteps, dtype=torch.float64) ** 2
    return zero_terminal_snr(shift_snr(torch.cumprod(1 - betas, 0), config.snr_shift_scale))


def shift_snr(alphas: Tensor, scale: float) -> Tensor:
    """Divide the signal-to-noise ratio a / (1 - a) by `scale` ([CVX], after SD3)."""
    return alphas / (scale + (1 - scale) * alphas)


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Make the last step pure noise and keep the first as it is ([ZSNR] algorithm 1)."""
    root = alphas.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def trailing_timesteps(steps: int, config: DiffusionConfig) -> list[int]:
    """Descending from the last timestep, one every N / steps ([ZSNR] table 2, "trailing")."""
    total = config.num_train_timesteps
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} sampling steps, expected 1 to {total}")
    return [round(total - i * total / steps) - 1 for i in range(steps)]


def alpha_of(alphas: Tensor, timestep: Tensor, like: Tensor) -> Tensor:
    """alphas (N,), timestep (B,) -> (B, 1, 1, ...) with the dimensions, device and dtype of `like`."""
    chosen = alphas[timestep.to(alphas.device)].to(like.device, like.dtype)
    return chosen.view(-1, *(1,) * (like.ndim - 1))


def add_noise(x0: Tensor, eps: Tensor, a: Alpha) -> Tensor:
    """x_t of the forward process ([PD] section 2)."""
    return _root(a) * x0 + _root(1 - a) * eps


def velocity(x0: Tensor, eps: Tensor, a: Alpha) -> Tensor:
    """What the network predicts and is trained on: v = sqrt(a) eps - sqrt(1-a) x0 ([PD] appendix D)."""
    return _root(a) * eps - _root(1 - a) * x0


def x0_from_v(x: Tensor, v: Tensor, a: Alpha) -> Tensor:
    """x0 = sqrt(a) x_t - sqrt(1-a) v ([PD] appendix D)."""
    return _root(a) * x - _root(1 - a) * v


def eps_from_v(x: Tensor, v: Tensor, a: Alpha) -> Tensor:
    """eps = sqrt(a) v + sqrt(1-a) x_t ([PD] appendix D)."""
    return _root(a) * v + _root(1 - a) * x


def v_from_x0(x: Tensor, x0: Tensor, a: Alpha) -> Tensor:
    """v = (sqrt(a) x_t - x0) / sqrt(1-a): `x0_from_v` solved for v; not defined at a = 1."""
    return (_root(a) * x - x0) / _root(1 - a)


def cosine_ramp(scale: float, step: int, steps: int, t: int) -> float:
    """Guidance that rises from 1 to about 1 + scale over the steps ([CVX], SAT's DynamicCFG, exponent 5)."""
    return 1 + scale * (1 - math.cos(math.pi * (step / steps) ** 5)) / 2


def diffusers_curve(scale: float, step: int, steps: int, t: int) -> float:
    """`use_dynamic_cfg` of [D]: the same formula fed with the timestep, so it swings instead of rising."""
    return 1 + scale * (1 - math.cos(math.pi * ((steps - t) / steps) ** 5)) / 2


def constant(scale: float, step: int, steps: int, t: int) -> float:
    """Classifier-free guidance as Ho and Salimans 2022 have it: one scale for every step."""
    return scale


CFG_CURVES: dict[str, Callable[[float, int, int, int], float]] = {
    "constant": constant,
    "cosine_ramp": cosine_ramp,
    "diffusers": diffusers_curve,
}


def cfg_schedule(curve: str, scale: float, timesteps: Sequence[int]) -> Callable[[int], float]:
    """The guidance scale at each of `timesteps` (descending), as a function of the timestep."""
    if curve not in CFG_CURVES:
        raise ValueError(f"unknown guidance curve {curve!r}, expected one of {', '.join(CFG_CURVES)}")
    steps = len(timesteps)
    values = {t: CFG_CURVES[curve](scale, step, steps, t) for step, t in enumerate(timesteps)}
    return values.__getitem__


def _root(a: Alpha) -> Alpha:
    return math.sqrt(a) if isinstance(a, (int, float)) else a.sqrt()
