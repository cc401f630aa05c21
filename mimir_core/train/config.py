"""One dataclass describes a training run. Its JSON form is what the command reads and the folder keeps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config import FUSER_PRESETS, LLM_TOKENS, from_dict, to_dict

MODES = ("fuser", "fuser+lora", "fuser+dit", "dit")
OPTIMISERS = ("adamw", "muon")
DECAYS = ("constant", "cosine", "linear")
PRECISIONS = ("no", "bf16", "fp16")
NULLS = ("prompt", "zeros")


@dataclass(frozen=True)
class TrainConfig:
    features: str  # folder with cached features
    base: str  # the DiT to start from: a file, or a diffusers folder
    run: str  # folder of this run; made if it is not there

    train: str = "fuser"  # what moves: the fuser; it and a LoRA on the DiT; it and the DiT; the DiT alone
    preset: str = "mimir"  # row of the ablation, for a new fuser
    llm_tokens: str = "query+answer"  # which positions of the language model a new fuser reads
    fuser: str = ""  # continue from this fuser's file instead of a new one

    steps: int = 10_000
    batch: int = 8  # clips per step, over all processes and accumulation
    micro_batch: int = 1  # clips per forward pass and process
    seed: int = 0

    optimiser: str = "adamw"
    rate_new: float = 1e-4  # fuser and LoRA
    rate_old: float = 1e-5  # the DiT's own weights
    rate_vectors: float = 1e-3  # muon only: vectors, embeddings and convolution-free parts, by AdamW
    weight_decay: float = 1e-4
    warmup: int = 500
    decay: str = "cosine"
    decay_from: float = 0.0  # share of the run at full rate
    final: float = 0.1  # rate at the end, as a share of the peak
    clip: float = 1.0  # norm of all gradients together
    ema: float = 0.0  # decay of the moving average that is exported; 0: the weights themselves

    dropout: float = 0.1  # share of captions replaced by the null of classifier-free guidance
    null: str = "prompt"  # the null: the fused encoding of the empty prompt, or zeros
    doubt: float = 0.3  # share of fused captions that T5 reads distorted or not at all
    alone: float = 0.0  # share of steps in which the DiT reads T5 without the fuser

    precision: str = "no"  # of autocast: "no" is float32
    frozen_bf16: bool = True  # keep frozen weights in bfloat16 (where precision is not "no")
    checkpointing: bool = False  # recompute each block in the backward pass: less memory, a third more time
    lora_rank: int = 64
    lora_alpha: float = 64.0

    log_every: int = 25
    save_every: int = 500
    keep: int = 2  # checkpoints
    validate_every: int = 0  # 0: never
    validate_steps: int = 25
    validate_cfg: float = 6.0
    vae: str = ""  # to render validation videos
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        for name in ("steps", "batch", "micro_batch", "log_every", "save_every", "keep", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("dropout", "doubt", "alone", "decay_from", "final", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.batch % self.micro_batch:
            raise ValueError(f"batch is {self.batch}, expected a multiple of micro_batch {self.micro_batch}")
        if self.validate_every and not self.vae:
            raise ValueError("validate_every is set but vae is not: validation videos need a VAE to be seen")

    @property
    def has_fuser(self) -> bool:
        return self.train != "dit"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """ValueError for a setting that does not exist: a misspelt one would silently be a default."""
        known = {field.name for field in fields(cls)}
        foreign = sorted(set(values) - known)
        if foreign:
            raise ValueError(f"unknown settings: {', '.join(foreign)}. Known: {', '.join(sorted(known))}.")
        return from_dict(cls, values)

    @classmethod
    def from_file(cls, path: str | Path, **changes: Any) -> "TrainConfig":
        """From a JSON file, with single values replaced."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}, expected an object of settings")
        return cls.from_dict({**values, **changes})

    def to_dict(self) -> dict[str, Any]:
        return to_dict(self)


_CHOICES: dict[str, tuple[str, ...]] = {
    "train": MODES,
    "preset": tuple(FUSER_PRESETS),
    "llm_tokens": LLM_TOKENS,
    "optimiser": OPTIMISERS,
    "decay": DECAYS,
    "precision": PRECISIONS,
    "null": NULLS,
}
