"""A whole video from text embeddings: denoising with guidance, then the VAE.

Ours, diffusers' pipeline, and any other DiT inside our pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..config import DiffusionConfig, default_diffusion
from ..pipeline import Models, text_to_video
from ..vae import SPACE, VAE_PRESETS, build_vae, pixel_frames
from .measure import Run
from .rivals import DIFFUSERS, OURS, Missing, Model, State, diffusers_model, ours, reason
from .shapes import Shape

CFG = 6.0


@dataclass(frozen=True)
class Film:
    """A contestant for whole videos; `run` returns frames (F, H, W, 3) in 0..1 on the CPU."""

    name: str
    run: Run
    attention: str = "sdpa"
    compiled: str = ""
    note: str = ""


class Scene:
    """What all films share: weights, text, noise, VAE, schedule."""

    def __init__(self, shape: Shape, state: State, steps: int) -> None:
        self.shape, self.state, self.steps = shape, state, steps
        self.like = state["proj_out.weight"]
        self.diffusion = default_diffusion(shape.config)
        generator = torch.Generator().manual_seed(2)
        size = (1, shape.text, shape.config.text_embed_dim)
        positive, negative = (torch.randn(size, generator=generator).to(self.like) for _ in range(2))
        self.texts = {"positive": positive, "negative": negative}
        settings = {**VAE_PRESETS[shape.vae], "scaling_factor": self.diffusion.latent_scale}
        with torch.random.fork_rng([self.like.device] if self.like.is_cuda else []):
            torch.manual_seed(3)
            self.vae = build_vae(settings, self.like.device, self.like.dtype)

    @property
    def size(self) -> dict[str, int]:
        frames, height, width = self.shape.latents
        return {"width": width * SPACE, "height": height * SPACE, "frames": pixel_frames(frames)}


def films(scene: Scene, rivals: list[Model | Missing]) -> Iterator[Film | Missing]:
    """diffusers' pipeline, our model in ours, and the given rivals (other than those two) in ours."""
    try:
        yield Film(DIFFUSERS, diffusers_film(scene), note="its own pipeline")
    except Exception as error:  # noqa: BLE001  as in rivals.guarded
        yield Missing(DIFFUSERS, reason(error))
    yield Film(OURS, our_film(scene, ours(scene.shape, scene.state)))
    for rival in rivals:
        if isinstance(rival, Missing):
            yield rival
        elif rival.name not in (OURS, DIFFUSERS):
            note = "in our pipeline" + (f"; {rival.note}" if rival.note else "")
            yield Film(rival.name, our_film(scene, rival.predict), rival.attention, rival.compiled, note)


def our_film(scene: Scene, predict: Any) -> Run:
    """`text_to_video` with this DiT; the text encoder hands out the scene's embeddings."""
    stand_in = SimpleNamespace(config=scene.shape.config, proj_out=SimpleNamespace(weight=scene.like))
    transformer: Any = _Callable(predict, stand_in)
    encoder: Any = SimpleNamespace(encode=lambda text: SimpleNamespace(hidden=scene.texts[text]))
    models = Models(transformer, scene.diffusion, encoder, scene.vae)

    def run() -> Tensor:
        settings: dict[str, Any] = {**scene.size, "steps": scene.steps, "cfg": CFG, "seed": 0}
        return text_to_video(models, "positive", "negative", **settings)

    return run


class _Callable:
    """A function that also has the attributes of a model."""

    def __init__(self, function: Any, model: Any) -> None:
        self.function, self.config, self.proj_out = function, model.config, model.proj_out

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def diffusers_film(scene: Scene) -> Run:
    """diffusers' CogVideoXPipeline with its DDIM scheduler, the same noise, texts and VAE."""
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
    from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

    scheduler = CogVideoXDDIMScheduler(**scheduler_settings(scene.diffusion))
    model = diffusers_model(scene.shape, scene.state)
    empty: Any = None
    pipe: Any = CogVideoXPipeline(empty, empty, scene.vae, model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    shape = (1, scene.shape.config.in_channels, *scene.shape.latents)

    def run() -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))  # as text_to_video draws it
        size = scene.size
        out = pipe(
            height=size["height"],
            width=size["width"],
            num_frames=size["frames"],
            num_inference_steps=scene.steps,
            guidance_scale=CFG,
            latents=noise.transpose(1, 2).to(scene.like),
            prompt_embeds=scene.texts["positive"],
            negative_prompt_embeds=scene.texts["negative"],
            output_type="pt",
            max_sequence_length=scene.shape.text,
        )
        return out.frames[0].float().permute(0, 2, 3, 1).cpu()

    return run


def scheduler_settings(diffusion: DiffusionConfig) -> dict[str, Any]:
    """The published scheduler_config.json with this schedule's numbers."""
    return {
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": diffusion.num_train_timesteps,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": diffusion.snr_shift_scale,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
