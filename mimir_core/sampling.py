"""Samplers: functions of one signature that turn noise into latents, knowing nothing of networks.

x is (B, C, T, H, W) throughout, in float32. `denoise(x, t)` predicts its velocity at timestep t (0..999).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import DiffusionConfig
from .diffusion import alphas_cumprod, x0_from_v

Denoise = Callable[[Tensor, int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]  # step, predicted x0, x after the step; may raise to stop


class Sampler(Protocol):
    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        timesteps: Sequence[int],
        *,
        schedule: DiffusionConfig,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """x: noise at timesteps[0]. timesteps: descending; the last step goes to clean latents."""
        ...


def ddim(
    denoise: Denoise,
    x: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: DiffusionConfig,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, equation 12); equals diffusers' CogVideoXDDIMScheduler."""
    for step, (t, a, a_next) in enumerate(_steps(timesteps, schedule)):
        x0 = x0_from_v(x, denoise(x, t), a)
        keep = math.sqrt((1 - a_next) / (1 - a))  # of x; its signal part is then topped up by x0
        x = keep * x + (math.sqrt(a_next) - math.sqrt(a) * keep) * x0
        if callback is not None:
            callback(step, x0, x)
    return x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    timesteps: Sequence[int],
    *,
    schedule: DiffusionConfig,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, eta 1); equals diffusers' CogVideoXDPMScheduler, but draws the
    noise of each step once, where diffusers draws it twice and drops the first."""
    x0_last, lambda_last = None, None
    for step, (t, a, a_next) in enumerate(_steps(timesteps, schedule)):
        x0 = x0_from_v(x, denoise(x, t), a)
        h = _half_log_snr(a_next) - _half_log_snr(a)
        data = x0
        if x0_last is not None and lambda_last is not None and math.isfinite(h):  # second order
            r = (_half_log_snr(a) - lambda_last) / h
            data = x0 + (x0 - x0_last) / (2 * r)
        decay = math.exp(-2 * h)
        x = math.sqrt((1 - a_next) / (1 - a)) * math.exp(-h) * x + (1 - decay) * math.sqrt(a_next) * data
        if a_next < 1:
            x = x + math.sqrt((1 - a_next) * (1 - decay)) * _randn_like(x, generator)
        x0_last, lambda_last = x0, _half_log_snr(a)
        if callback is not None:
            callback(step, x0, x)
    return x


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "dpmpp_2m_sde": dpmpp_2m_sde}


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Any],
    positive: Tensor,
    negative: Tensor,
    cfg: Callable[[int], float],
) -> Denoise:
    """Classifier-free guidance around `model(latents, timestep (B,), text) -> velocity`.

    positive, negative: (B, n, D) or (1, n, D), in the dtype the model computes in. Two texts of one length
    share a forward pass; at a scale of exactly 1 the negative one is not evaluated.
    """

    def predict(x: Tensor, t: int, text: Tensor) -> Tensor:
        timestep = torch.full((x.shape[0],), t, device=x.device)
        return model(x.to(text.dtype), timestep, text.expand(x.shape[0], -1, -1)).float()

    def denoise(x: Tensor, t: int) -> Tensor:
        scale, batch = cfg(t), x.shape[0]
        if scale == 1:
            return predict(x, t, positive)
        if positive.shape[1] != negative.shape[1]:
            with_text, without = predict(x, t, positive), predict(x, t, negative)
        else:
            both = torch.cat([text.expand(batch, -1, -1) for text in (positive, negative)])
            with_text, without = predict(torch.cat((x, x)), t, both).chunk(2)
        return without + scale * (with_text - without)

    return denoise


def _steps(timesteps: Sequence[int], schedule: DiffusionConfig) -> list[tuple[int, float, float]]:
    """(t, alpha at t, alpha at the next t) for each step; after the last one everything is signal."""
    alphas = alphas_cumprod(schedule).tolist()
    found = [alphas[t] for t in timesteps]
    return list(zip(timesteps, found, [*found[1:], 1.0], strict=True))


def _half_log_snr(a: float) -> float:
    """lambda = log(sqrt(a) / sqrt(1-a)); infinite at the two ends of a zero-SNR schedule."""
    if a <= 0 or a >= 1:
        return -math.inf if a <= 0 else math.inf
    return 0.5 * math.log(a / (1 - a))


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise from `generator`, wherever it lives (a CPU generator gives the same video on every device)."""
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
