"""The host's contestants: our DiT on its attention and, where the host has one, its own CogVideoX."""

import importlib.util

import pytest
import torch
from mimir_pack.mimir_core.bench import measure
from mimir_pack.mimir_core.bench.rivals import Missing, Model, inputs, models, random_state
from mimir_pack.mimir_core.bench.shapes import SMALL, TINY
from mimir_pack.nodes.host import bench

CPU = torch.device("cpu")
HAS_NATIVE = importlib.util.find_spec("comfy.ldm.cogvideo") is not None


def contest(shape):
    """(relative differences to diffusers' output by name and attention, what is missing)."""
    state = random_state(shape.config, CPU, torch.float32)
    given = inputs(shape, CPU, torch.float32)
    found = [*models(shape, state), *bench.models(shape, state)]
    with torch.inference_mode():
        outputs = {(m.name, m.attention): m.predict(*given) for m in found if isinstance(m, Model)}
    expected = outputs["diffusers", "sdpa"]
    off = {name: measure.difference(output, expected)[1] for name, output in outputs.items()}
    return off, [m for m in found if isinstance(m, Missing)]


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_the_hosts_contestants_compute_the_same(shape):
    off, missing = contest(shape)
    attention = next(name[1] for name in off if name[0] == "ours" and name[1] != "sdpa")
    assert attention.startswith("host: ") and off["ours", attention] < 1e-5
    if not HAS_NATIVE:
        assert [m.name for m in missing] == [bench.NATIVE]
        assert "no CogVideoX of its own" in missing[0].reason
    elif shape.config.use_rotary_positional_embeddings:
        assert off[bench.NATIVE, attention] < 1e-5
    else:  # 2B: the host's sin-cos table is another one, and its row says so
        assert off[bench.NATIVE, attention] > 1e-2 and bench.native_note(shape)


def test_a_note_says_what_cannot_be_compared():
    small, rotary, newer = SMALL
    assert "sin-cos" in bench.native_note(small)
    assert bench.native_note(rotary) == "spatial_interpolation_scale set to 1.0"
    assert bench.native_note(newer) == ""
