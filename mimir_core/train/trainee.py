"""The networks of a run, what of them moves, and the loss.

Every random choice of a clip (caption, answer, dropping, timestep, noise) follows from the seed, the step and
the clip's place in the global batch alone. So a batch gives the same numbers however it is divided among
processes and accumulation, and a run that was stopped repeats the one that was not.

Letters as in features.py, and B clips of one forward pass, L language model tokens after padding.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import weights
from ..config import FUSER_PRESETS, DiffusionConfig, DiTConfig
from ..diffusion import add_noise, alpha_of, alphas_cumprod, velocity
from ..dit import CogVideoXTransformer, Options
from ..fuser import TokenFuser
from ..positions import Rotary
from .config import TrainConfig
from .features import Clip, FeatureSet, Text, padded

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class Draw(NamedTuple):
    """What chance decides about one clip in one step."""

    caption: int
    answer: int
    dropped: bool  # the caption becomes the null
    doubt: float  # 0..1: below TrainConfig.doubt T5's reading is spoilt, below half of it gone
    timestep: int
    noise_seed: int


@dataclass(frozen=True)
class Batch:
    """One forward pass. Floating tensors are float32."""

    latents: Tensor  # (B, C, T, h, w), scaled for the DiT
    noise: Tensor  # (B, C, T, h, w)
    timestep: Tensor  # (B,)
    text: Tensor  # (B, n, Dt)
    llm: Tensor  # (B, L, Dl)
    mask: Tensor  # (B, L), True at real tokens
    instruction: Tensor  # (B, K, Dl)
    zeroed: Tensor  # (B,), True where the whole condition is zeros
    alone: bool  # T5 without the fuser

    def to(self, device: torch.device) -> "Batch":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


class Drawing:
    """Batches of a run, from cached features."""

    def __init__(self, features: FeatureSet, config: TrainConfig, diffusion: DiffusionConfig) -> None:
        self.features, self.config, self.diffusion = features, config, diffusion
        self.parts = _parts(config)

    def batch(self, step: int, places: Sequence[int]) -> Batch:
        """The clips at `places` of the global batch of `step`."""
        config = self.config
        clips = self.features.batch(config.seed, step, config.batch)
        draws = [self.draw(step, place) for place in places]
        alone = not config.has_fuser or _rng(config, step, "alone").random() < config.alone
        latents = torch.stack([self.features.latents(clips[place]) for place in places])
        texts = [self._text(clips[p], draw, alone) for p, draw in zip(places, draws, strict=True)]
        llm, lengths = padded([self.sequence(text) for text in texts])
        return Batch(
            latents=latents * self.diffusion.latent_scale,
            noise=torch.stack([_noise(draw, latents.shape[1:]) for draw in draws]),
            timestep=torch.tensor([draw.timestep for draw in draws]),
            text=torch.stack([text.t5 for text in texts]),
            llm=llm,
            mask=torch.arange(llm.shape[1])[None] < lengths[:, None],
            instruction=torch.stack([text.instruction for text in texts]),
            zeroed=torch.tensor([draw.dropped and config.null == "zeros" for draw in draws]),
            alone=alone,
        )

    def draw(self, step: int, place: int) -> Draw:
        """Chance, from (seed, step, place). Timesteps are stratified over the global batch."""
        rng, steps = _rng(self.config, step, place), self.diffusion.num_train_timesteps
        return Draw(
            caption=rng.randrange(self.features.captions),
            answer=rng.randrange(self.features.answers),
            dropped=rng.random() < self.config.dropout,
            doubt=rng.random(),
            timestep=min(int((place + rng.random()) / self.config.batch * steps), steps - 1),
            noise_seed=rng.getrandbits(63),
        )

    def sequence(self, text: Text) -> Tensor:
        """The language model's tokens that the fuser reads, (L, Dl)."""
        return torch.cat([getattr(text, part) for part in self.parts.split("+")])

    def _text(self, clip: Clip, draw: Draw, alone: bool) -> Text:
        if draw.dropped:
            return self.features.null
        text = self.features.text(clip, draw.caption, draw.answer)
        if alone or draw.doubt >= self.config.doubt:
            return text
        gone = text.doubtful is None or draw.doubt < self.config.doubt / 2
        return text._replace(t5=self.features.null.t5 if gone else text.doubtful)


