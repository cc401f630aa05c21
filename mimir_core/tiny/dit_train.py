"""The DiT and the Token Fuser of Mimir Tiny: runs of the ordinary trainer (mimir_core.train).

baseline  the DiT on T5's tokens alone
mimir     from there: the fuser joins at its identity initialisation, and both train. In a fifth of the steps
          the fuser is switched off, so that one set of weights serves both conditions and comparing them is
          fair.
polish    more of the same with less doubt and smaller steps, for counts and shapes; this is what is shipped
control   two short runs from the baseline, alike but for the language model: the same steps, rates and clips,
          T5's tokens alone (`control`) or fused (`treated`). They show what the language model is worth.

Two things are not in the paper and were needed here. T5 understands every training caption by itself, so
nothing teaches the DiT whom to believe when the two readings disagree: without doubt the fused model followed
words that only the language model knows no better than T5 alone (colour 8 %, motion 0 %). So in a share of
the fused captions T5 reads something that cannot be trusted (features.doubtful), or nothing, as SD3 drops its
encoders one by one. And at the prompt's own positions the last layer of a language model holds guesses of the
next word, which look just like the words of its answer: the fuser reads the answer alone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .. import weights
from ..config import DIT_PRESETS, DiffusionConfig
from ..dit import CogVideoXTransformer
from ..train.config import TrainConfig

BASELINE_STEPS, MIMIR_STEPS, POLISH_STEPS, CONTROL_STEPS = 4000, 9000, 4500, 2000
FEATURES, START = "features", "start.safetensors"


def start_dit(folder: Path, diffusion: DiffusionConfig, seed: int) -> None:
    """Write the untrained DiT, unless it is there."""
    if (folder / START).exists():
        return
    torch.manual_seed(seed)
    dit = CogVideoXTransformer(DIT_PRESETS["tiny"])
    dit.init_weights()
    weights.save_transformer(folder / START, dit.config, diffusion, dit.state_dict())


def baseline(folder: Path, seed: int) -> TrainConfig:
    return TrainConfig(
        features=str(folder / FEATURES), base=str(folder / START), run=str(folder / "baseline"), train="dit",
        steps=BASELINE_STEPS, batch=32, micro_batch=32, seed=seed, optimiser="muon", rate_new=0.01,
        rate_vectors=2e-3, warmup=100, decay_from=0.7, final=0.5, ema=0.998, precision="bf16",
        log_every=100, save_every=250,
    )  # fmt: skip


def mimir(folder: Path, seed: int) -> TrainConfig:
    start = folder / "baseline" / "transformer.safetensors"
    return replace(
        baseline(folder, seed), run=str(folder / "mimir"), base=str(start),
        train="fuser+dit", llm_tokens="answer", steps=MIMIR_STEPS, doubt=0.5, alone=0.2, decay_from=0.4,
        final=0.02,
    )  # fmt: skip


def polish(folder: Path, seed: int) -> TrainConfig:
    start = folder / "mimir"
    return replace(
        mimir(folder, seed), run=str(folder / "polish"), base=str(start / "transformer.safetensors"),
        fuser=str(start / "fuser.safetensors"), seed=seed + 1, steps=POLISH_STEPS, rate_new=0.008,
        rate_vectors=1.5e-3, doubt=0.35, warmup=50, decay_from=0.3,
    )  # fmt: skip


def treated(folder: Path, seed: int) -> TrainConfig:
    return replace(mimir(folder, seed), run=str(folder / "treated"), steps=CONTROL_STEPS, alone=0.0)


def control(folder: Path, seed: int) -> TrainConfig:
    return replace(treated(folder, seed), run=str(folder / "control"), train="dit")
