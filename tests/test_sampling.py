"""Samplers: equal to diffusers' CogVideoX schedulers, and right on denoisers that are known exactly."""

import pytest
import torch

from mimir_core.config import DiffusionConfig
from mimir_core.diffusion import alphas_cumprod, trailing_timesteps, v_from_x0
from mimir_core.sampling import SAMPLERS, ddim, dpmpp_2m_sde, guided

diffusers = pytest.importorskip("diffusers")
SHAPE = (2, 3, 2, 4, 4)


def network(x, t):
    """Any smooth function of x and t will do as a network."""
    return torch.sin(2 * x + t / 300) * 0.8 + 0.1 * x


def their_scheduler(kind: str, schedule: DiffusionConfig, steps: int):
    scheduler = getattr(diffusers, kind)(
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=schedule.snr_shift_scale,
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_ddim_equals_diffusers(shift, steps):
    schedule = DiffusionConfig(snr_shift_scale=shift)
    scheduler = their_scheduler("CogVideoXDDIMScheduler", schedule, steps)
    x = expected = torch.randn(SHAPE, dtype=torch.float64)
    for t in scheduler.timesteps:
        expected = scheduler.step(network(expected, t), t, expected, return_dict=False)[0]
    found = ddim(network, x, trailing_timesteps(steps, schedule), schedule=schedule)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_dpmpp_equals_diffusers(monkeypatch, shift, steps):
    """diffusers draws twice from step 2 on and drops the first draw; here both draws give the same noise."""
    schedule = DiffusionConfig(snr_shift_scale=shift)
    scheduler = their_scheduler("CogVideoXDPMScheduler", schedule, steps)
    noises = torch.randn((steps, *SHAPE), dtype=torch.float64)
    now = {"step": 0}
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor", lambda *a, **k: noises[now["step"]]
    )
    x = expected = torch.randn(SHAPE, dtype=torch.float64)
    old = None
    for i, t in enumerate(scheduler.timesteps):
        now["step"], back = i, scheduler.timesteps[i - 1] if i else None
        expected, old = scheduler.step(network(expected, t), old, t, back, expected, return_dict=False)
    draws = iter(noises)
    monkeypatch.setattr("mimir_core.sampling._randn_like", lambda x, generator: next(draws))
    found = dpmpp_2m_sde(network, x, trailing_timesteps(steps, schedule), schedule=schedule)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def exact_denoiser(posterior_mean, schedule):
    alphas = alphas_cumprod(schedule).tolist()
    return lambda x, t: v_from_x0(x, posterior_mean(x, alphas[t]), alphas[t])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_gaussian_data_come_out_with_their_mean_and_spread(name, shift):
    schedule, mean, std = DiffusionConfig(snr_shift_scale=shift), 1.5, 0.4

    def posterior_mean(x, a):  # of x0 ~ N(mean, std^2) given x_t
        gain = a**0.5 * std**2 / (a * std**2 + 1 - a)
        return mean + gain * (x - a**0.5 * mean)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 1, 100, 100, generator=generator, dtype=torch.float64)
    denoise = exact_denoiser(posterior_mean, schedule)
    timesteps = trailing_timesteps(500, schedule)
    found = SAMPLERS[name](denoise, x, timesteps, schedule=schedule, generator=generator)
    assert abs(found.mean() - mean) < 0.03
    assert abs(found.std() - std) < 0.03


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_finite_dataset_is_sampled_exactly(name):
    """The ideal denoiser of five points: every sample must be one of them, and all must occur."""
    schedule, angle = DiffusionConfig(), torch.arange(5, dtype=torch.float64)
    data = 2 * torch.stack((angle.cos(), angle.sin()), dim=-1)

    def posterior_mean(x, a):
        flat = x.reshape(-1, 2)
        distance = (flat[:, None] - a**0.5 * data).square().sum(-1)
        return ((-distance / (2 * (1 - a))).softmax(-1) @ data).view_as(x)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, 1, 1, 1, generator=generator, dtype=torch.float64)
    timesteps = trailing_timesteps(100, schedule)
    denoise = exact_denoiser(posterior_mean, schedule)
    found = SAMPLERS[name](denoise, x, timesteps, schedule=schedule, generator=generator).view(200, 2)
    distance, nearest = torch.cdist(found, data).min(dim=1)
    assert distance.max() < 0.05
    assert nearest.unique().numel() == 5


@pytest.mark.parametrize("name", SAMPLERS)
def test_callback_sees_every_step_and_seed_repeats(name):
    schedule, timesteps = DiffusionConfig(), trailing_timesteps(6, DiffusionConfig())
    x, seen = torch.randn(SHAPE), []

    def sample(callback=None):
        generator = torch.Generator().manual_seed(3)
        return SAMPLERS[name](
            network, x, timesteps, schedule=schedule, generator=generator, callback=callback
        )

    found = sample(lambda step, x0, after: seen.append((step, after)))
    assert [step for step, _ in seen] == list(range(6))
    assert torch.equal(seen[-1][1], found) and torch.equal(sample(), found)

    def stop(step, x0, after):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(stop)


def test_guidance_formula_and_batching():
    calls = []

    def model(x, t, text):
        calls.append((x.shape[0], x.dtype))
        return x * text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1) + t.view(-1, 1, 1, 1, 1) / 1000

    x = torch.randn(SHAPE)
    positive, negative = torch.full((1, 5, 3), 2.0), torch.full((1, 5, 3), 0.5)
    expected = x * (0.5 + 4 * (2.0 - 0.5)) + 0.3
    torch.testing.assert_close(guided(model, positive, negative, lambda t: 4.0)(x, 300), expected)
    assert calls == [(4, torch.float32)]
    torch.testing.assert_close(guided(model, positive, negative[:, :3], lambda t: 4.0)(x, 300), expected)
    assert len(calls) == 3  # texts of two lengths cannot share a pass
    torch.testing.assert_close(guided(model, positive, negative, lambda t: 1.0)(x, 300), x * 2 + 0.3)
    assert len(calls) == 4
    half = guided(model, positive.half(), negative.half(), lambda t: 4.0)(x, 300)
    assert calls[-1] == (4, torch.float16) and half.dtype == torch.float32
