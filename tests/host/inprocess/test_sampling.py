"""A CogVideoX on disk, through our loader and the host's KSampler, against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sample
import pytest
import torch
from mimir_pack.nodes.host import model as host_model
from mimir_pack.nodes.host import sampling
from mimir_pack.nodes.sample import MimirSampler
from mimir_pack.tests.host.inprocess import references

import nodes as host_nodes

SCALE = {"5b": 0.7, "2b": 1.15258426, "1.5": 0.7}
CONFIG = {"5b": references.DIT_5B, "2b": references.DIT_2B, "1.5": references.DIT_15}
SEED, CFG = 7, 6.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dit")


@pytest.fixture(scope="module")
def load(folder: Path) -> Any:
    """load(variant) -> (diffusers' transformer, our MODEL), from a folder that diffusers wrote."""
    made: dict[str, Any] = {}

    def get(variant: str) -> Any:
        if variant not in made:
            reference = references.transformer(**CONFIG[variant])
            reference.save_pretrained(folder / variant)
            made[variant] = reference, host_model.load_dit(folder / variant)
        return made[variant]

    return get


def prompt_embeds(length: int = references.TEXT_LENGTH, seed: int = 5) -> torch.Tensor:
    return torch.randn(1, length, references.TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def conditioning(tokens: torch.Tensor) -> list[Any]:
    return [[tokens, {"pooled_output": None}]]


def empty(frames: int = 3, batch: int = 1, height: int = 8, width: int = 8) -> dict[str, Any]:
    return {"samples": torch.zeros(batch, 16, frames, height, width)}


def ksampler(
    model: Any, positive: Any, negative: Any, latent: Any, steps: int, **options: Any
) -> torch.Tensor:
    options = {"sampler_name": "euler", "scheduler": "simple", **options}
    with torch.inference_mode():
        return host_nodes.common_ksampler(
            model, SEED, steps, CFG, positive=positive, negative=negative, latent=latent, **options
        )[0]["samples"]


def pipeline(
    reference: Any, shift: float, noise: torch.Tensor, steps: int, dynamic: bool = False
) -> torch.Tensor:
    """CogVideoXPipeline's final latents (B, C, T, H, W) for our noise and conditions."""
    from diffusers import CogVideoXPipeline

    scheduler = references.scheduler(shift)
    pipe = CogVideoXPipeline(None, None, references.vae(), reference, scheduler)  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    _, _, frames, height, width = noise.shape
    out = pipe(
        prompt_embeds=prompt_embeds(),
        negative_prompt_embeds=prompt_embeds(seed=6),
        latents=noise.transpose(1, 2).clone(),
        height=height * 8,
        width=width * 8,
        num_frames=(frames - 1) * 4 + 1,
        num_inference_steps=steps,
        guidance_scale=CFG,
        use_dynamic_cfg=dynamic,
        output_type="latent",
    )
    return out.frames.transpose(1, 2)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("variant", "shift"), [("5b", 1.0), ("2b", 3.0)])
@pytest.mark.parametrize("steps", [10, 50])
def test_euler_simple_is_the_pipeline(load, variant, shift, steps):
    reference, model = load(variant)
    latent = empty()
    found = ksampler(model, conditioning(prompt_embeds()), conditioning(prompt_embeds(seed=6)), latent, steps)
    expected = pipeline(reference, shift, comfy.sample.prepare_noise(latent["samples"], SEED), steps)
    assert relative(found, expected / SCALE[variant]) < 1e-3


@pytest.mark.parametrize("frames", [3, 4])
def test_one_and_a_half_pads_odd_frames_in_front(load, frames):
    reference, model = load("1.5")
    latent = empty(frames)
    found = ksampler(model, conditioning(prompt_embeds()), conditioning(prompt_embeds(seed=6)), latent, 10)
    noise = comfy.sample.prepare_noise(latent["samples"], SEED)
    if frames % 2:
        noise = host_model._front_noise(noise, 1, SEED)
    expected = pipeline(reference, 1.0, noise, 10)[:, :, frames % 2 :]
    assert found.shape == latent["samples"].shape
    assert relative(found, expected / SCALE["1.5"]) < 1e-3


def test_other_sizes_and_batches(load):
    reference, model = load("5b")
    latent = empty(3, 1, 12, 16)
    found = ksampler(model, conditioning(prompt_embeds()), conditioning(prompt_embeds(seed=6)), latent, 10)
    expected = pipeline(reference, 1.0, comfy.sample.prepare_noise(latent["samples"], SEED), 10)
    assert relative(found, expected / SCALE["5b"]) < 1e-3
    assert (
        ksampler(
            model, conditioning(prompt_embeds()), conditioning(prompt_embeds()), empty(batch=2), 2
        ).shape[0]
        == 2
    )


@pytest.mark.parametrize("variant", ["5b", "2b"])
@pytest.mark.parametrize("longer_side", ["positive", "negative"])
def test_texts_of_different_length_share_a_batch_and_change_nothing(load, variant, longer_side):
    """Four tokens more on one side: one forward pass per step, and the numbers of two separate ones."""
    _, model = load(variant)
    longer = torch.cat((prompt_embeds(), prompt_embeds(4, seed=9)), dim=1)
    sides = conditioning(longer), conditioning(prompt_embeds(seed=6))
    positive, negative = sides if longer_side == "positive" else sides[::-1]
    shapes: list[tuple[int, ...]] = []

    def watch(executor: Any, x: Any, t: Any, context: torch.Tensor, *rest: Any) -> Any:
        shapes.append(tuple(context.shape[:2]))
        return executor(x, t, context, *rest)

    watched = model.clone()
    watched.add_wrapper_with_key("diffusion_model", "test", watch)
    together = ksampler(watched, positive, negative, empty(batch=2), 3)
    assert shapes == [(4, 20)] * 3

    shapes.clear()
    watched.model_options["sampler_calc_cond_batch_function"] = _one_by_one
    apart = ksampler(watched, positive, negative, empty(batch=2), 3)
    assert sorted(shapes) == [(2, 16)] * 3 + [(2, 20)] * 3
    assert relative(together, apart) < 1e-5


def _one_by_one(args: dict[str, Any]) -> list[torch.Tensor]:
    """Each condition in a forward pass of its own."""
    from comfy.samplers import calc_cond_batch

    rest = (args["input"], args["sigma"], args["model_options"])
    return [calc_cond_batch(args["model"], [cond], *rest)[0] for cond in args["conds"]]


def test_sampler_node_is_ksampler_bit_for_bit(load, run_node):
    _, model = load("5b")
    positive, negative, latent = conditioning(prompt_embeds()), conditioning(prompt_embeds(seed=6)), empty()
    options = {"sampler_name": "dpmpp_2m_sde", "scheduler": "sgm_uniform", "denoise": 0.8}
    expected = ksampler(model, positive, negative, latent, 5, **options)
    (found,) = run_node(
        MimirSampler,
        model=model,
        positive=positive,
        negative=negative,
        latent=latent,
        seed=SEED,
        steps=5,
        cfg=CFG,
        dynamic_cfg="off",
        **options,
    )
    assert torch.equal(found["samples"], expected)


def test_diffusers_dynamic_cfg_is_the_pipelines(load):
    reference, model = load("5b")
    latent, before = empty(), dict(model.model_options)
    dynamic = sampling.with_dynamic_cfg(model, "diffusers curve")
    found = ksampler(dynamic, conditioning(prompt_embeds()), conditioning(prompt_embeds(seed=6)), latent, 10)
    expected = pipeline(reference, 1.0, comfy.sample.prepare_noise(latent["samples"], SEED), 10, dynamic=True)
    assert relative(found, expected / SCALE["5b"]) < 1e-3
    assert dict(model.model_options) == before  # the MODEL that came in is untouched


def test_cosine_ramp_keeps_another_nodes_cfg_function(load):
    _, model = load("5b")
    seen: list[float] = []

    def watch(args: dict[str, Any]) -> torch.Tensor:
        seen.append(args["cond_scale"])
        return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]

    watched = model.clone()
    watched.set_model_sampler_cfg_function(watch)
    ramp = sampling.with_dynamic_cfg(watched, "cosine ramp (SAT)")
    ksampler(ramp, conditioning(prompt_embeds()), conditioning(prompt_embeds()), empty(), 10)
    assert seen == sorted(seen) and seen[0] == pytest.approx(1.0) and seen[-1] > 4


