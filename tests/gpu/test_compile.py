"""torch.compile with its real backend: one graph, the same numbers, and how many kernels a block becomes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mimir_core.bench.measure import difference
from mimir_core.bench.rivals import inputs, ours, random_state
from mimir_core.bench.shapes import SMALL, Shape

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks"])
def test_compiled_equals_eager(shape: Shape, blocks, figure):
    state = random_state(shape.config, CUDA, torch.bfloat16)
    given = inputs(shape, CUDA, torch.bfloat16)
    model = ours(shape, state)
    with torch.inference_mode():
        expected = ours(shape, state)(*given)
        if blocks:
            for block in model.transformer_blocks:
                block.compile(fullgraph=True, dynamic=False)
        else:
            model.compile(fullgraph=True, dynamic=False)
        error = difference(model(*given), expected)[1]
    figure(f"compiled to eager, {shape.name}, {'blocks' if blocks else 'whole'}", error)
    assert error < 2e-2


def test_kernels_between_the_matrix_products(figure):
    """Two blocks more: what they add to the generated kernels (norms, modulation, rotary, gates, GELU)."""
    from torch._inductor import metrics

    def kernels(layers: int) -> int:
        torch.compiler.reset()
        metrics.reset()
        shape = replace(SMALL[1], config=replace(SMALL[1].config, num_layers=layers))
        model = torch.compile(ours(shape, random_state(shape.config, CUDA, torch.bfloat16)), fullgraph=True)
        with torch.inference_mode():
            model(*inputs(shape, CUDA, torch.bfloat16))
        return metrics.generated_kernel_count

    more = (kernels(4) - kernels(2)) / 2
    figure("generated kernels in a compiled block", more)
    assert 0 < more < 30  # the operators of an eager block, matrix products apart
