"""Core's own nodes around our MODEL: samplers, guiders, caches and patches take it as any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from mimir_pack.nodes.host import model as host_model
from mimir_pack.tests.host.inprocess import references

import nodes as host_nodes

SEED, STEPS, CFG = 7, 6, 6.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("dit")
    references.transformer().save_pretrained(folder)
    return host_model.load_dit(folder)


def condition(seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 16, references.TEXT_WIDTH, generator=generator), {"pooled_output": None}]]


def latent() -> dict[str, Any]:
    return {"samples": torch.zeros(1, 16, 3, 8, 8)}


def ksampler(model: Any, negative: Any = None) -> torch.Tensor:
    negative = negative or condition(2)
    with torch.inference_mode():
        return host_nodes.common_ksampler(
            model, SEED, STEPS, CFG, "euler", "simple", condition(1), negative, latent()
        )[0]["samples"]


def call(node: Any, **inputs: Any) -> Any:
    """A node of core's, in the new form or the old, and its first output."""
    with torch.inference_mode():
        if hasattr(node, "EXECUTE_NORMALIZED"):
            return node.EXECUTE_NORMALIZED(**inputs).result[0]
        return getattr(node(), node.FUNCTION)(**inputs)[0]


def test_custom_sampling_is_ksampler(model):
    guider = call(custom.CFGGuider, model=model, positive=condition(1), negative=condition(2), cfg=CFG)
    found = call(
        custom.SamplerCustomAdvanced,
        noise=call(custom.RandomNoise, noise_seed=SEED),
        guider=guider,
        sampler=call(custom.KSamplerSelect, sampler_name="euler"),
        sigmas=call(custom.BasicScheduler, model=model, scheduler="simple", steps=STEPS, denoise=1.0),
        latent_image=latent(),
    )
    assert torch.equal(found["samples"], ksampler(model))


def test_cfg_and_sampling_patches(model):
    from comfy_extras import nodes_model_advanced as advanced

    plain = ksampler(model)
    rescaled = ksampler(call(advanced.RescaleCFG, model=model, multiplier=0.7))
    assert torch.isfinite(rescaled).all() and not torch.equal(rescaled, plain)
    same = call(advanced.ModelSamplingDiscrete, model=model, sampling="v_prediction", zsnr=True)
    assert ((ksampler(same) - plain).norm() / plain.norm()).item() < 1e-3  # shift 1 is core's own schedule


def test_easy_cache_wraps_the_network(model):
    easycache = pytest.importorskip("comfy_extras.nodes_easycache")
    cached = call(
        easycache.EasyCacheNode,
        model=model,
        reuse_threshold=0.9,
        start_percent=0.1,
        end_percent=0.95,
        verbose=False,
    )
    found = ksampler(cached)
    assert torch.isfinite(found).all() and found.shape == (1, 16, 3, 8, 8)


def test_zeroed_negative(model):
    zeroed = call(host_nodes.ConditioningZeroOut, conditioning=condition(2))
    assert not torch.equal(ksampler(model, zeroed), ksampler(model))
