"""The fused CONDITIONING in models of other people that read T5-XXL, and what its attention mask tells them.

LTXV hides the tokens that the mask leaves out, Mochi reads as many tokens as the mask has ones, from the
first on. Both are built from the host's own classes at a tiny size. Through the queue: test_community.py.
"""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from mimir_pack.mimir_core.config import FuserConfig
from mimir_pack.mimir_core.fuser import untrained_state
from mimir_pack.mimir_core.tokens import LlmTokens
from mimir_pack.nodes.fuse import MimirTokenFuser
from mimir_pack.nodes.host import fuser as host_fuser

import nodes as host_nodes

TEXT, LLM, LENGTH = 32, 48, 226
LTXV = {
    "image_model": "ltxv", "num_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
    "cross_attention_dim": 64, "caption_channels": TEXT,
}  # fmt: skip
MOCHI = {
    "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 4, "hidden_size_x": 96,
    "hidden_size_y": 48, "mlp_ratio_x": 128.0, "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12,
    "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "timestep_scale": 1000.0,
    "use_t5": True, "t5_feat_dim": TEXT,
}  # fmt: skip
LATENT = {"ltxv": (1, 128, 3, 4, 4), "mochi": (1, 12, 3, 8, 8)}


@pytest.fixture(scope="module", params=["ltxv", "mochi"])
def other(request) -> tuple[str, Any]:
    """(family, a MODEL of it with random weights)."""
    family, kind = {
        "ltxv": (LTXV, comfy.supported_models.LTXV),
        "mochi": (MOCHI, comfy.supported_models.GenmoMochi),
    }[request.param]
    torch.manual_seed(1)
    config = kind(family)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}).eval().requires_grad_(False)
    for name, parameter in model.diffusion_model.named_parameters():
        one = "norm" in name and parameter.ndim == 1
        parameter.data = torch.ones_like(parameter) if one else torch.randn(parameter.shape) * 0.15
    cpu = torch.device("cpu")
    return request.param, comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module")
def fuser() -> host_fuser.Fuser:
    """A fuser whose fusion is no identity."""
    config = FuserConfig(text_dim=TEXT, llm_dim=LLM)
    generator = torch.Generator().manual_seed(2)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in untrained_state(config).items()
    }
    return host_fuser.build_fuser("test.safetensors", config, state)


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llm(length: int) -> LlmTokens:
    """`length` tokens of a language model, and four instructions."""
    return LlmTokens(
        query=tokens(3, 1, length, LLM),
        answer=tokens(4, 1, 0, LLM),
        instruction=tokens(5, 1, 4, LLM),
        pieces=["x"] * length,
        prompt="p",
        answer_text="",
        instructions=tuple("abcd"),
        layer=-1,
    )


def text(words: int) -> list[Any]:
    """What such a model's own CLIP gives for a prompt of `words` tokens."""
    mask = (torch.arange(LENGTH) < words).long()[None]
    return [[tokens(6, 1, LENGTH, TEXT), {"pooled_output": None, "attention_mask": mask}]]


def fuse(fuser: Any, words: int, length: int, **options: Any) -> list[Any]:
    inputs = {"preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0, **options}
    with torch.inference_mode():
        return MimirTokenFuser.EXECUTE_NORMALIZED(
            conditioning=text(words), tokens=llm(length), fuser=fuser, **inputs
        ).result[0]


def sample(family: str, model: Any, positive: list[Any]) -> torch.Tensor:
    with torch.inference_mode():
        return host_nodes.common_ksampler(
            model, 7, 2, 3.0, "euler", "simple", positive, text(2), {"samples": torch.zeros(LATENT[family])}
        )[0]["samples"]


def test_the_fused_condition_is_accepted_and_read(other, fuser):
    family, model = other
    fused = fuse(fuser, words=12, length=9)
    assert fused[0][0].shape == (1, 230, TEXT)
    found, alone = sample(family, model, fused), sample(family, model, text(12))
    assert found.shape == LATENT[family] and torch.isfinite(found).all()
    assert (found - alone).norm() > 1e-3 * alone.norm()


@pytest.mark.parametrize(("words", "length"), [(12, 9), (12, 40), (226, 9)])
def test_all_that_was_added_is_read_and_nothing_of_the_padding(other, fuser, words, length):
    """As if the tokens that count were the only ones."""
    family, model = other
    ((joined, options),) = fuse(fuser, words, length)
    count = max(words, length) + 4
    assert options["attention_mask"].tolist() == [[1] * count + [0] * (230 - count)]
    assert options["attention_mask"].dtype == torch.long
    only = [[joined[:, :count], {"attention_mask": torch.ones(1, count, dtype=torch.long)}]]
    found, expected = sample(family, model, [[joined, options]]), sample(family, model, only)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    if words < LENGTH:
        garbage = torch.cat((joined[:, :count], 9 * tokens(8, 1, 230 - count, TEXT)), dim=1)
        assert torch.allclose(sample(family, model, [[garbage, options]]), found, atol=1e-5)


def test_outside_its_window_the_condition_is_what_it_was(fuser):
    fused = fuse(fuser, words=12, length=9, start=0.5)
    alone = next(entry for entry in fused if entry[1]["start_percent"] == 0.0)
    assert torch.equal(alone[0], text(12)[0][0])
    assert torch.equal(alone[1]["attention_mask"], text(12)[0][1]["attention_mask"])


def test_other_options_stay_and_nothing_is_added(fuser):
    """Pooled vectors, sizes and guidance belong to other encoders, or to nobody: they pass."""
    pooled = tokens(9, 1, 5)
    given = [[text(12)[0][0], {"pooled_output": pooled, "guidance": 3.5}]]
    inputs = {"preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0}
    with torch.inference_mode():
        ((_, options),) = MimirTokenFuser.EXECUTE_NORMALIZED(
            conditioning=given, tokens=llm(3), fuser=fuser, **inputs
        ).result[0]
    assert options["pooled_output"] is pooled and options["guidance"] == 3.5
    assert set(options) - set(given[0][1]) <= {"mimir"}


def test_a_mask_that_reads_all_leaves_the_order(fuser):
    """T5 Encode's own mask: nothing moves, bit for bit."""
    given = text(LENGTH)
    bare = [[given[0][0], {"pooled_output": None}]]
    inputs = {"preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0, "fuser": fuser}
    with torch.inference_mode():
        one, other = (
            MimirTokenFuser.EXECUTE_NORMALIZED(conditioning=entry, tokens=llm(7), **inputs).result[0][0]
            for entry in (given, bare)
        )
    assert torch.equal(one[0], other[0]) and one[1]["attention_mask"].shape == (1, 230)
