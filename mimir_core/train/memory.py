"""Memory of a training run on one card, in bytes: pure arithmetic on configurations, nothing is loaded.

What is counted, P trained and Q frozen parameters, all networks together:

    frozen weights   4 Q, or 2 Q where they are kept in bfloat16
    weights          4 P: what trains is float32
    gradients        4 P, and 4 P more where processes exchange them in buckets (DDP)
    moments          8 P for AdamW and 4 a tensor for its step; Muon 4 P for matrices, the rest as AdamW
    average          4 P where a moving average is kept
    copies           2 bytes of each float32 weight that autocast turns into 16 bit for a step
    gathered         FSDP: what lies outside the blocks, two blocks (at work, on its way), a block's gradient
    activations      what each block keeps for the backward pass, see SAVED
    work             what one block computes with, as in mimir_core/memory.py, and ten float32 latents

FSDP divides the first five by the number of cards. Not counted: the CUDA context (about 0.5 GB), kernels' own
work space, fragmentation. Command: `python -m mimir_core.train.memory --out docs/training_memory.md`.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

from .. import memory
from ..config import DIT_PRESETS, FUSER_PRESETS, DiTConfig, FuserConfig
from ..dit import CogVideoXTransformer
from ..fuser import TokenFuser
from .config import TrainConfig

Shape = tuple[int, ...]
SMALL = 4  # rows or columns up to which a weight is no matrix for Muon


class Saved(NamedTuple):
    """Values that one block keeps per token, in multiples of the DiT's width."""

    whole: int  # all of them, in float32
    half: int  # under autocast: 16 bit
    norm: int  # under autocast: what LayerNorm reads and gives, float32 on a card, 16 bit on a CPU


# Frozen blocks keep what gradients pass through: the GELU's input (4), queries, keys, values and result of
# the attention (4); what the norms of queries and keys (2) and of the two streams (2) read. LoRA adds what
# its matrices read: one tensor that q, k and v share, under autocast one for each and one for to_out.
# Training blocks add the GELU's result (4), what q, k, v and the feed-forward read (2, under autocast 4),
# both updates behind their gates (2) and what the two norms of the streams gave (2).
SAVED = {
    "fuser": Saved(12, 8, 4),
    "fuser+lora": Saved(13, 12, 4),
    "fuser+dit": Saved(22, 18, 6),
    "dit": Saved(22, 18, 6),
}
SHARED = 2  # of `half` in training blocks that a CPU's autocast does not copy


@dataclass(frozen=True)
class Part:
    """One network of a run, by the shapes of its parameters."""

    name: str
    trained: tuple[Shape, ...]
    frozen: tuple[Shape, ...]
    block: int = 0  # parameters of one block, which FSDP gathers at a time

    @property
    def trains(self) -> int:
        return sum(map(math.prod, self.trained))

    @property
    def rests(self) -> int:
        return sum(map(math.prod, self.frozen))


@dataclass(frozen=True)
class Need:
    """Bytes on one card."""

    frozen: int
    weights: int
    gradients: int
    moments: int
    average: int
    copies: int
    gathered: int
    activations: int
    work: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def networks(config: TrainConfig, dit: DiTConfig, fuser: FuserConfig | None) -> list[Part]:
    """The networks of a run: DiT, LoRA, fuser, as far as there are."""
    with torch.device("meta"):
        model = CogVideoXTransformer(dit)
        shapes = tuple(tuple(p.shape) for p in model.parameters())
        block = sum(p.numel() for p in model.transformer_blocks[0].parameters())
        added = () if fuser is None else tuple(tuple(p.shape) for p in TokenFuser(fuser).parameters())
    trains = config.train in ("dit", "fuser+dit")
    found = [Part("DiT", shapes if trains else (), () if trains else shapes, block)]
    if config.train == "fuser+lora":
        rank, width = config.lora_rank, dit.width
        found.append(Part("LoRA", ((rank, width), (width, rank)) * (4 * dit.num_layers), ()))
    return [*found, Part("fuser", added, ())] if added else found