def test_nan_is_an_error_with_a_remedy(load, run_node):
    _, model = load("5b")
    broken = conditioning(torch.full((1, 16, references.TEXT_WIDTH), float("inf")))
    with pytest.raises(ValueError, match="NaN or infinite.*bfloat16 or float32.*download it again"):
        run_node(
            MimirSampler,
            model=model,
            positive=broken,
            negative=broken,
            latent=empty(),
            seed=0,
            steps=1,
            cfg=1.0,
            dynamic_cfg="off",
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        )


def test_tokens_of_another_width_are_refused_in_a_sentence(load):
    _, model = load("5b")
    with pytest.raises(ValueError, match="4096 wide, but this Mimir DiT reads text tokens that are 24 wide"):
        ksampler(model, conditioning(torch.zeros(1, 226, 4096)), conditioning(prompt_embeds()), empty(), 1)


def test_blocks_can_be_replaced_and_followed(load):
    _, model = load("5b")
    plain = ksampler(model, conditioning(prompt_embeds()), conditioning(prompt_embeds()), empty(), 2)
    seen: list[tuple[int, int]] = []

    def keep(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        options = args["transformer_options"]
        seen.append((options["block_index"], options["total_blocks"]))
        return extra["original_block"](args)

    patched = model.clone()
    patched.set_model_patch_replace(keep, "dit", "double_block", 1)
    same = ksampler(patched, conditioning(prompt_embeds()), conditioning(prompt_embeds()), empty(), 2)
    assert torch.equal(plain, same) and set(seen) == {(1, 2)}


def test_interrupt_stops_between_steps(load, run_node):
    import comfy.model_management as management

    _, model = load("5b")
    calls: list[int] = []

    def interrupt(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            management.interrupt_current_processing(True)
        return executor(*args, **kwargs)

    watched = model.clone()
    watched.add_wrapper_with_key("diffusion_model", "test", interrupt)
    with pytest.raises(management.InterruptProcessingException):
        ksampler(watched, conditioning(prompt_embeds()), conditioning(prompt_embeds()), empty(), 20)
    assert len(calls) == 2


def test_live_preview_shows_the_first_frame(load):
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    _, model = load("5b")
    method, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    try:
        previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    finally:
        args.preview_method = method
    kind, image, _ = previewer.decode_latent_to_preview_image("JPEG", torch.randn(1, 16, 3, 8, 12))
    assert kind == "JPEG" and image.size == (12, 8)
    assert image.convert("L").getextrema()[1] - image.convert("L").getextrema()[0] > 60


def test_fitted_preview_comes_from_the_files_header(load, tmp_path):
    from mimir_pack.mimir_core.weights import read_transformer, save_transformer

    load("5b")
    reference = references.transformer()
    reference.save_pretrained(tmp_path / "dit")
    source = read_transformer(tmp_path / "dit")
    preview = {"factors": [[0.1, 0.2, 0.3]] * 16, "bias": [0.5, 0.0, 0.0]}
    save_transformer(
        tmp_path / "x.safetensors", source.config, source.diffusion, source.state, preview=preview
    )
    latent = host_model.load_dit(tmp_path / "x.safetensors").model.latent_format
    assert latent.latent_rgb_factors == preview["factors"] and latent.latent_rgb_factors_bias[0] == 0.5


def test_a_fused_window_holds_for_its_part_of_the_steps(load):
    """Token Fuser with start 0.25 and end 0.75: twenty tokens in the middle, T5 alone outside."""
    from mimir_pack.nodes.host.fuser import _in_window

    _, model = load("5b")
    joined = torch.cat((prompt_embeds(), prompt_embeds(4, seed=9)), dim=1)
    positive = _in_window(conditioning(joined)[0], conditioning(prompt_embeds())[0], (0.25, 0.75))
    lengths: list[int] = []

    def watch(executor: Any, x: Any, t: Any, context: torch.Tensor, *rest: Any) -> Any:
        if not torch.equal(context[:1], negative):
            lengths.append(context.shape[1])
        return executor(x, t, context, *rest)

    negative = torch.zeros(1, 16, references.TEXT_WIDTH)
    watched = model.clone()
    watched.add_wrapper_with_key("diffusion_model", "test", watch)
    with torch.inference_mode():
        host_nodes.common_ksampler(
            watched, SEED, 8, 1.0, "euler", "simple", positive, conditioning(negative), empty()
        )
    assert lengths == [16, 16, 20, 20, 20, 20, 16, 16]
