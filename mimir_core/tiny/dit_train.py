"""The DiT and the Token Fuser of Mimir Tiny.

First the baseline: the DiT on T5's tokens alone. Then Mimir: the fuser joins at its identity initialisation
and both train on; in a quarter of these steps the fuser is switched off, so that one set of weights
serves both conditions and comparing them is fair. The loss is CogVideoX's: the mean squared error of the
velocity under a zero-terminal-SNR schedule, with captions dropped for classifier-free guidance.

Last comes trust. After the first two stages the fused model follows words that only the language model knows
no better than T5 alone (measured: colour 8 %, motion 0 % of such prompts), for two reasons. T5 understands
every training caption by itself, so nothing teaches the DiT whom to believe when the two readings
disagree: in this stage many fused captions reach T5 with invented words in them, or not at all (as SD3
drops its encoders one by one), while the language model reads them whole. And at the prompt's own
positions the last layer of a language model holds guesses of the next word, which look just like the
words of its answer: from here on the fuser reads the answer alone (`llm_tokens`).
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import DIT_PRESETS, FUSER_PRESETS, PHI_PRESETS, DiffusionConfig, FuserConfig
from ..diffusion import add_noise, alpha_of, alphas_cumprod, velocity
from ..dit import CogVideoXTransformer
from ..fuser import TokenFuser
from ..text import T5Encoder
from ..tokens import LlmTokens
from .features import Features
from .loop import LoopConfig, train

BATCH = 32
BASELINE = LoopConfig(
    steps=3500,
    muon_rate=0.01,
    adam_rate=2e-3,
    warmup=100,
    flat=0.9,
    final=0.7,
    ema=0.998,
    save_every=250,
    log_every=100,
)
MIMIR = LoopConfig(
    steps=7500,
    muon_rate=0.01,
    adam_rate=2e-3,
    warmup=100,
    flat=0.4,
    final=0.03,
    ema=0.998,
    save_every=250,
    log_every=100,
)
TRUST = LoopConfig(
    steps=2500,
    muon_rate=0.015,
    adam_rate=3e-3,
    warmup=50,
    flat=0.55,
    final=0.03,
    ema=0.998,
    save_every=250,
    log_every=100,
)
SETTLE = LoopConfig(
    steps=1150,
    muon_rate=0.006,
    adam_rate=1e-3,
    warmup=20,
    flat=0.15,
    final=0.02,
    ema=0.997,
    save_every=250,
    log_every=50,
)
DOUBTFUL = 0.9  # share of the fused captions that T5 reads half with invented words, half not at all (TRUST)
ALONE = 0.25  # share of the Mimir steps in which T5 stands alone
DROPPED = 0.10  # share of captions that are replaced by the empty prompt


class Mimir(nn.Module):
    """The two networks that train together."""

    def __init__(self, dit: CogVideoXTransformer, fuser: TokenFuser) -> None:
        super().__init__()
        self.dit, self.fuser = dit, fuser


class DitTraining:
    """Losses of both stages over cached features."""

    def __init__(
        self,
        features: Features,
        t5: T5Encoder,
        null_tokens: LlmTokens,  # of the empty prompt
        diffusion: DiffusionConfig,
        seed: int,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(seed)
        self.features, self.diffusion, self.seed, self.device = features, diffusion, seed, device
        self.alphas = alphas_cumprod(diffusion)
        self.null = t5.encode("").hidden.to(device)  # (1, n, D)
        self.null_tokens = null_tokens
        self.null_instruction = null_tokens.instruction.to(device)  # (1, K, Dl)
        dit = CogVideoXTransformer(DIT_PRESETS["tiny"])
        dit.init_weights()
        fuser = TokenFuser(tiny_fuser_config())
        fuser.init_weights(torch.Generator().manual_seed(seed))
        self.model = Mimir(dit, fuser).to(device)

    def baseline(self, step: int) -> Tensor:
        """T5 alone."""
        return self._loss(step, alone=True)

    def mimir(self, step: int) -> Tensor:
        """The fused condition, or T5 alone in a quarter of the steps."""
        alone = random.Random(f"alone/{self.seed}/{step}").random() < ALONE
        return self._loss(10_000_000 + step, alone)

    def trust(self, step: int) -> Tensor:
        """As `mimir`, but T5's reading of some fused captions is spoilt while the language model's is not."""
        alone = random.Random(f"trust/{self.seed}/{step}").random() < ALONE
        return self._loss(20_000_000 + step, alone, doubtful=DOUBTFUL)

    def settle(self, step: int) -> Tensor:
        """As `trust`, with half as much doubt and slower, for counts and shapes."""
        alone = random.Random(f"settle/{self.seed}/{step}").random() < ALONE
        return self._loss(30_000_000 + step, alone, doubtful=DOUBTFUL / 2)

    def _loss(self, step: int, alone: bool, doubtful: float = 0.0) -> Tensor:
        """Mean squared error of the velocity on one batch."""
        index, which, drop, t = self._draw(step)
        x0 = self.features.latents[index].float().to(self.device)
        x0 = x0 * self.diffusion.latent_scale  # (B, C, T, H, W)
        noise = torch.randn_like(x0)
        a = alpha_of(self.alphas, t, x0)
        with torch.autocast(x0.device.type, torch.bfloat16):
            text = self._condition(index, which, drop, alone, doubtful)  # (B, n or n + 4, D)
            output = self.model.dit(add_noise(x0, noise, a), t, text)
        return (output.float() - velocity(x0, noise, a)).square().mean()

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        count = len(self.features.latents)
        index = torch.randint(count, (BATCH,), generator=generator)
        which = torch.randint(self.features.t5.shape[1], (BATCH,), generator=generator)
        drop = torch.rand(BATCH, generator=generator) < DROPPED
        # stratified timesteps: one from each 1/B of the schedule
        u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        t = (u * self.diffusion.num_train_timesteps).long().clamp(max=self.diffusion.num_train_timesteps - 1)
        return index, which, drop, t.to(self.device)

    def _condition(self, index: Tensor, which: Tensor, drop: Tensor, alone: bool, doubtful: float) -> Tensor:
        """T5's tokens, or all tokens through the fuser; a dropped caption is the empty prompt in both."""
        drop = drop.to(self.device)[:, None, None]
        text = self._take("t5", index, which)  # (B, n, D)
        if doubtful and not alone:
            chance = torch.rand(len(text), 1, 1, device=self.device)
            text = torch.where(chance < doubtful, self._take("t5_doubtful", index, which), text)
            text = torch.where(chance < doubtful / 2, self.null, text)
        text = torch.where(drop, self.null, text)
        if alone:
            return text
        llm, length = self._llm(index, which)  # (B, L, Dl), (B, 1)
        empty = self.null_tokens.sequence(self.model.fuser.config.llm_tokens).to(self.device)  # (1, L0, Dl)
        length = torch.where(drop[:, :, 0], empty.shape[1], length)
        empty = nn.functional.pad(empty, (0, 0, 0, llm.shape[1] - empty.shape[1]))
        mask = torch.arange(llm.shape[1], device=self.device)[None] < length  # (B, L)
        instruction = torch.where(drop, self.null_instruction, self._take("instruction", index, which))
        return self.model.fuser(text, torch.where(drop, empty, llm), instruction, mask)

    def _llm(self, index: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """What the fuser reads of the language model, from position 0 on; how many tokens are real."""
        llm = self._take("llm", index, which)  # (B, L, Dl)
        length = self.features.length[index, which].to(self.device)[:, None]
        if self.model.fuser.config.llm_tokens == "query+answer":
            return llm, length
        query = self.features.query[index, which].to(self.device)[:, None]
        source = (torch.arange(llm.shape[1], device=self.device) + query).clamp(max=llm.shape[1] - 1)
        return llm.gather(1, source[:, :, None].expand_as(llm)), length - query

    def _take(self, name: str, index: Tensor, which: Tensor) -> Tensor:
        return getattr(self.features, name)[index, which].float().to(self.device)


def tiny_fuser_config() -> FuserConfig:
    """The full fuser at the widths of Mimir Tiny."""
    widths = {"text_dim": DIT_PRESETS["tiny"].text_embed_dim, "llm_dim": PHI_PRESETS["tiny"].hidden_size}
    return replace(FUSER_PRESETS["mimir"], **widths)


def train_dit(training: DitTraining, folder: Path) -> Mimir:
    """The four stages, one after the other. Returns the networks with averaged weights."""
    train("dit-baseline", training.model.dit, training.baseline, BASELINE, folder, training.seed)
    train("dit-mimir", training.model, training.mimir, MIMIR, folder, training.seed)
    read_answers(training.model)
    train("dit-trust", training.model, training.trust, TRUST, folder, training.seed)
    train("dit-settle", training.model, training.settle, SETTLE, folder, training.seed)
    return training.model


def read_answers(model: Mimir) -> None:
    """From now on the fuser reads the language model's answer only."""
    model.fuser.config = replace(model.fuser.config, llm_tokens="answer")
