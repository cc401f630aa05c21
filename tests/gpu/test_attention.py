"""Attention at CogVideoX's real shapes: every kernel gives SDPA's numbers, on views, and its time is kept."""

from __future__ import annotations

import pytest
import torch

from mimir_core.attention import choose_attention, sdpa
from mimir_core.bench import measure
from mimir_core.bench.rivals import attentions

CUDA = torch.device("cuda")
SHAPES = {"5B 49x480x720": (48, 17776), "2B 49x480x720": (30, 17776), "5B 17x480x720": (48, 6976)}
KERNELS = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "xformers")


def projections(heads: int, tokens: int) -> list[torch.Tensor]:
    """q, k, v as the DiT hands them over: (1, H, L, D), views of (1, L, H D)."""
    generator = torch.Generator(CUDA).manual_seed(0)
    made = (
        torch.randn(1, tokens, heads * 64, device=CUDA, dtype=torch.bfloat16, generator=generator)
        for _ in range(3)
    )
    return [tensor.unflatten(-1, (heads, 64)).transpose(1, 2) for tensor in made]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_agree_at_real_shapes(shape, kernel, figure):
    available = dict(attentions(CUDA))
    if kernel not in available:
        pytest.skip(choose_attention(CUDA)[1])
    q, k, v = projections(*SHAPES[shape])
    try:
        found = available[kernel](q, k, v)
    except RuntimeError as error:
        pytest.skip(f"no such kernel on this GPU: {str(error).splitlines()[0]}")
    assert measure.difference(found, sdpa(q, k, v))[1] < 2e-2
    runs = [lambda: available[kernel](q, k, v), lambda: sdpa(q, k, v)]
    times = measure.alternate(runs, 10, 2, synchronize=torch.cuda.synchronize)
    heads, tokens = SHAPES[shape]
    spread = measure.Spread.of(times[0])
    figure(f"TFLOP/s, attention {shape}, {kernel}", 4 * heads * 64 * tokens**2 / spread.median / 1e12)
    figure(f"time over sdpa's, attention {shape}, {kernel}", measure.ratios(*times).median)


def test_the_choice_is_said(figure):
    chosen, reason = choose_attention(CUDA)
    figure("attention", reason)
    assert reason.startswith("Attention: ") and callable(chosen)
