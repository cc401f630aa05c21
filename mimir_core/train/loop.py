"""The training loop, as phases in a fixed order: draw, learn, average, report, save, look."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..headers import fingerprint
from .config import TrainConfig
from .features import FeatureSet
from .folder import Place, RunFolder, export_fuser, export_lora, export_transformer, trained_state
from .optimiser import build_optimisers, rate_share, set_rates, swap_average, update_average
from .trainee import Drawing, Trainee, build

log = logging.getLogger(__name__)


class Stopped(Exception):
    """Raised by a report callback to end a run early; a checkpoint is written first."""


@dataclass(frozen=True)
class Progress:
    """What a report callback is told after every step."""

    step: int  # steps done
    steps: int
    loss: float
    rate: float


def train(
    config: TrainConfig,
    report: Callable[[Progress], None] = lambda _: None,
    look: Callable[[Trainee, Path], None] | None = None,
    cpu: bool = False,
) -> Path:
    """Run, or continue, what `config` describes; returns the run folder.

    report: called by the main process after every step; may raise `Stopped` (the run can be continued).
    look: renders the validation videos into the file that it is given. cpu: even where there is a GPU.
    ValueError for settings, features or a base model that do not fit; FloatingPointError for a loss that is
    not finite.
    """
    accelerator = _accelerator(config, cpu)
    features = FeatureSet(config.features)
    folder = RunFolder(config.run)
    model = build(config)
    _check(config, features, model, accelerator.num_processes)
    if accelerator.is_main_process:
        folder.begin(config, features.fingerprint())
    accelerator.wait_for_everyone()
    drawing = Drawing(features, config, model.diffusion)
    wrapped = accelerator.prepare(model)
    optimisers = build_optimisers(wrapped, config)
    prepared = [accelerator.prepare(optimiser) for optimiser in optimisers]

    start = folder.resume(wrapped, optimisers).step
    if accelerator.is_main_process:
        folder.forget_after(start)
    mine = _places(config, accelerator.process_index, accelerator.num_processes)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    began, stopped, done = time.monotonic(), False, start
    for step in range(start, config.steps):
        # Draw and learn: every forward pass takes micro_batch clips, their gradients add up.
        total = torch.zeros((), device=accelerator.device)
        for part in mine:
            with accelerator.accumulate(wrapped):
                loss = wrapped(drawing.batch(step, part).to(accelerator.device))
                accelerator.backward(loss)
                total += loss.detach() / len(mine)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(parameters, config.clip)
                    set_rates(optimisers, rate_share(step, config))
                for optimiser in prepared:
                    optimiser.step()
                    optimiser.zero_grad()
        if config.ema:
            update_average(optimisers, config.ema, step)

        # Report.
        mean = float(accelerator.reduce(total, "mean"))
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"The loss is {mean} at step {step + 1}: use a lower rate, or bf16 instead of fp16. "
                f"The last checkpoint in {folder.path} is from before."
            )
        done = step + 1
        if accelerator.is_main_process and (done % config.log_every == 0 or done == config.steps):
            values = {"step": done, "loss": mean, "gradient": float(norm), "rate": rate_share(step, config)}
            folder.log({**values, "seconds": round(time.monotonic() - began, 3)})
        stopped = _told(accelerator, report, Progress(done, config.steps, mean, rate_share(step, config)))

        # Save and look.
        if stopped or done % config.save_every == 0 or done == config.steps:
            folder.save(wrapped, optimisers, Place(done), config.keep, accelerator.is_main_process)
        if look is not None and config.validate_every and done % config.validate_every == 0:
            _look(accelerator, wrapped, optimisers, look, folder.path / "validation" / f"{done:08d}.png")
        if stopped:
            break
    _export(accelerator, wrapped, optimisers, config, features, folder.path, done)
    return folder.path


def _accelerator(config: TrainConfig, cpu: bool) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise ValueError("training needs the package accelerate: pip install accelerate") from error
    if config.precision == "fp16" and (cpu or not torch.cuda.is_available()):
        raise ValueError("float16 (fp16) needs a graphics card: train in float32 or bfloat16 on a CPU")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    share = max(1, config.batch // (config.micro_batch * processes))
    AcceleratorState._reset_state()  # accelerate keeps the first run's precision for the whole process
    unused = DistributedDataParallelKwargs(find_unused_parameters=config.alone > 0)
    return Accelerator(
        gradient_accumulation_steps=share, mixed_precision=config.precision, cpu=cpu, kwargs_handlers=[unused]
    )


def _places(config: TrainConfig, rank: int, processes: int) -> list[range]:
    """The places of the global batch that this process computes, one range per forward pass."""
    share = config.batch // processes
    first = rank * share
    return [range(i, i + config.micro_batch) for i in range(first, first + share, config.micro_batch)]


def _check(config: TrainConfig, features: FeatureSet, model: Trainee, processes: int) -> None:
    if config.batch % (config.micro_batch * processes):
        raise ValueError(
            f"batch is {config.batch}, expected a multiple of micro_batch {config.micro_batch} times "
            f"{processes} processes"
        )
    text, latents = features.null.t5.shape[-1], features.index.shards[0].size[0]
    dit = model.dit.config
    if (text, latents) != (dit.text_embed_dim, dit.in_channels):
        raise ValueError(
            f"the features have text tokens {text} wide and {latents} latent channels, but this DiT expects "
            f"{dit.text_embed_dim} and {dit.in_channels}: cache them with this model's encoders and VAE"
        )
    if model.fuser is None:
        return
    found = features.null.instruction.shape
    expected = (model.fuser.config.num_instructions, model.fuser.config.llm_dim)
    if tuple(found) != expected:
        raise ValueError(
            f"the features have {found[0]} instructions {found[1]} wide, this fuser expects {expected[0]} "
            f"and {expected[1]}: cache them with the language model and instructions of this fuser"
        )


def _told(accelerator: Any, report: Callable[[Progress], None], progress: Progress) -> bool:
    """Tell the caller; True on every process when it wants the run to stop."""
    stop = 0
    if accelerator.is_main_process:
        try:
            report(progress)
        except Stopped:
            stop = 1
    if accelerator.num_processes == 1:
        return bool(stop)
    return bool(accelerator.reduce(torch.tensor(stop, device=accelerator.device), "sum"))


def _look(
    accelerator: Any,
    model: Any,
    optimisers: list[torch.optim.Optimizer],
    look: Callable[[Trainee, Path], None],
    path: Path,
) -> None:
    """Validation by the weights that would be exported now."""
    swap_average(optimisers)
    if accelerator.is_main_process:
        path.parent.mkdir(exist_ok=True)
        trainee = accelerator.unwrap_model(model)
        trainee.eval()
        with torch.no_grad():
            look(trainee, path)
        trainee.train()
    swap_average(optimisers)
    accelerator.wait_for_everyone()


def _export(
    accelerator: Any,
    model: Any,
    optimisers: list[torch.optim.Optimizer],
    config: TrainConfig,
    features: FeatureSet,
    path: Path,
    steps: int,
) -> None:
    """The files that nodes load, with what they were trained on. `steps`: how many there have been."""
    swap_average(optimisers)
    state = trained_state(model)
    swap_average(optimisers)
    if not accelerator.is_main_process:
        return
    trainee: Trainee = accelerator.unwrap_model(model)
    header = {
        "base": trainee.origin,
        "features": features.fingerprint(),
        "steps": steps,
        "train": config.train,
        **{name: features.index.origins.get(name) for name in ("t5", "phi")},
    }
    if config.train in ("dit", "fuser+dit"):
        dit, file = trainee.dit, path / "transformer.safetensors"
        export_transformer(file, dit.config, trainee.diffusion, _under(state, "dit."), **header)
        header["base"] = {"file": file.name, "fingerprint": fingerprint(file)}  # what the fuser belongs to
    if trainee.fuser is not None:
        fuser = _under(state, "fuser.")
        export_fuser(path / "fuser.safetensors", trainee.fuser.config, fuser, preset=config.preset, **header)
    lora = {name: tensor for name, tensor in _under(state, "dit.").items() if "lora_" in name}
    if lora:
        export_lora(path / "lora.safetensors", lora, config.lora_rank, config.lora_alpha, **header)


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
