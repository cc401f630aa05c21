"""Our Phi-3 against transformers' Phi3ForCausalLM with the same random weights, on CPU in float32."""

import dataclasses
import math

import pytest
import torch
import transformers

from mimir_core import phi
from mimir_core.attention import sdpa
from mimir_core.config import PhiConfig
from mimir_core.phi import Phi3ForCausalLM, causal_mask, rope_frequencies

BORDER = 24  # original_max_position_embeddings of the tiny model: short factors up to here, long ones beyond


def tiny_config(**changes) -> PhiConfig:
    values = dict(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32 * BORDER, original_max_position_embeddings=BORDER,
        short_factor=(1.0, 1.1, 1.2, 1.5, 2.0, 3.0), long_factor=(1.5, 2.0, 4.0, 8.0, 16.0, 31.0),
        bos_token_id=1, eos_token_id=(2,), pad_token_id=0,
    )  # fmt: skip
    return PhiConfig(**{**values, **changes})


def pair(config: PhiConfig) -> tuple[Phi3ForCausalLM, transformers.Phi3ForCausalLM]:
    """Ours and theirs with equal weights, none of them trivial (norms included)."""
    torch.manual_seed(0)
    theirs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**config.to_dict())).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    ours = Phi3ForCausalLM(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def models() -> tuple[Phi3ForCausalLM, transformers.Phi3ForCausalLM]:
    return pair(tiny_config())


@pytest.mark.parametrize("length", [1, 7, BORDER, BORDER + 1, 3 * BORDER])
@torch.no_grad()
def test_every_hidden_state_and_logits_equal_transformers(models, length):
    ours, theirs = models
    ids = tokens(length)
    expected = theirs(ids, output_hidden_states=True)
    found = ours(ids, layers=range(4))
    assert max(relative(a, b) for a, b in zip(found, expected.hidden_states, strict=True)) < 1e-5
    assert relative(ours.logits(found[-1]), expected.logits) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"short_factor": (), "long_factor": ()},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 2},
        {"rope_theta": 500.0},
    ],
    ids=["plain_rope", "tied", "grouped", "theta"],
)
@torch.no_grad()
def test_variants_equal_transformers(changes):
    ours, theirs = pair(tiny_config(**changes))
    expected = theirs(tokens(30), output_hidden_states=True)
    (found,) = ours(tokens(30))
    assert relative(found, expected.hidden_states[-1]) < 1e-5
    assert relative(ours.logits(found), expected.logits) < 1e-5


@torch.no_grad()
def test_factors_change_the_result(models):
    """The parity tests would be blind if the rotary factors did not matter at these sizes."""
    ours, _ = models
    plain = Phi3ForCausalLM(dataclasses.replace(tiny_config(), short_factor=(), long_factor=())).eval()
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert relative(plain(tokens(7))[0], ours(tokens(7))[0]) > 1e-2
    assert relative(plain(tokens(40))[0], ours(tokens(40))[0]) > 1e-2


def test_attention_factor_of_phi_3_5():
    config = tiny_config(max_position_embeddings=131072, original_max_position_embeddings=4096)
    assert math.isclose(rope_frequencies(config, long=False)[1], 1.19024, abs_tol=1e-5)


@pytest.mark.parametrize("start", [5, BORDER - 3])
@torch.no_grad()
def test_greedy_generation_equals_transformers(models, start):
    """From 5 tokens the answer stays below the border of the rotary factors, from 21 it crosses it."""
    ours, theirs = models
    ids = tokens(start, batch=1)
    count = 12
    expected = theirs.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache, new = ours.new_cache(), ids
    for _ in range(count):
        (hidden,) = ours(new, cache)
        new = ours.logits(hidden[:, -1:]).argmax(-1)
        ids = torch.cat((ids, new), dim=1)
    assert ids.tolist() == expected.tolist()
    assert len(set(ids[0, start:].tolist())) > 3


@pytest.mark.parametrize("cuts", [(9,), (1, 2, 3), (BORDER - 1, BORDER, BORDER + 1)])
@torch.no_grad()
def test_cached_equals_uncached(models, cuts):
    ours, _ = models
    ids, cache = tokens(2 * BORDER if BORDER in cuts else 20), ours.new_cache()
    edges = [0, *cuts, ids.shape[1]]
    for start, end in zip(edges, edges[1:], strict=False):
        last = ours(ids[:, start:end], cache, layers=range(4))
        whole = ours(ids[:, :end], layers=range(4))
        assert cache.length == end
        assert max(relative(a, b[:, start:]) for a, b in zip(last, whole, strict=True)) < 1e-5


