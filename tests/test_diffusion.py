"""The diffusion formulas: against diffusers' CogVideoX schedulers, and against one another."""

import math

import pytest
import torch

from mimir_core import diffusion as D
from mimir_core.config import DiffusionConfig

diffusers = pytest.importorskip("diffusers")


def scheduler(kind: str = "CogVideoXDDIMScheduler", shift: float = 1.0):
    return getattr(diffusers, kind)(
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=shift,
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_alphas_equal_diffusers(shift):
    found = D.alphas_cumprod(DiffusionConfig(snr_shift_scale=shift))
    torch.testing.assert_close(found, scheduler(shift=shift).alphas_cumprod.double(), rtol=1e-12, atol=1e-14)
    assert found[-1] == 0 and (found.diff() < 0).all()


def test_shift_divides_the_signal_to_noise_ratio():
    a = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    shifted = D.shift_snr(a, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), a / (1 - a) / 3)


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 30, 50, 999, 1000])
def test_timesteps_equal_diffusers(steps):
    reference = scheduler()
    reference.set_timesteps(steps)
    assert D.trailing_timesteps(steps, DiffusionConfig()) == reference.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(ValueError, match="1 to 1000"):
        D.trailing_timesteps(steps, DiffusionConfig())


def test_noise_and_velocity_equal_diffusers():
    reference, alphas = scheduler(shift=3.0), D.alphas_cumprod(DiffusionConfig(snr_shift_scale=3.0))
    x0, eps = torch.randn(3, 4, 2, 5, 5), torch.randn(3, 4, 2, 5, 5)
    timestep = torch.tensor([0, 400, 999])
    a = D.alpha_of(alphas, timestep, x0)
    assert a.shape == (3, 1, 1, 1, 1)
    torch.testing.assert_close(D.add_noise(x0, eps, a), reference.add_noise(x0, eps, timestep))
    torch.testing.assert_close(D.velocity(x0, eps, a), reference.get_velocity(x0, eps, timestep))


@pytest.mark.parametrize("a", [0.0, 0.3, 0.999])
def test_conversions_undo_one_another(a):
    x0, eps = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    x, v = D.add_noise(x0, eps, a), D.velocity(x0, eps, a)
    torch.testing.assert_close(D.x0_from_v(x, v, a), x0)
    torch.testing.assert_close(D.eps_from_v(x, v, a), eps)
    torch.testing.assert_close(D.v_from_x0(x, x0, a), v)


def test_cosine_ramp_rises_from_one_to_scale_plus_one():
    values = [D.cosine_ramp(6.0, step, 50, 0) for step in range(51)]
    assert values[0] == 1 and values == sorted(values)
    assert math.isclose(values[-1], 7.0) and values[25] < 1.1


def test_diffusers_curve_is_its_pipelines_line():
    steps, scale = 50, 6.0
    for t in D.trailing_timesteps(steps, DiffusionConfig()):
        expected = 1 + scale * ((1 - math.cos(math.pi * ((steps - t) / steps) ** 5.0)) / 2)
        assert math.isclose(D.diffusers_curve(scale, 0, steps, t), expected)


def test_schedule_of_guidance():
    timesteps = D.trailing_timesteps(10, DiffusionConfig())
    constant = D.cfg_schedule("constant", 6.0, timesteps)
    assert {constant(t) for t in timesteps} == {6.0}
    ramp = D.cfg_schedule("cosine_ramp", 6.0, timesteps)
    assert ramp(999) == 1 and ramp(timesteps[-1]) == D.cosine_ramp(6.0, 9, 10, 0)
    with pytest.raises(ValueError, match="cosine_ramp"):
        D.cfg_schedule("linear", 6.0, timesteps)
