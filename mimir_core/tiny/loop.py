"""One small training loop for every part of Mimir Tiny: seeded per step, resumable, safetensors only.

The numbers of a step depend on the seed and the step alone, so a run that was stopped and started again
repeats the run that was not. (The training of full-size Mimir lives elsewhere; this one is for toys and stays
under a page.)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..train.optimiser import Muon

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LoopConfig:
    """How one part is trained. `muon_rate` drives matrices and kernels, `adam_rate` vectors and
    embeddings.
    """

    steps: int
    muon_rate: float = 0.01
    adam_rate: float = 1e-3
    warmup: int = 50
    final: float = 0.05  # learning rate at the end, as a share of the peak
    flat: float = 0.5  # share of the run before the decay starts
    clip: float = 1.0
    ema: float = 0.0  # decay of the moving average of the weights; 0 switches it off
    save_every: int = 200
    log_every: int = 25


class Optimisers:
    """Muon for matrices, AdamW for everything else, under one learning-rate schedule."""

    def __init__(self, module: nn.Module, config: LoopConfig) -> None:
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        matrices = [
            p
            for n, p in named
            if p.ndim >= 2 and "embed_tokens" not in n and min(p.shape[0], p[0].numel()) > 4
        ]
        chosen = {id(p) for p in matrices}
        others = [p for _, p in named if id(p) not in chosen]
        self.config = config
        self.parts: list[torch.optim.Optimizer] = [Muon(matrices, config.muon_rate)] if matrices else []
        if others:
            self.parts.append(
                torch.optim.AdamW(others, config.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
            )
        self.params = [p for _, p in named]
        self.peaks = [group["lr"] for part in self.parts for group in part.param_groups]

    def step(self, step: int) -> None:
        """Clips, updates and clears the gradients; `step` counts from 0."""
        nn.utils.clip_grad_norm_(self.params, self.config.clip)
        share = learning_rate_share(step, self.config)
        for group, peak in zip(
            (g for part in self.parts for g in part.param_groups), self.peaks, strict=True
        ):
            group["lr"] = peak * share
        for part in self.parts:
            part.step()
        for p in self.params:
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The optimiser state as flat names to tensors."""
        flat = {}
        for i, part in enumerate(self.parts):
            for j, state in part.state_dict()["state"].items():
                flat |= {f"{i}.{j}.{k}": torch.as_tensor(v) for k, v in state.items()}
        return flat

    def restore(self, flat: dict[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        for i, part in enumerate(self.parts):
            whole = part.state_dict()
            for name, value in flat.items():
                owner, index, key = name.split(".", 2)
                if int(owner) == i:
                    whole["state"].setdefault(int(index), {})[key] = value
            part.load_state_dict(whole)


def learning_rate_share(step: int, config: LoopConfig) -> float:
    """Linear warm-up, a plateau, then a cosine down to `final`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = step / max(1, config.steps)
    if progress < config.flat:
        return 1.0
    tail = min(1.0, (progress - config.flat) / (1 - config.flat))
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * tail))


def train(
    name: str,
    module: M,
    loss: Callable[[int], Tensor],
    config: LoopConfig,
    folder: Path,
    seed: int = 0,
    report: Callable[[], str] = lambda: "",
) -> M:
    """Trains `module` until `config.steps`, resuming from `folder/name` when there is a checkpoint.

    `loss(step)` draws its own batch from the step number and returns a scalar. Returns the module, holding
    the moving average of its weights when `config.ema` is set. `report()` adds words to a log line.
    """
    optimisers = Optimisers(module, config)
    average = {k: v.detach().clone() for k, v in module.state_dict().items()} if config.ema else {}
    start = _resume(module, optimisers, average, folder / name)
    began, running = time.process_time(), 0.0
    for step in range(start, config.steps):
        torch.manual_seed(seed * 1_000_003 + step)
        value = loss(step)
        value.backward()
        optimisers.step(step)
        _update_average(average, module, config.ema, step)
        running += float(value.detach())
        if (step + 1) % config.log_every == 0:
            seconds = (time.process_time() - began) / (step + 1 - start)
            mean = running / config.log_every
            progress = f"{name} {step + 1}/{config.steps} loss {mean:.4f} {seconds:.3f} cpu-s/step"
            print(progress, report(), flush=True)
            running = 0.0
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save(module, optimisers, average, folder / name, step + 1)
    if average:
        module.load_state_dict(average)
    return module


def _update_average(average: dict[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    """Moving average with a warm-up, so that the first steps are forgotten."""
    if average:
        weight = 1 - min(decay, (1 + step) / (10 + step))
        for key, value in module.state_dict().items():
            average[key].lerp_(value, weight)


def _save(
    module: nn.Module, optimisers: Optimisers, average: dict[str, Tensor], folder: Path, step: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pointer = folder / "state.json"
    slot = 1 - json.loads(pointer.read_text())["slot"] if pointer.exists() else 0
    parts = {"model": module.state_dict(), "optimiser": optimisers.tensors(), "average": average}
    for part, tensors in parts.items():
        fresh = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
        save_file(fresh, folder / f"{part}.{slot}.safetensors")
    # the pointer is written last: a run killed while saving still has the checkpoint before this one
    pointer.write_text(json.dumps({"step": step, "slot": slot}))


def _resume(module: nn.Module, optimisers: Optimisers, average: dict[str, Tensor], folder: Path) -> int:
    pointer = folder / "state.json"
    if not pointer.exists():
        return 0
    state = json.loads(pointer.read_text())
    module.load_state_dict(load_file(folder / f"model.{state['slot']}.safetensors"))
    optimisers.restore(load_file(folder / f"optimiser.{state['slot']}.safetensors"))
    if average:
        average.update(load_file(folder / f"average.{state['slot']}.safetensors"))
    print(f"{folder.name}: resuming at step {state['step']}", flush=True)
    return state["step"]