@torch.no_grad()
def test_fork_leaves_the_original_alone(models):
    ours, _ = models
    ids, cache = tokens(12), ours.new_cache()
    ours(ids[:, :6], cache)
    ours(tokens(5), cache.fork())
    (found,) = ours(ids[:, 6:], cache)
    (expected,) = ours(ids)
    assert cache.length == 12
    assert relative(found, expected[:, 6:]) < 1e-5


def test_injected_ops_and_attention_are_used(models):
    reference, _ = models
    made, calls = [], []

    class Ops:
        @staticmethod
        def Linear(*args, **kwargs):
            made.append("Linear")
            return torch.nn.Linear(*args, **kwargs)

        @staticmethod
        def Embedding(*args, **kwargs):
            made.append("Embedding")
            return torch.nn.Embedding(*args, **kwargs)

        @staticmethod
        def RMSNorm(*args, **kwargs):
            made.append("RMSNorm")
            return torch.nn.RMSNorm(*args, **kwargs)

    def attention(q, k, v, *, mask=None, options=None):
        calls.append(options)
        return sdpa(q, k, v, mask=mask)

    ours = Phi3ForCausalLM(tiny_config(), ops=Ops, attention=attention)
    ours.load_state_dict(reference.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(ours(tokens(9), options="host")[0], reference(tokens(9))[0])
    assert (made.count("Linear"), made.count("Embedding"), made.count("RMSNorm")) == (3 * 4 + 1, 1, 3 * 2 + 1)
    assert calls == ["host"] * 3


def test_parameters_live_in_leaf_modules(models):
    ours, _ = models
    for module in ours.modules():
        assert not (list(module.children()) and list(module.parameters(recurse=False)))


@torch.no_grad()
def test_half_precision_stays_finite_with_large_activations(models):
    """Norms must not square in half precision: real models carry activations of some thousands."""
    ours, _ = models
    half = Phi3ForCausalLM(tiny_config(), dtype=torch.float16).eval()
    half.load_state_dict(ours.state_dict())
    half.model.embed_tokens.weight.mul_(3000.0)
    (hidden,) = half(tokens(20))
    assert hidden.dtype == torch.float16 and hidden.isfinite().all()
    (wide,) = half(tokens(20), dtype=torch.float16)
    assert torch.equal(wide, hidden)


def test_mask_hides_the_future_only():
    mask = causal_mask(3, 2, torch.zeros(1))
    assert mask is not None and mask.shape == (1, 1, 3, 5)
    assert (mask[0, 0] == 0).tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    assert mask.isfinite().all()
    assert causal_mask(1, 4, torch.zeros(1)) is None


@pytest.mark.parametrize("rows", [1, 5, 16])
@torch.no_grad()
def test_long_prompts_attend_in_pieces_to_the_same(models, monkeypatch, rows):
    """No mask grows with the square of the prompt, whatever was read before."""
    ours, theirs = models
    expected = theirs(tokens(33), output_hidden_states=True).hidden_states[-1]
    seen = []
    monkeypatch.setattr(phi, "ROWS", rows)
    monkeypatch.setattr(phi, "causal_mask", lambda *args: seen.append(args[:2]) or causal_mask(*args))
    assert relative(ours(tokens(33))[0], expected) < 1e-5
    assert max(new for new, _ in seen) <= rows
    cache = ours.new_cache()
    ours(tokens(33)[:, :20], cache)
    assert relative(ours(tokens(33)[:, 20:], cache)[0], expected[:, 20:]) < 1e-5


@torch.no_grad()
def test_wrong_requests_are_refused(models):
    ours, _ = models
    with pytest.raises(ValueError, match="layer is 4, .* -4 to 3"):
        ours(tokens(3), layers=(4,))
    with pytest.raises(ValueError, match="length of 1 or more"):
        ours(tokens(3)[:, :0])
    with pytest.raises(ValueError, match="multiple of num_key_value_heads 3"):
        Phi3ForCausalLM(tiny_config(num_key_value_heads=3))


def test_init_is_seeded_and_tied_models_train_one_matrix():
    models = [Phi3ForCausalLM(tiny_config(tie_word_embeddings=True)) for _ in range(2)]
    for model in models:
        model.tie_weights()
        model.init_weights(torch.Generator().manual_seed(3))
    a, b = (model.state_dict() for model in models)
    assert all(torch.equal(a[key], b[key]) for key in a)
    models[0].logits(models[0](tokens(4))[0]).sum().backward()
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight
    assert models[0].lm_head.weight.grad is not None and models[0].lm_head.weight.grad.abs().sum() > 0