def need(
    config: TrainConfig,
    parts: Sequence[Part],
    dit: DiTConfig,
    latent: Sequence[int],
    text: int,
    cards: int = 1,
    sharded: bool = False,
    on_cpu: bool = False,
) -> Need:
    """One card's share. latent: (T, h, w) of a clip; text: tokens that the DiT reads; sharded: FSDP."""
    shapes = [shape for part in parts for shape in part.trained]
    trained, frozen = sum(map(math.prod, shapes)), sum(part.rests for part in parts)
    half = config.precision != "no"
    halved = half and config.frozen_bf16
    split = cards if sharded else 1
    size = 2 if half else 4
    block = max(part.block for part in parts)
    learning = block if config.train in ("dit", "fuser+dit") else 0
    outside = trained + frozen - dit.num_layers * block
    exchanged = 2 if cards > 1 and not sharded else 1
    return Need(
        frozen=frozen * (2 if halved else 4) // split,
        weights=4 * trained // split,
        gradients=4 * exchanged * trained // split,
        moments=moments(shapes, config.optimiser) // split,
        average=4 * trained // split if config.ema else 0,
        copies=2 * (trained + (0 if halved else frozen)) if half and not sharded else 0,
        gathered=size * (outside + 2 * block + learning) if sharded else 0,
        activations=activations(config, dit, latent, text, on_cpu),
        work=config.micro_batch * _work(dit, latent, text, size),
    )


def moments(shapes: Sequence[Shape], optimiser: str) -> int:
    """Bytes of an optimiser's state for parameters of these shapes; without the moving average."""
    if optimiser == "muon":
        rest = [shape for shape in shapes if not _is_matrix(shape)]
        matrices = sum(math.prod(shape) for shape in shapes if _is_matrix(shape))
        return 4 * matrices + moments(rest, "adamw")
    return sum(8 * math.prod(shape) + 4 for shape in shapes)


def activations(
    config: TrainConfig, dit: DiTConfig, latent: Sequence[int], text: int, on_cpu: bool = False
) -> int:
    """What `micro_batch` clips keep until the backward pass.

    With checkpointing each block keeps its input only, and one block at a time all that it needs.
    """
    tokens = config.micro_batch * memory.dit_tokens(dit, latent, text)
    block = tokens * saved_per_token(config, dit, on_cpu)
    if not config.checkpointing:
        return dit.num_layers * block
    stream = 2 if config.precision != "no" else 4
    return dit.num_layers * tokens * dit.width * stream + block


def saved_per_token(config: TrainConfig, dit: DiTConfig, on_cpu: bool = False) -> int:
    """Bytes that one block keeps per token."""
    whole, half, norm = SAVED[config.train]
    rank = 4 * config.lora_rank if config.train == "fuser+lora" else 0
    if config.precision == "no":
        return 4 * (whole * dit.width + rank)
    shared = SHARED if on_cpu and config.train in ("dit", "fuser+dit") else 0
    return dit.width * (2 * (half - shared) + (2 if on_cpu else 4) * norm) + 2 * rank


def _work(dit: DiTConfig, latent: Sequence[int], text: int, size: int) -> int:
    frames, height, width = latent
    block = memory.dit_tokens(dit, latent, text) * memory.dit_per_token(dit, size)
    return block + 10 * 4 * dit.in_channels * frames * height * width


def _is_matrix(shape: Shape) -> bool:
    return len(shape) >= 2 and min(shape[0], math.prod(shape[1:])) > SMALL


SIZE = (13, 60, 90)  # the latent of 49 frames at 720 x 480
TEXT = 230  # 226 tokens of T5 and four instructions
WAYS = (
    ("fuser", "fuser", 1, False),
    ("fuser and LoRA, rank 64", "fuser+lora", 1, False),
    ("fuser and DiT", "fuser+dit", 1, False),
    ("fuser and DiT, FSDP on 1", "fuser+dit", 1, True),
    ("fuser and DiT, FSDP on 2", "fuser+dit", 2, True),
    ("fuser and DiT, FSDP on 8", "fuser+dit", 8, True),
)


