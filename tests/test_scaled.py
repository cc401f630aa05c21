"""Scaled fp8: every layout is one, and scales keep what a plain cast loses."""

import pytest
import torch

from mimir_core.headers import TensorInfo
from mimir_core.scaled import dequantised, quantise, scaled, unread

WEIGHT = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * 0.02  # as of a trained network
STATE = {"a.weight": WEIGHT, "a.bias": torch.ones(64), "norm.weight": torch.ones(32)}


def error(found: torch.Tensor) -> float:
    return ((found.float() - WEIGHT).norm() / WEIGHT.norm()).item()


def test_quantised_and_back_is_within_fp8s_three_bits():
    found = quantise(STATE, ("a",))
    assert found.formats == {"a": "float8_e4m3fn"} and found.state["a.weight"].itemsize == 1
    plain = dequantised(found.state, torch.float32)
    assert plain.keys() == STATE.keys() and torch.equal(plain["norm.weight"], STATE["norm.weight"])
    assert error(plain["a.weight"]) < 2**-4 / 3**0.5  # half a step, spread evenly
    assert error(plain["a.weight"]) < error(WEIGHT.to(torch.float8_e4m3fn))


def test_small_weights_are_as_exact_as_large_ones():
    small = WEIGHT / 4
    found = dequantised(quantise({"a.weight": small}, ("a",)).state, torch.float32)["a.weight"]
    assert error(4 * found) < 0.03 and error(4 * small.to(torch.float8_e4m3fn).float()) > 0.1


def test_zero_weights_stay_zero():
    found = quantise({"a.weight": torch.zeros(4, 4)}, ("a",))
    assert torch.equal(dequantised(found.state, torch.float32)["a.weight"], torch.zeros(4, 4))


@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_layouts_differ_in_names_only(names):
    kept = quantise(STATE, ("a",))
    state = {**STATE, "a.weight": kept.state["a.weight"], f"a.{names[0]}": kept.state["a.weight_scale"][None]}
    marks = {"scaled_fp8": torch.zeros(2), "a.comfy_quant": torch.zeros(3, dtype=torch.uint8)}
    found = scaled({**state, **marks, f"a.{names[1]}": torch.tensor(2.0)})
    assert found.formats == kept.formats and found.state.pop("a.input_scale") == 2
    assert found.state.keys() == kept.state.keys()
    assert all(torch.equal(found.state[name].float(), tensor.float()) for name, tensor in kept.state.items())


def test_an_input_scale_of_one_says_nothing():
    state = {**quantise(STATE, ("a",)).state, "a.input_scale": torch.tensor(1.0)}
    assert "a.input_scale" not in scaled(state).state


@pytest.mark.parametrize(
    "extra",
    [
        {"a.weight_scale_2": ("F32", ())},
        {"a.weight_scale": ("F8_E8M0", (64, 1))},
        {"a.weight_scale": ("F32", ()), "a.comfy_quant": ("U8", (9,)), "a.weight": ("I8", (64, 32))},
    ],
    ids=["nvfp4", "mxfp8", "int8"],
)
def test_other_quantisations_are_known(tmp_path, extra):
    tensors = {"a.weight": ("F8_E4M3", (64, 32)), **extra}
    assert "nvfp4, mxfp8, int8" in (
        unread({n: TensorInfo(found[0], found[1], tmp_path) for n, found in tensors.items()}) or ""
    )
    one = {"a.weight": ("F8_E4M3", (64, 32)), "a.weight_scale": ("F32", (1,))}
    assert unread({n: TensorInfo(found[0], found[1], tmp_path) for n, found in one.items()}) is None
