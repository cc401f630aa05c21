"""The run folder, which describes itself:

    config.json  versions.json  metrics.jsonl
    checkpoints/00000500/   model, optimisers and place, to continue from
    validation/00000500.png
    fuser.safetensors  lora.safetensors  transformer.safetensors   what nodes and library load

Safetensors and JSON only. A checkpoint is complete when its state.json is there: that file comes last.
"""

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .. import weights
from ..config import DiffusionConfig, DiTConfig, FuserConfig, to_dict
from .config import TrainConfig

CHECKPOINTS, CONFIG, VERSIONS, METRICS, STATE = (
    "checkpoints", "config.json", "versions.json", "metrics.jsonl", "state.json",
)  # fmt: skip
PACKAGES = ("torch", "accelerate", "safetensors", "transformers", "diffusers", "peft", "numpy")
FREE = ("run", "steps", "log_every", "save_every", "keep", "validate_every", "tensorboard", "vae")


@dataclass(frozen=True)
class Place:
    """Where a run stands: steps done."""

    step: int = 0


class RunFolder:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def begin(self, config: TrainConfig, data: str) -> None:
        """Write what this run is, or check that the folder holds this very run. `data`: its fingerprint."""
        self.path.mkdir(parents=True, exist_ok=True)
        changed = self.differences(config, data)
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings: {', '.join(changed)}. Resume with the old "
                "ones, or choose another run folder."
            )
        self._write(CONFIG, {**config.to_dict(), "data_fingerprint": data})
        versions = {name: _version(name) for name in PACKAGES}
        self._write(VERSIONS, {"python": platform.python_version(), **versions})

    def differences(self, config: TrainConfig, data: str) -> list[str]:
        """In words, where the run in this folder is another one; empty for this very run, or for none."""
        file = self.path / CONFIG
        if not file.is_file():
            return []
        known, now = (
            json.loads(file.read_text(encoding="utf-8")),
            {**config.to_dict(), "data_fingerprint": data},
        )
        changed = [name for name in now if name not in FREE and known.get(name) != now[name]]
        return [f"{name} ({known.get(name)!r}, now {now[name]!r})" for name in changed]

    def log(self, values: Mapping[str, float]) -> None:
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values)) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that a resumed run will do again."""
        path = self.path / METRICS
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def save(
        self,
        model: nn.Module,
        optimisers: list[torch.optim.Optimizer],
        place: Place,
        keep: int,
        main: bool = True,
    ) -> None:
        """A checkpoint of what trains. Every process must call it; the main one writes."""
        state, moments = trained_state(model), [_moments(model, o) for o in optimisers]
        if not main:
            return
        folder = self.path / CHECKPOINTS / f"{place.step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors")
        for index, tensors in enumerate(moments):
            save_file(tensors, folder / f"optimiser.{index}.safetensors")
        (folder / STATE).write_text(json.dumps({"step": place.step}), encoding="utf-8")
        for old in self.checkpoints()[:-keep]:
            shutil.rmtree(old)

    def resume(self, model: nn.Module, optimisers: list[torch.optim.Optimizer]) -> Place:
        """Put the newest complete checkpoint into model and optimisers; step 0 when there is none."""
        found = self.checkpoints()
        if not found:
            return Place()
        set_model_state_dict(
            model, dict(load_file(found[-1] / "model.safetensors")), options=_options(False, strict=False)
        )
        for index, optimiser in enumerate(optimisers):
            _restore(model, optimiser, load_file(found[-1] / f"optimiser.{index}.safetensors"))
        return Place(json.loads((found[-1] / STATE).read_text(encoding="utf-8"))["step"])

    def checkpoints(self) -> list[Path]:
        """Complete ones, oldest first."""
        folder = self.path / CHECKPOINTS
        return sorted(path.parent for path in folder.glob(f"*/{STATE}")) if folder.is_dir() else []

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        (self.path / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """{parameter: tensor on the CPU} of what trains, gathered where it is spread over processes.

    Every process must call it; all but the main one get nothing.
    """
    found: dict[str, Any] = get_model_state_dict(model, options=_options(ignore_frozen_params=True))
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}


def export_fuser(path: Path, config: FuserConfig, state: Mapping[str, Tensor], **header: Any) -> None:
    """What Load Token Fuser reads. `header`: what it was trained on, for people and for later checks."""
    weights.save(path, state, config=to_dict(config), training=header)


def export_lora(path: Path, state: Mapping[str, Tensor], rank: int, alpha: float, **header: Any) -> None:
    """What Load Mimir LoRA and diffusers read: `transformer.` and PEFT's names, alpha in the header."""
    named = {f"transformer.{name.replace('.default.', '.')}": tensor for name, tensor in state.items()}
    adapter = {"transformer.r": rank, "transformer.lora_alpha": alpha}
    weights.save(path, named, lora_adapter_metadata=adapter, training=header)


def export_transformer(
    path: Path,
    config: DiTConfig,
    diffusion: DiffusionConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    **header: Any,
) -> None:
    """What Load Mimir DiT reads."""
    weights.save(path, state, dtype, config=to_dict(config), diffusion=to_dict(diffusion), training=header)


def _moments(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as {parameter/entry: tensor}; empty on all processes but the main one."""
    state: Any = get_optimizer_state_dict(model, optimiser, options=_options()).get("state", {})
    return {
        f"{name}/{entry}": torch.as_tensor(value).detach().cpu().contiguous().clone()
        for name, entries in state.items()
        for entry, value in entries.items()
    }


def _restore(model: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    whole: dict[str, Any] = dict(get_optimizer_state_dict(model, optimiser, options=_options(offload=False)))
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        state.setdefault(name, {})[entry] = value
    whole["state"] = state
    set_optimizer_state_dict(model, optimiser, whole, options=_options())


def _options(offload: bool = True, **changes: Any) -> StateDictOptions:
    """Whole tensors by parameter name; with `offload` on the CPU and for the main process only."""
    return StateDictOptions(full_state_dict=True, cpu_offload=offload, **changes)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
