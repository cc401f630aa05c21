"""The Token Fuser: what the paper promises about it, for every row of the ablation."""

import dataclasses

import pytest
import torch

from mimir_core.config import FUSER_PRESETS, FuserConfig
from mimir_core.fuser import TokenFuser, untrained_state

B, N, L, K, DT, DL = 2, 10, 7, 4, 12, 8


def small(name: str) -> FuserConfig:
    return dataclasses.replace(FUSER_PRESETS[name], text_dim=DT, llm_dim=DL)


def make(name: str = "mimir") -> TokenFuser:
    fuser = TokenFuser(small(name))
    fuser.init_weights(torch.Generator().manual_seed(0))
    return fuser


def trained(name: str = "mimir") -> TokenFuser:
    """All parameters at random, as after training: no zero hides a mistake."""
    fuser = make(name)
    for parameter in fuser.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return fuser


def tokens(length: int = L, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = ((B, N, DT), (B, length, DL), (B, K, DL))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mimir", "zero_conv", "zero_conv_ss", "norm_zero_conv", "baseline"])
def test_untrained_sum_is_t5_bit_for_bit(name, dtype):
    text, llm, instruction = tokens(dtype=dtype)
    fused = make(name).to(dtype)(text, llm, instruction)
    assert torch.equal(fused[:, :N], text)


@pytest.mark.parametrize("name", FUSER_PRESETS)
def test_strength_zero_is_t5_itself(name):
    text, llm, instruction = tokens()
    assert trained(name)(text, llm, instruction, strength=0.0) is text


@pytest.mark.parametrize("name", FUSER_PRESETS)
def test_shape_and_parts_of_every_row(name):
    fuser, (text, llm, instruction) = trained(name), tokens()
    config = fuser.config
    fused = fuser(text, llm, instruction)
    assert fused.shape == (B, N + K * config.stabilizer, DT)
    assert hasattr(fuser, "norm") == config.norm and hasattr(fuser, "encoder_conv") == config.zero_conv
    depends = not torch.equal(fused[:, :N], fuser(text, llm + 1, instruction)[:, :N])
    assert depends == config.use_llm
    assert torch.equal(fused[:, :N], fuser(text, llm, instruction * 2)[:, :N])


def test_formula():
    fuser, (text, llm, instruction) = trained(), tokens()
    normed = lambda h: fuser.norm.weight * h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    e_theta = text + text @ fuser.encoder_conv.weight.T + fuser.encoder_conv.bias
    e_beta = torch.zeros_like(text)
    e_beta[:, :L] = normed(llm) @ fuser.llm_conv.weight.T + fuser.llm_conv.bias
    e_i = normed(instruction) @ fuser.instruction_conv.weight.T + fuser.instruction_conv.bias
    expected = torch.cat((e_theta + e_beta, e_i + fuser.stabilizer.weight), dim=1)
    torch.testing.assert_close(fuser(text, llm, instruction), expected)


def test_norm_closes_the_range_gap_and_raw_tokens_do_not():
    text, llm, instruction = tokens()
    loud = llm * 1000
    for name, ratio in (("norm", 1.0), ("decoder_only", 1000.0)):
        fuser = make(name)
        quiet = (fuser(text, llm, instruction) - text).norm()
        torch.testing.assert_close(
            (fuser(text, loud, instruction) - text).norm() / quiet, torch.tensor(ratio)
        )


@pytest.mark.parametrize("length", [1, N - 1, N, N + 1, 3 * N])
def test_any_number_of_llm_tokens(length):
    fuser = trained()
    text, llm, instruction = tokens(length)
    fused = fuser(text, llm, instruction)
    assert fused.shape == (B, N + K, DT)
    assert torch.equal(fused, fuser(text, llm[:, :N], instruction))  # what is beyond n is cut
    nothing = fuser(text, llm[:, :0], instruction)
    assert torch.equal(fused[:, length:N], nothing[:, length:N])  # what is missing to n adds nothing


def test_masked_tokens_add_nothing():
    fuser, (text, llm, instruction) = trained(), tokens()
    mask = torch.arange(L).expand(B, L) < torch.tensor([[3], [L]])
    fused = fuser(text, llm, instruction, mask=mask)
    short = fuser(text[:1], llm[:1, :3], instruction[:1])
    torch.testing.assert_close(fused[:1], short)


def test_strength_scales_what_is_added():
    fuser, (text, llm, instruction) = trained(), tokens()
    zero = torch.cat((text, torch.zeros(B, K, DT)), dim=1)
    whole, half = fuser(text, llm, instruction) - zero, fuser(text, llm, instruction, strength=0.5) - zero
    torch.testing.assert_close(half, whole / 2)


def test_gradients_reach_the_zero_convolution_first_and_the_scale_second():
    fuser, (text, llm, instruction) = make(), tokens()
    target = torch.randn(B, N + K, DT)
    optimizer = torch.optim.SGD(fuser.parameters(), lr=0.1)
    grads = []
    for _ in range(2):
        optimizer.zero_grad()
        (fuser(text, llm, instruction)[:, :N] - target[:, :N]).square().mean().backward()
        grads.append({"z": fuser.llm_conv.weight.grad.abs().max(), "s": fuser.norm.weight.grad.abs().max()})
        optimizer.step()
    assert grads[0]["z"] > 0 and grads[0]["s"] == 0
    assert grads[1]["z"] > 0 and grads[1]["s"] > 0


@pytest.mark.parametrize("name", FUSER_PRESETS)
def test_every_parameter_of_a_trained_row_gets_a_gradient(name):
    fuser = trained(name)
    if not list(fuser.parameters()):
        assert name == "baseline"
        return
    fuser(*tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fuser.parameters())


def test_initial_values():
    config = dataclasses.replace(FuserConfig(), text_dim=64, llm_dim=400)
    state = untrained_state(config, seed=3)
    assert (state["norm.weight"] == 0.1).all()
    assert not state["llm_conv.weight"].any() and not state["encoder_conv.weight"].any()
    assert 0.015 < state["stabilizer.weight"].std() < 0.025
    assert 0.04 < state["instruction_conv.weight"].std() < 0.06
    again = untrained_state(config, seed=3)
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_variant_shares_parameters_and_equals_that_row():
    fuser, (text, llm, instruction) = trained("mimir"), tokens()
    for name in FUSER_PRESETS:
        row = TokenFuser(small(name))
        row.load_state_dict({key: fuser.state_dict()[key] for key in row.state_dict()})
        variant = fuser.variant(small(name))
        assert torch.equal(variant(text, llm, instruction), row(text, llm, instruction))
        assert variant.llm_conv is fuser.llm_conv
    with pytest.raises(ValueError, match="without 'zero_conv'"):
        make("norm").variant(small("mimir"))


def test_every_parameter_sits_in_a_leaf_module():
    for module in make().modules():
        assert not list(module.children()) or not list(module.parameters(recurse=False))


@pytest.mark.parametrize(
    "change, message",
    [((0, (B, N, DT + 1)), "text tokens"), ((1, (B, L, DL + 1)), "encoders it was trained with"),
     ((2, (B, K - 1, DL)), "3 instructions"), ((1, (B + 1, L, DL)), "batch 3")],
)  # fmt: skip
def test_wrong_tokens_are_refused(change, message):
    arguments = tokens()
    arguments[change[0]] = torch.zeros(change[1])
    with pytest.raises(ValueError, match=message):
        make()(*arguments)


def test_one_prompt_serves_a_batch():
    fuser, (text, llm, instruction) = trained(), tokens()
    fused = fuser(text, llm[:1], instruction[:1])
    assert torch.equal(fused, fuser(text, llm[:1].expand(B, -1, -1), instruction[:1].expand(B, -1, -1)))
