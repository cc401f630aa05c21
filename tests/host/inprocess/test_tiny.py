"""Mimir Tiny through nodes and host against the core's pipeline, and what partial offloading needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mimir_pack import nodes
from mimir_pack.mimir_core.config import DEFAULT_INSTRUCTIONS
from mimir_pack.mimir_core.pipeline import text_to_video
from mimir_pack.mimir_core.tiny.parts import load_parts
from mimir_pack.nodes.host import tiny

PROMPT, SEED, STEPS, CFG = "a red circle moves left", 11, 10, 3.0
READ = {
    "instructions": "\n".join(DEFAULT_INSTRUCTIONS),
    "answer_length": 8,
    "temperature": 0.0,
    "seed": 0,
    "layer": -1,
}
FUSE = {"preset": "as trained", "start": 0.0, "end": 1.0}
SAMPLE = {
    "seed": SEED,
    "steps": STEPS,
    "cfg": CFG,
    "dynamic_cfg": "off",
    "sampler_name": "euler",
    "scheduler": "simple",
    "denoise": 1.0,
}


@pytest.fixture(scope="module")
def parts() -> tuple[Any, ...]:
    return tiny.load_tiny("mimir")


def through_nodes(parts: tuple[Any, ...], run_node: Any, strength: float) -> torch.Tensor:
    model, t5, phi, fuser, vae = parts

    def read(text: str) -> Any:
        (condition,) = run_node(nodes.MimirT5Encode, clip=t5, text=text)
        tokens, _ = run_node(nodes.MimirPhiEncode, clip=phi, text=text, **READ)
        inputs = {"conditioning": condition, "tokens": tokens, "fuser": fuser, "strength": strength}
        return run_node(nodes.MimirTokenFuser, **inputs, **FUSE)[0]

    (empty,) = run_node(nodes.MimirEmptyLatent, width=64, height=64, frames=9, batch=1)
    conditions = {"positive": read(PROMPT), "negative": read("")}
    (latent,) = run_node(nodes.MimirSampler, model=model, latent=empty, **conditions, **SAMPLE)
    return run_node(nodes.MimirVAEDecode, vae=vae, latent=latent, tiling="auto")[0]


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_nodes_and_pipeline_make_the_same_video(parts, run_node, strength):
    assert parts[3].trained
    found = through_nodes(parts, run_node, strength)
    expected = text_to_video(
        load_parts(), PROMPT, width=64, height=64, frames=9, steps=STEPS, cfg=CFG, seed=SEED,
        strength=strength, max_answer_tokens=READ["answer_length"],
    )  # fmt: skip
    assert found.shape == expected.shape == (9, 64, 64, 3)
    assert (found - expected).abs().mean() < 2e-3


def test_every_weight_is_in_a_leaf_of_the_hosts_operations(parts):
    """Else the host could not offload it: it would stay where it is, whatever the host wants."""
    model, _, phi, fuser, _ = parts
    for network in (model.model.diffusion_model, phi.cond_stage_model.phi, fuser.module):
        assert not list(network.buffers())
        for name, module in network.named_modules():
            if list(module.parameters(recurse=False)):
                assert not list(module.children()), name
                assert hasattr(module, "comfy_cast_weights"), name


def test_every_output_is_known_to_the_hosts_memory_management(parts):
    from comfy.model_patcher import ModelPatcher

    assert all(isinstance(part, ModelPatcher) or isinstance(part.patcher, ModelPatcher) for part in parts)


def test_five_thousand_words_work_and_both_nodes_say_what_was_cut(parts):
    _, t5, phi, _, _ = parts
    text = "a red circle moves left " * 1000
    with torch.inference_mode():
        short = nodes.MimirT5Encode.EXECUTE_NORMALIZED(clip=t5, text=text)
        long = nodes.MimirPhiEncode.EXECUTE_NORMALIZED(clip=phi, text=text, **{**READ, "answer_length": 0})
    assert "too long for T5: the last" in short.ui.value and short.result[0][0][0].shape[1] == 64
    assert "The prompt was too long for it: it read up to '..." in long.ui.value
    assert torch.isfinite(long.result[0].query).all()
