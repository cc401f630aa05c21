"""Every network on the GPU in three precisions against the same network on the CPU in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mimir_core.attention import choose_attention
from mimir_core.bench.measure import difference
from mimir_core.bench.rivals import inputs, random_state
from mimir_core.bench.shapes import SMALL, Shape
from mimir_core.config import FUSER_PRESETS, PHI_PRESETS
from mimir_core.dit import CogVideoXTransformer
from mimir_core.fuser import TokenFuser
from mimir_core.phi import Phi3ForCausalLM
from mimir_core.vae import VAE_PRESETS, build_vae, decode

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# Relative error that rounding alone explains; float32 sums in another order only.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def compare(module: nn.Module, run: Callable[[Any, torch.device], Tensor], dtype: torch.dtype) -> float:
    """Relative error of `run(module on the GPU in dtype)` to the CPU's; both have the rounded weights."""
    exact = module.to(dtype).float().eval()
    with torch.inference_mode():
        expected = run(exact, CPU)
        return difference(run(exact.to(CUDA, dtype), CUDA).cpu(), expected)[1]


def randomised(module: nn.Module) -> nn.Module:
    """Weights that no preset of zeros hides."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    return module


@DTYPES
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
@pytest.mark.parametrize("chosen", [False, True], ids=["sdpa", "chosen attention"])
def test_dit(shape: Shape, dtype, chosen, figure):
    if chosen and dtype == torch.float32:
        pytest.skip("xFormers has no fast float32 kernel")
    state = random_state(shape.config, CPU, torch.float32)
    found: dict[str, Any] = {"attention": choose_attention(CUDA)[0]} if chosen else {}
    on_gpu = CogVideoXTransformer(shape.config, **found)
    on_gpu.load_state_dict(state)
    plain = CogVideoXTransformer(shape.config)
    plain.load_state_dict({name: value.to(dtype).float() for name, value in state.items()})
    latents, timestep, text = inputs(shape, CPU, torch.float32)
    with torch.inference_mode():
        expected = plain.eval()(latents.to(dtype).float(), timestep, text.to(dtype).float())
        given = (latents.to(CUDA, dtype), timestep.to(CUDA), text.to(CUDA, dtype))
        error = difference(on_gpu.to(CUDA, dtype).eval()(*given).cpu(), expected)[1]
    figure(f"error, {shape.name}, {dtype}, {'chosen' if chosen else 'sdpa'}", error)
    assert error < TOLERANCE[dtype]


@DTYPES
def test_phi(dtype, figure):
    config = replace(PHI_PRESETS["tiny"], hidden_size=256, num_attention_heads=4, num_key_value_heads=4)
    torch.manual_seed(0)
    ids = torch.randint(3, config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(1))
    error = compare(Phi3ForCausalLM(config), lambda model, device: model(ids.to(device))[0], dtype)
    figure(f"error, Phi, {dtype}", error)
    assert error < TOLERANCE[dtype]


@DTYPES
def test_fuser(dtype, figure):
    fuser = randomised(TokenFuser(replace(FUSER_PRESETS["mimir"], text_dim=256, llm_dim=192)))
    text, llm, ends = torch.randn(2, 226, 256), torch.randn(2, 260, 192), torch.randn(2, 4, 192)
    text, llm, ends = (tensor.to(dtype).float() for tensor in (text, llm, ends))

    def run(model: Any, device: torch.device) -> Tensor:
        like = next(model.parameters()).dtype
        return model(*(tensor.to(device, like) for tensor in (text, llm, ends)))

    error = compare(fuser, run, dtype)
    figure(f"error, fuser, {dtype}", error)
    assert error < TOLERANCE[dtype]


@DTYPES
def test_vae(dtype, figure):
    torch.manual_seed(0)
    vae = build_vae(VAE_PRESETS["tiny"])
    latents = torch.randn(1, 16, 3, 16, 16)

    def run(model: Any, device: torch.device) -> Tensor:
        return decode(model, latents.to(device, next(model.parameters()).dtype))

    error = compare(vae, run, dtype)
    figure(f"error, VAE, {dtype}", error)
    assert error < TOLERANCE[dtype]
