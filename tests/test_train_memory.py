"""Memory of training: the counts equal real tensors' bytes, and what PyTorch keeps for the backward pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mimir_core.config import DIT_PRESETS, FUSER_PRESETS
from mimir_core.fuser import TokenFuser
from mimir_core.train import memory
from mimir_core.train.config import TrainConfig
from mimir_core.train.optimiser import build_optimisers, update_average
from mimir_core.train.trainee import CheckpointedDiT, add_lora

DIT = DIT_PRESETS["tiny"]
FUSER = replace(FUSER_PRESETS["mimir"], text_dim=DIT.text_embed_dim, llm_dim=128)
LATENT, TEXT = (3, 8, 8), 68
MODES = ("fuser", "fuser+lora", "fuser+dit", "dit")


def config(mode: str, **changes) -> TrainConfig:
    return TrainConfig("", "", "", train=mode, lora_rank=4, lora_alpha=4.0, micro_batch=2, **changes)


def network(made: TrainConfig) -> torch.nn.ModuleDict:
    """What `trainee.build` makes, from nothing."""
    torch.manual_seed(0)
    dit = CheckpointedDiT(DIT)
    dit.init_weights()
    dit.requires_grad_(made.train in ("dit", "fuser+dit"))
    if made.train == "fuser+lora":
        add_lora(dit, made.lora_rank, made.lora_alpha, 0)
    if made.precision != "no":
        for parameter in dit.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    parts: dict[str, torch.nn.Module] = {"dit": dit}
    if made.has_fuser:
        parts["fuser"] = TokenFuser(FUSER)
    return torch.nn.ModuleDict(parts)


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("mode", MODES)
def test_counts_equal_real_tensors_after_a_step(mode, optimiser):
    made = config(mode, optimiser=optimiser, ema=0.9)
    model = network(made)
    optimisers = build_optimisers(model, made)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    for each in optimisers:
        each.step()
    state = [value for each in optimisers for entry in each.state.values() for value in entry.values()]
    update_average(optimisers, made.ema, 0)
    every = [value for each in optimisers for entry in each.state.values() for value in entry.values()]

    found = memory.need(
        made, memory.networks(made, DIT, FUSER if made.has_fuser else None), DIT, LATENT, TEXT
    )
    assert found.weights == size(p for p in model.parameters() if p.requires_grad)
    assert found.frozen == size(p for p in model.parameters() if not p.requires_grad)
    assert found.gradients == size(p.grad for p in model.parameters() if p.grad is not None)
    assert found.moments == size(state)
    assert found.average == size(every) - size(state)


def kept(made: TrainConfig, layers: int) -> int:
    """Bytes that a forward pass of `layers` blocks leaves for the backward pass, without any weights."""
    torch.manual_seed(0)
    dit = CheckpointedDiT(replace(DIT, num_layers=layers))
    dit.requires_grad_(made.train in ("dit", "fuser+dit"))
    if made.train == "fuser+lora":
        add_lora(dit, made.lora_rank, made.lora_alpha, 0)
    weights = {p.untyped_storage().data_ptr() for p in dit.parameters()}
    shapes = {shape for p in dit.parameters() if p.ndim == 2 for shape in (p.shape, p.shape[::-1])}
    storages: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes:  # nor 16-bit copies of weights
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    text = torch.randn(made.micro_batch, TEXT, DIT.text_embed_dim, requires_grad=True)
    latents = torch.randn(made.micro_batch, DIT.in_channels, *LATENT)
    half = torch.autocast("cpu", torch.bfloat16, enabled=made.precision != "no")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
        dit(latents, torch.zeros(made.micro_batch), text)
    return sum(storages.values())


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_a_block_keeps_what_is_counted(mode, precision):
    """On a CPU. What is not counted does not grow with the width: norms' statistics, modulation."""
    made = config(mode, precision=precision)
    one = replace(DIT, num_layers=1)
    counted = memory.activations(made, one, LATENT, TEXT, on_cpu=True)
    found = kept(made, 3) - kept(made, 2)
    assert counted <= found <= 1.1 * counted, (counted, found)


def test_sharding_and_checkpointing():
    plain = config("fuser+dit", precision="bf16")
    parts = memory.networks(plain, DIT, FUSER)
    one, eight = (memory.need(plain, parts, DIT, LATENT, TEXT, cards, True) for cards in (1, 8))
    for name in ("weights", "gradients", "moments"):
        assert getattr(eight, name) == getattr(one, name) // 8
    assert eight.activations == one.activations and eight.gathered == one.gathered
    less = memory.activations(replace(plain, checkpointing=True), DIT, LATENT, TEXT)
    assert less < memory.activations(plain, DIT, LATENT, TEXT)


def test_the_table_is_the_one_in_docs():
    written = Path(__file__).parents[1] / "docs" / "training_memory.md"
    assert written.read_text(encoding="utf-8") == memory.document()
