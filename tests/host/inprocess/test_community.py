"""What the community does with a MODEL, where theory gives the answer and a queued graph cannot look inside.

Video to video against diffusers' own pipeline, torch.compile's view of our forward pass, attention that a
patch replaces, windows over a long video. The same nodes through the queue: tests/host/test_community.py.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.sample
import pytest
import torch
from mimir_pack.nodes.host import model as host_model
from mimir_pack.tests.host.inprocess import references

VARIANTS = {"5b": (references.DIT_5B, 0.7, 1.0), "2b": (references.DIT_2B, 1.15258426, 3.0)}
SEED, CFG = 7, 6.0


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """load(config) -> (diffusers' transformer, our MODEL)."""
    made: dict[str, Any] = {}

    def get(config: dict[str, Any]) -> Any:
        if repr(config) not in made:
            folder: Path = tmp_path_factory.mktemp("dit")
            reference = references.transformer(**config)
            reference.save_pretrained(folder)
            made[repr(config)] = reference, host_model.load_dit(folder)
        return made[repr(config)]

    return get


def tokens(seed: int, length: int = 16) -> torch.Tensor:
    return torch.randn(1, length, references.TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def ksampler(
    model: Any,
    latent: torch.Tensor,
    steps: int = 4,
    denoise: float = 1.0,
    noise: torch.Tensor | None = None,
    longer: int = 0,
) -> torch.Tensor:
    """What core's KSampler gives, for the noise of SEED or for `noise`; `longer`: of the positive text."""
    conditions = [[[tokens(1, 16 + longer), {}]], [[tokens(2), {}]]]
    noise = comfy.sample.prepare_noise(latent, SEED) if noise is None else noise
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, steps, CFG, "euler", "simple", *conditions, latent, denoise, seed=SEED
        )


def empty(frames: int = 3) -> torch.Tensor:
    return torch.zeros(1, 16, frames, 8, 8)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def second_half(reference: Any, shift: float, latent: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """CogVideoXVideoToVideoPipeline at strength 0.5 of 50 steps, for latents as the DiT sees them."""
    from diffusers import CogVideoXVideoToVideoPipeline

    scheduler = references.scheduler(shift)
    scheduler.set_timesteps(50)
    start = scheduler.add_noise(latent, noise, scheduler.timesteps[25:26]).transpose(1, 2)
    pipe = CogVideoXVideoToVideoPipeline(None, None, references.vae(), reference, scheduler)  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        height=64,
        width=64,
        latents=start,
        strength=0.5,
        num_inference_steps=50,
        guidance_scale=CFG,
        prompt_embeds=tokens(1),
        negative_prompt_embeds=tokens(2),
        output_type="latent",
    )
    return out.frames.transpose(1, 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_video_to_video_is_the_pipelines_second_half(load, variant):
    config, scale, shift = VARIANTS[variant]
    reference, model = load(config)
    video = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    found = ksampler(model, video / scale, steps=25, denoise=0.5)
    noise = comfy.sample.prepare_noise(video, SEED)
    assert relative(found, second_half(reference, shift, video, noise) / scale) < 1e-3
    assert relative(found, ksampler(model, empty(), steps=25)) > 0.1  # the video that came in matters


@pytest.mark.parametrize(
    "config", [references.DIT_5B, references.DIT_2B, references.DIT_15], ids=["5b", "2b", "1.5"]
)
@pytest.mark.parametrize("longer", [0, 4])
def test_compiled_in_one_piece(tmp_path, config, longer):
    """With PyTorch's attention the whole forward pass is one graph, compiled once for all steps."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from torch import _dynamo as dynamo

    references.transformer(**config).save_pretrained(tmp_path)
    plain = with_attention(host_model.load_dit(tmp_path), attention.attention_pytorch)
    dynamo.reset()
    dynamo.utils.counters.clear()
    compiled = TorchCompileModel.EXECUTE_NORMALIZED(model=plain, backend="cudagraphs").result[0]
    found = ksampler(compiled, empty(), longer=longer)
    assert not dynamo.utils.counters["graph_break"]
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert relative(found, ksampler(plain, empty(), longer=longer)) < 1e-4


def with_attention(model: Any, function: Any) -> Any:
    """`model` with an attention override, as attention nodes set it."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda inner, *args, **kwargs: function(*args, **kwargs)
    return clone


def test_an_attention_override_runs_every_attention(load):
    _, model = load(references.DIT_5B)
    shapes: list[tuple[int, ...]] = []

    def watch(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(q.shape))
        return attention.attention_pytorch(q, *args, **kwargs)

    found = ksampler(with_attention(model, watch), empty(), steps=2)
    assert shapes == [(2, 2, 64, 32)] * 4  # steps x blocks; one batch, 16 text and 48 video tokens
    assert relative(found, ksampler(model, empty(), steps=2)) < 1e-5


def windows(model: Any, length: int, overlap: int, schedule: str, causal_window_fix: bool = True) -> Any:
    """Core's Context Windows over the frames; 0.33's fix shows every later window one frame more."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode as Node

    inputs = {
        "context_length": length, "context_overlap": overlap, "context_schedule": schedule,
        "context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False,
        "causal_window_fix": causal_window_fix,
    }  # fmt: skip
    known = inspect.signature(Node.execute).parameters
    return Node.execute(model=model, **{name: inputs[name] for name in inputs if name in known}).result[0]


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform", "looped_uniform", "batched"])
@pytest.mark.parametrize("length", [4, 5])
def test_windows_of_any_length_fit_the_patches_of_one_and_a_half(load, schedule, length):
    _, model = load(references.DIT_15)
    found = ksampler(windows(model, length, 2, schedule), empty(13), steps=2)
    assert found.shape == (1, 16, 13, 8, 8) and torch.isfinite(found).all()


@pytest.mark.parametrize("config", [references.DIT_5B, references.DIT_15], ids=["1.0", "1.5"])
def test_windows_that_do_not_overlap_are_videos_of_their_own(load, config):
    """Three windows of four frames see nothing of each other: each is what its noise gives alone."""
    _, model = load(config)
    found = ksampler(windows(model, 4, 0, "batched", causal_window_fix=False), empty(12))
    noise = comfy.sample.prepare_noise(empty(12), SEED)
    for first in (0, 4, 8):
        part = slice(first, first + 4)
        alone = ksampler(model, empty(4), noise=noise[:, :, part])
        assert relative(found[:, :, part], alone) < 1e-4
