"""AdamW, or Muon for toys; the learning rate; the moving average of the weights.

The average lives in the optimiser's state, beside its moments: whatever saves, shards or restores that state
does the same for the average.
"""

import math

import torch
from torch import Tensor, nn

from .config import TrainConfig

AVERAGE = "average"


def orthogonalise(matrix: Tensor, rounds: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, by the quintic Newton-Schulz iteration of Muon (Jordan et al.,
    2024).

    float32 throughout: the usual bfloat16 form is far slower on a CPU.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation, for weights with two or more dimensions (kernels are flattened)."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
                rows, columns = update.shape
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(orthogonalise(update).view_as(p), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def is_new(name: str) -> bool:
    """Whether a parameter of the trainee is the method's own rather than the base model's.

    Wrappers for several processes put prefixes in front of names.
    """
    return "fuser." in name or "lora_" in name


def is_matrix(parameter: nn.Parameter) -> bool:
    """What Muon is for; tables with a handful of rows and vectors are AdamW's."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 4


def build_optimisers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Optimisers over what trains, their rates at the peak."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("nothing of this model trains")
    if config.optimiser == "muon":
        matrices = [p for _, p in named if is_matrix(p)]
        vectors = [p for _, p in named if not is_matrix(p)]
        found: list[torch.optim.Optimizer] = [Muon(matrices, config.rate_new)] if matrices else []
        if vectors:
            found.append(torch.optim.AdamW(vectors, config.rate_vectors, (0.9, 0.98), weight_decay=0.0))
        return _with_peaks(found)
    groups = [
        {"params": [p for name, p in named if is_new(name)], "lr": config.rate_new},
        {"params": [p for name, p in named if not is_new(name)], "lr": config.rate_old},
    ]
    groups = [group for group in groups if group["params"]]
    return _with_peaks([torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay)])


def _with_peaks(optimisers: list[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """Each group remembers its highest rate, of which `set_rates` takes a share."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def rate_share(step: int, config: TrainConfig) -> float:
    """Linear warm-up, a plateau, then down to `final`; a share of the peak, steps counted from 0."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    flat = config.decay_from * config.steps
    if config.decay == "constant" or step < flat:
        return 1.0
    share = min(1.0, (step - flat) / max(1.0, config.steps - flat))
    fall = share if config.decay == "linear" else 0.5 - 0.5 * math.cos(math.pi * share)
    return 1.0 - (1.0 - config.final) * fall


def set_rates(optimisers: list[torch.optim.Optimizer], share: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * share


@torch.no_grad()
def update_average(optimisers: list[torch.optim.Optimizer], decay: float, step: int) -> None:
    """The moving average with a warm-up, so that the first steps are forgotten."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            for p in group["params"]:
                if optimiser.state[p]:  # empty for what has not had a gradient yet
                    optimiser.state[p].setdefault(AVERAGE, p.detach().clone()).lerp_(p, weight)


@torch.no_grad()
def swap_average(optimisers: list[torch.optim.Optimizer]) -> None:
    """Exchange the weights with their average, in place; twice changes nothing."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            for p in group["params"]:
                average = optimiser.state[p].get(AVERAGE)
                if average is not None:
                    kept = p.detach().clone()
                    p.copy_(average)
                    average.copy_(kept)
