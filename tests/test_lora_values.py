"""What the numbers in a LoRA file say: broken ones are refused, and ones without effect are called so."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mimir_core.lora import match_lora, without_effect

MODULE = "transformer_blocks.0.attn1.to_q"
PARAMETERS = {f"{MODULE}.weight": (8, 8), f"{MODULE}.bias": (8,), "patch_embed.proj.weight": (8, 64)}


def tensors(**changes: Tensor) -> dict[str, Tensor]:
    found = {"lora_A.weight": torch.ones(2, 8), "lora_B.weight": torch.ones(8, 2), **changes}
    return {f"{MODULE}.{part}": tensor for part, tensor in found.items()}


def written(path: Path, state: Mapping[str, Tensor]) -> Path:
    save_file(dict(state), path / "some.safetensors")
    return path / "some.safetensors"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B.weight", "alpha"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_broken_numbers_are_refused_by_file_and_tensor(tmp_path, value, part, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tensors(alpha=torch.tensor(2.0)).items()}
    state[f"{MODULE}.{part}"].view(-1)[-1] = value
    match = match_lora(written(tmp_path, state), PARAMETERS)
    with pytest.raises(ValueError, match="^some.safetensors is a LoRA with NaN or infinity in ") as refused:
        match.load()
    assert f"{MODULE}.{part}: the file is damaged" in str(refused.value)


def test_what_has_no_effect_is_called_so(tmp_path):
    idle = match_lora(written(tmp_path, tensors(alpha=torch.tensor(0.0))), PARAMETERS)
    assert idle.summary.endswith("alpha is 0, so it has no effect") and without_effect(idle.load())
    zeros = match_lora(written(tmp_path, tensors(**{"lora_B.weight": torch.zeros(8, 2)})), PARAMETERS)
    assert "no effect" not in zeros.summary and without_effect(zeros.load())
    other = match_lora(written(tmp_path, tensors(alpha=torch.tensor(1e-3))), PARAMETERS)
    assert "no effect" not in other.summary and not without_effect(other.load())
    bias = tensors(alpha=torch.tensor(0.0), diff_b=torch.ones(8))
    assert not without_effect(match_lora(written(tmp_path, bias), PARAMETERS).load())