def document() -> str:
    """docs/training_memory.md."""
    counts, rows, whole = [], [], []
    for name in ("2b", "5b"):
        dit, fuser = DIT_PRESETS[name], FUSER_PRESETS["mimir"]
        for label, mode, cards, sharded in WAYS:
            config = TrainConfig("", "", "", train=mode, precision="bf16", checkpointing=True, lora_rank=64)
            parts = networks(config, dit, fuser)
            found = need(config, parts, dit, SIZE, TEXT, cards, sharded)
            rows.append(_row(name, label, found))
            plain = replace(config, checkpointing=False)
            whole.append((name, label, need(plain, parts, dit, SIZE, TEXT, cards, sharded).total))
            if cards == 1 and not sharded:
                counts.append(_counted(name, label, parts))
    names = ["model", "what trains", *(f.name for f in fields(Need) if f.name != "average"), "total"]
    return _DOCUMENT.format(
        columns=f"| {' | '.join(names)} |\n{'|---' * len(names)}|",
        counts="\n".join(counts),
        rows="\n".join(rows),
        whole="\n".join(f"| {name.upper()} | {label} | {_gb(total)} |" for name, label, total in whole),
    )


def _counted(name: str, label: str, parts: Sequence[Part]) -> str:
    trained, frozen = (sum(getattr(part, key) for part in parts) for key in ("trains", "rests"))
    return f"| {name.upper()} | {label} | {trained:,} | {frozen:,} |"


def _row(name: str, label: str, found: Need) -> str:
    cells = [_gb(getattr(found, field.name)) for field in fields(found) if field.name != "average"]
    return f"| {name.upper()} | {label} | {' | '.join(cells)} | **{_gb(found.total)}** |"


def _gb(size: float) -> str:
    return f"{size / memory.GB:.1f}" if size >= 0.05 * memory.GB else f"{size / memory.GB:.2f}"


_DOCUMENT = """# Memory of training, computed

COMPUTED, not measured: no GPU has trained it yet, and FSDP has not been run at all. Written by
`python -m mimir_core.train.memory --out docs/training_memory.md`; a test writes it again and compares.
GB are 10^9 bytes, on one card.

One clip of 49 frames at 720 x 480 per forward pass (latent 13 x 60 x 90: 17,550 video tokens and 230 of
text), bf16, frozen weights in bf16, AdamW, no moving average, cached features (no encoder, no VAE on the
card).

| model | what trains | trained parameters | frozen parameters |
|---|---|---|---|
{counts}

With gradient checkpointing:

{columns}
{rows}

Without it, the total:

| model | what trains | total |
|---|---|---|
{whole}

## The arithmetic

P trained and Q frozen parameters, N blocks, L tokens, D the DiT's width (2B: 30, 17,780 and 1,920; 5B: 42,
17,780 and 3,072).

- frozen: 2 Q bytes. weights: 4 P. gradients: 4 P. moments: 8 P, and 4 bytes a tensor. A moving average would
  add 4 P. FSDP divides these by the number of cards.
- copies: 2 P, the 16-bit form of float32 weights that autocast keeps for a step. FSDP has none.
- gathered (FSDP): 2 bytes of every parameter outside the blocks, of two blocks (one at work, the next on its
  way), and of one block's gradient where it trains.
- activations with checkpointing: 2 N L D bytes for the inputs of the blocks, and one block's own. Without it:
  N blocks' own. A block keeps 32 L D bytes where only the fuser trains, 40 L D and 8 L r with LoRA of rank r,
  and 60 L D where the DiT trains. `mimir_core/train/memory.py` lists the tensors. A test compares the counts
  with what PyTorch saves on a CPU, in float32 and bf16; that norms are float32 under a card's autocast, which
  the figures here add, is PyTorch's rule and was not measured.
- work: what one block computes with at its busiest moment (`mimir_core/memory.py`), and ten float32 latents.

Not in it: the CUDA context (about 0.5 GB), work space of kernels, fragmentation. Plan one or two GB more.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table, or prints it."""
    parser = argparse.ArgumentParser(description="Computed memory of training, as a table")
    parser.add_argument("--out", type=Path, help="file to write; else it is printed")
    options = parser.parse_args(arguments)
    if options.out is None:
        print(document())
    else:
        options.out.write_text(document(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
