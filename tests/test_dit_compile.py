"""Our DiT under torch.compile and between its matrix products: one graph, no recompiling, no copies."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_core.config import DiTConfig
from mimir_core.dit import CogVideoXTransformer, modulate_and_join
from mimir_core.positions import rotary_table, rotate, rotate_real

diffusers = pytest.importorskip("diffusers")

COMMON: dict[str, Any] = {
    "num_attention_heads": 3,
    "text_embed_dim": 24,
    "time_embed_dim": 20,
    "sample_height": 12,
    "sample_width": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {"attention_head_dim": 32, "use_rotary_positional_embeddings": False},
    "5b": {"attention_head_dim": 32},
    "1.5": {"attention_head_dim": 16, "patch_size_t": 2, "patch_bias": False},
}


def model(variant: str, layers: int = 2, **arguments: Any) -> CogVideoXTransformer:
    torch.manual_seed(0)
    return CogVideoXTransformer(
        DiTConfig(num_layers=layers, **COMMON, **VARIANTS[variant]), **arguments
    ).eval()


def inputs(timestep: int = 500, size: tuple[int, int] = (12, 16), text: int = 7) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 4, *size, generator=generator)
    return latents, torch.tensor([timestep, timestep]), torch.randn(2, text, 24, generator=generator)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("variant, gradient", [("2b", False), ("5b", False), ("5b", True), ("1.5", False)])
def test_the_model_is_one_graph_for_every_timestep(variant, gradient):
    plain, counter = model(variant, layers=1), CompileCounterWithBackend("aot_eager" if gradient else "eager")
    compiled = torch.compile(plain, backend=counter, fullgraph=True)
    with torch.enable_grad() if gradient else torch.inference_mode():
        for timestep in (999, 500, 19):
            found, expected = compiled(*inputs(timestep)), plain(*inputs(timestep))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_another_size_is_compiled_once_and_right():
    """Also where the compiler has begun to take sizes for variables: the tables need numbers."""
    plain, counter = model("5b", layers=1), CompileCounterWithBackend("eager")
    compiled = torch.compile(plain, backend=counter, fullgraph=True)
    calls = [{}, {"size": (8, 16)}, {"size": (12, 10)}, {"text": 9}]
    with torch.inference_mode():
        for call in calls * 2:
            torch.testing.assert_close(
                compiled(*inputs(**call)), plain(*inputs(**call)), atol=1e-5, rtol=1e-5
            )
    assert counter.frame_count <= len(calls)


def test_blocks_compiled_alone_share_one_graph():
    plain, counter = model("5b", layers=3), CompileCounterWithBackend("aot_eager")
    with torch.inference_mode():
        expected = plain(*inputs())
        for block in plain.transformer_blocks:
            block.compile(backend=counter, fullgraph=True)
        torch.testing.assert_close(plain(*inputs()), expected, atol=1e-5, rtol=1e-5)
        plain(*inputs(19))
    assert counter.frame_count == 1


class Operators(TorchDispatchMode):
    """Counts the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


COPIES = {"clone", "copy_", "_to_copy", "cat", "stack", "flip", "contiguous"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_copies_nothing(variant):
    """float32, no gradient: what two more blocks add are computations and views."""

    def seen(layers: int) -> Counter[str]:
        network = model(variant, layers)
        with torch.no_grad():
            network(*inputs())  # builds the tables
            with Operators() as operators:
                network(*inputs(19))
        return operators.seen

    more = seen(3) - seen(1)
    assert not COPIES & set(more), more
    assert more["addmm"] == 2 * 8  # q, k, v, out, two of the feed-forward, one for each modulation
    assert more["native_layer_norm"] == 2 * 6
    assert not {"arange", "cos", "sin", "exp"} & set(seen(1) - Counter(cos=1, sin=1))  # of the timestep


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_gets_views_of_the_projections(variant):
    got: list[tuple[Tensor, Tensor, Tensor]] = []

    def attention(q, k, v, *, mask=None, options=None):
        got.append((q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    network, values = model(variant, attention=attention), []
    blocks: Any = network.transformer_blocks
    for block in blocks:
        block.attn1.to_v.register_forward_hook(lambda _module, _inputs, output: values.append(output))
    with torch.no_grad():
        network(*inputs())
    assert len(got) == len(values) == 2
    for (q, k, v), value in zip(got, values, strict=True):
        assert v.data_ptr() == value.data_ptr()
        assert all(x.transpose(1, 2).is_contiguous() for x in (q, k, v))  # laid out as (B, L, H, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_ways_to_rotate_agree(dtype):
    config = DiTConfig(num_layers=1, **COMMON, **VARIANTS["5b"])
    rope = rotary_table(config, (2, 3, 4), 5)
    x = torch.randn(2, 5 + 24, 3, 32, dtype=dtype)
    found, expected = rotate(x, rope), rotate_real(x, rope)
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)
    assert torch.equal(rotate(x, rope._replace(turn=None)), expected)


def test_joining_without_gradient_equals_the_reference():
    shifts = [torch.randn(2, 1, 8) for _ in range(4)]
    text, video = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    arguments = (text, shifts[0], shifts[1], video, shifts[2], shifts[3])
    with torch.no_grad():
        found = modulate_and_join(*arguments)
    assert torch.equal(found, modulate_and_join(*arguments))


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_bfloat16_is_at_least_as_near_to_float32_as_diffusers(variant):
    """Ours against theirs, same bfloat16 weights and inputs, both against float32."""
    exact, rough = model(variant, layers=3), model(variant, layers=3).to(torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in rough.state_dict().items()})
    config = dataclasses.asdict(dataclasses.replace(exact.config, max_text_seq_length=7))
    theirs = diffusers.CogVideoXTransformer3DModel(**config)
    theirs.load_state_dict(rough.state_dict())
    theirs = theirs.to(torch.bfloat16).eval()
    latents, timestep, text = inputs()
    latents, text = latents.bfloat16(), text.bfloat16()
    rope = rotary_table(exact.config, exact.grid(latents), 7)
    assert rope.turn is not None
    angles = (rope.cos[7:, 0], rope.turn.imag.repeat_interleave(2, -1)[7:, 0])
    with torch.inference_mode():
        expected = exact(latents.float(), timestep, text.float())
        ours = rough(latents, timestep, text)
        other = theirs(
            latents.transpose(1, 2), text, timestep, image_rotary_emb=angles if variant == "5b" else None
        )
    error = (ours.float() - expected).norm().item()
    assert error <= 1.05 * (other.sample.transpose(1, 2).float() - expected).norm().item()
