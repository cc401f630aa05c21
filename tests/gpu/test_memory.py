"""What a step takes on the card, at real sizes, against the plan's arithmetic."""

from __future__ import annotations

import pytest
import torch

from mimir_core import memory
from mimir_core.bench import measure
from mimir_core.bench.rivals import inputs, ours, random_state
from mimir_core.bench.shapes import REAL, Shape

CUDA = torch.device("cuda")


@pytest.mark.parametrize("shape", REAL, ids=lambda shape: shape.name)
def test_a_step_takes_what_the_plan_says(shape: Shape, figure):
    free, _ = torch.cuda.mem_get_info()
    needed = memory.dit(shape.config, shape.latents, shape.batch, shape.text, 2)
    before = torch.cuda.memory_allocated()
    weights = 2 * sum(p.numel() for p in _on_meta(shape).parameters())
    if free < 1.2 * (weights + needed):
        pytest.skip(f"{free / 1e9:.0f} GB free, {(weights + needed) / 1e9:.0f} GB needed")
    model = ours(shape, random_state(shape.config, CUDA, torch.bfloat16))
    assert torch.cuda.memory_allocated() - before == pytest.approx(weights, rel=0.01)
    given = inputs(shape, CUDA, torch.bfloat16)
    with torch.inference_mode():
        model(*given)
        model._cached = None  # the rotary tables count
        found = measure.peak_bytes(lambda: model(*given), CUDA)
    assert found is not None
    figure(f"GB of activations, {shape.name}", found / 1e9)
    figure(f"plan over measured, {shape.name}", needed / found)
    assert needed == pytest.approx(found, rel=0.15)


def _on_meta(shape: Shape) -> torch.nn.Module:
    from mimir_core.dit import CogVideoXTransformer

    with torch.device("meta"):
        return CogVideoXTransformer(shape.config)
