"""Prompt to frames: with the built-in text encoders, and with the whole built-in model."""

import dataclasses
from pathlib import Path

import pytest
import torch

import mimir_core
from mimir_core import weights
from mimir_core.config import DIT_PRESETS, DiffusionConfig, FuserConfig
from mimir_core.dit import CogVideoXTransformer
from mimir_core.fuser import TokenFuser
from mimir_core.pipeline import Models, text_to_video
from mimir_core.text import PhiTokenizer, T5Encoder
from mimir_core.vae import VAE_PRESETS, build_vae

pytest.importorskip("diffusers")
TINY = Path(mimir_core.__file__).parent / "tiny" / "weights"
SIZE = {"width": 32, "height": 16, "frames": 9, "steps": 2, "max_answer_tokens": 4, "cfg": 3.0}


def encoders() -> dict:
    return {
        "t5": T5Encoder.from_folder(TINY / "t5", DIT_PRESETS["tiny"].max_text_seq_length),
        "phi": weights.load_phi(TINY / "phi", dtype=torch.float32),
        "phi_tokenizer": PhiTokenizer.from_folder(TINY / "phi"),
    }


@pytest.fixture(scope="module")
def models() -> Models:
    torch.manual_seed(0)
    fuser = TokenFuser(FuserConfig(text_dim=96, llm_dim=128)).eval()
    transformer = CogVideoXTransformer(DIT_PRESETS["tiny"]).eval()
    return Models(
        transformer, DiffusionConfig(), vae=build_vae(VAE_PRESETS["tiny"]), fuser=fuser, **encoders()
    )


def test_frames_and_seed(models):
    steps = []
    video = text_to_video(models, "a red circle", callback=lambda step, x0, x: steps.append(step), **SIZE)
    assert video.shape == (9, 16, 32, 3) and video.dtype == torch.float32
    assert video.min() >= 0 and video.max() <= 1 and video.std() > 0
    assert steps == [0, 1]
    assert torch.equal(text_to_video(models, "a red circle", **SIZE), video)
    assert not torch.equal(text_to_video(models, "a red circle", seed=1, **SIZE), video)
    assert not torch.equal(text_to_video(models, "a blue square", **SIZE), video)


def test_strength_zero_is_t5_alone(models):
    alone = dataclasses.replace(models, fuser=None, phi=None, phi_tokenizer=None)
    expected = text_to_video(alone, "a red circle", **SIZE)
    assert torch.equal(text_to_video(models, "a red circle", strength=0.0, **SIZE), expected)
    assert not torch.equal(text_to_video(models, "a red circle", **SIZE), expected)


def test_null_condition_and_dynamic_guidance_change_the_video(models):
    video = text_to_video(models, "a red circle", **SIZE)
    assert not torch.equal(text_to_video(models, "a red circle", None, **SIZE), video)
    assert not torch.equal(text_to_video(models, "a red circle", cfg_curve="cosine_ramp", **SIZE), video)


def test_every_sampler_runs_and_odd_latents_are_padded_for_1_5(models):
    config = dataclasses.replace(DIT_PRESETS["tiny"], patch_size_t=2)
    torch.manual_seed(0)
    temporal = dataclasses.replace(models, transformer=CogVideoXTransformer(config).eval())
    assert text_to_video(temporal, "a red circle", sampler="dpmpp_2m_sde", **SIZE).shape == (9, 16, 32, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 40}, "use 32 or 48"),
        ({"frames": 10}, "use 9 or 17"),
        ({"steps": 0}, "1 to 1000"),
        ({"sampler": "euler"}, "ddim, dpmpp_2m_sde"),
        ({"cfg_curve": "linear"}, "cosine_ramp"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(change, message):
    class Untouchable:
        transformer = type("T", (), {"config": DIT_PRESETS["tiny"]})
        diffusion = DiffusionConfig()

    with pytest.raises(ValueError, match=message):
        text_to_video(Untouchable(), "a red circle", **{**SIZE, **change})


def test_the_built_in_model_follows_a_colour():
    transformer, diffusion = weights.load_transformer(TINY / "transformer.safetensors", dtype=torch.float32)
    vae = weights.load_vae(TINY / "vae.safetensors", dtype=torch.float32)
    fuser = weights.load_fuser(TINY / "fuser.safetensors", dtype=torch.float32)
    models = Models(transformer, diffusion, vae=vae, fuser=fuser, **encoders())
    size = {**SIZE, "width": 64, "height": 64, "steps": 15, "max_answer_tokens": 32}
    red, blue = (text_to_video(models, f"a {colour} circle", seed=7, **size) for colour in ("red", "blue"))
    redness = lambda video: (video[..., 0] - video[..., 2]).mean()  # noqa: E731
    assert redness(red) > 0.01 > -0.01 > redness(blue)