class Trainee(nn.Module):
    """The DiT and the fuser under one forward: a batch in, its loss out."""

    def __init__(
        self, dit: CogVideoXTransformer, fuser: TokenFuser | None, diffusion: DiffusionConfig
    ) -> None:
        super().__init__()
        self.dit, self.fuser, self.diffusion = dit, fuser, diffusion
        self.origin: dict[str, str] = {}  # file and fingerprint of the base model
        self.alphas = alphas_cumprod(diffusion)

    def forward(self, batch: Batch) -> Tensor:
        """Mean squared error of the velocity, CogVideoX's loss under its zero-SNR schedule."""
        a = alpha_of(self.alphas, batch.timestep, batch.latents)  # (B, 1, 1, 1, 1)
        noisy = add_noise(batch.latents, batch.noise, a)  # (B, C, T, h, w)
        found = self.dit(noisy, batch.timestep, self.condition(batch))  # (B, C, T, h, w)
        return (found.float() - velocity(batch.latents, batch.noise, a)).square().mean()

    def condition(self, batch: Batch) -> Tensor:
        """(B, n, Dt), or (B, n + K, Dt) through the fuser."""
        text = batch.text
        if self.fuser is not None and not batch.alone:
            text = self.fuser(text, batch.llm, batch.instruction, batch.mask)
        return text.masked_fill(batch.zeroed[:, None, None], 0.0)


class CheckpointedDiT(CogVideoXTransformer):
    """The DiT, whose blocks are computed again in the backward pass when `checkpointing` is on."""

    checkpointing = False

    def run_blocks(
        self, video: Tensor, text: Tensor, temb: Tensor, rope: Rotary | None, options: Options
    ) -> Tensor:
        if not (self.checkpointing and torch.is_grad_enabled()):
            return super().run_blocks(video, text, temb, rope, options)
        for block in self.transformer_blocks:
            out: Any = checkpoint(block, video, text, temb, rope, options, use_reentrant=False)
            video, text = out
        return video


def build(config: TrainConfig) -> Trainee:
    """The networks of a run on the CPU: what trains in float32, the rest as the configuration says."""
    source = weights.read_transformer(config.base)
    dit = CheckpointedDiT(source.config, device="meta")
    dit.load_state_dict({n: t.to(torch.float32) for n, t in source.state.items()}, strict=True, assign=True)
    dit.checkpointing = config.checkpointing
    fuser = _fuser(config, source.config) if config.has_fuser else None
    trainee = Trainee(dit, fuser, source.diffusion).train()
    trainee.origin = dict(source.origin)
    trainee.requires_grad_(False)
    if fuser is not None:
        fuser.requires_grad_(True)
    if config.train in ("dit", "fuser+dit"):
        dit.requires_grad_(True)
    if config.train == "fuser+lora":
        add_lora(dit, config.lora_rank, config.lora_alpha, config.seed)
    if config.precision != "no" and config.frozen_bf16:
        for parameter in trainee.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return trainee


def add_lora(dit: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """PEFT's LoRA on the attention of every block; B starts at zero, so nothing changes at first."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("train 'fuser+lora' needs the package peft: pip install peft") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_TARGETS)),  # type: ignore[arg-type]
            dit,
        )


def load_fuser_state(path: str | Path) -> tuple[TokenFuser, Any]:
    """A fuser from its file, float32, and what its header says."""
    found = weights.read_fuser(path)
    fuser = TokenFuser(found.config, device="meta")
    fuser.load_state_dict({n: t.to(torch.float32) for n, t in found.state.items()}, strict=True, assign=True)
    return fuser, found.header


def _fuser(config: TrainConfig, dit: DiTConfig) -> TokenFuser:
    """The fuser to continue, or a new one at its identity initialisation."""
    if config.fuser:
        return load_fuser_state(config.fuser)[0]
    features = FeatureSet(config.features)
    sizes = {
        "text_dim": dit.text_embed_dim,
        "llm_dim": features.null.instruction.shape[-1],
        "num_instructions": features.null.instruction.shape[0],
        "llm_layer": features.index.layer,
        "llm_tokens": config.llm_tokens,
    }
    fuser = TokenFuser(replace(FUSER_PRESETS[config.preset], **sizes))
    fuser.init_weights(torch.Generator().manual_seed(config.seed))
    return fuser


def _parts(config: TrainConfig) -> str:
    if config.has_fuser and config.fuser:
        return weights.read_fuser(config.fuser).config.llm_tokens
    return config.llm_tokens


def _rng(config: TrainConfig, step: int, place: int | str) -> random.Random:
    return random.Random(f"{config.seed}/{step}/{place}")


def _noise(draw: Draw, shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw.noise_seed))
