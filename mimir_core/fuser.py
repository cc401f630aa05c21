"""The Token Fuser: T5's tokens and the language model's tokens become one condition for the DiT.

arXiv 2412.03085, section 3, as mimir_core understands it:

    e_theta <- e_theta + Z_theta(e_theta)         encoder residual        `encoder_conv`
    e_beta   = Z_beta(s * Norm(h))                language model branch   `norm` (its weight is s), `llm_conv`
    e        = e_theta + e_beta                   fusion
    e_s      = e_i + e_l                          Semantic Stabilizer     `instruction_conv`, `stabilizer`
    c        = concat(e, e_s)

The convolutions are 1x1 over tokens: Linear layers. Every parameter sits in a leaf module made by `ops`.

Letters: B batch, n text tokens, L language model tokens (query then answer), K instructions, Dt text width,
Dl language model width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .config import FuserConfig


class TokenFuser(nn.Module):
    def __init__(
        self,
        config: FuserConfig,
        ops: Any = nn,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        made = {"device": device, "dtype": dtype}
        if config.norm:
            self.norm = ops.RMSNorm(config.llm_dim, eps=config.norm_eps, **made)
        if config.zero_conv:
            self.encoder_conv = ops.Linear(config.text_dim, config.text_dim, **made)
        if config.use_llm:
            self.llm_conv = ops.Linear(config.llm_dim, config.text_dim, **made)
        if config.stabilizer:
            self.instruction_conv = ops.Linear(config.llm_dim, config.text_dim, **made)
            self.stabilizer = ops.Embedding(config.num_instructions, config.text_dim, **made)

    def forward(
        self,
        text: Tensor,
        llm: Tensor,
        instruction: Tensor,
        mask: Tensor | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """The fused condition.

        text (B, n, Dt), llm (B, L, Dl), instruction (B, K, Dl), mask (B, L): bool, True at real tokens, or
        the weight of what each token adds
        -> (B, n + K, Dt), or (B, n, Dt) without the stabilizer. Any L: llm is cut or padded with zeros to n.
        strength scales everything that is added; at 0 the result is `text` itself, with nothing appended.
        """
        if strength == 0:
            return text
        self._check(text, llm, instruction)
        encoder, decoder = self.branches(text, llm, mask, strength)
        fused = encoder if decoder is None else encoder + decoder  # (B, n, Dt)
        if self.config.stabilizer:
            content, learned = self.stabilized(instruction)
            stable = strength * (content + learned)  # (B, K, Dt)
            fused = torch.cat(
                (fused, stable.expand(fused.shape[0], -1, -1).to(fused.dtype)), dim=1
            )  # (B, n + K, Dt)
        return fused

    def branches(
        self, text: Tensor, llm: Tensor, mask: Tensor | None = None, strength: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """e_theta and e_beta (B, n, Dt), whose sum is the fused part; no e_beta where no llm is used."""
        encoder = text + strength * self.encoder_conv(text) if self.config.zero_conv else text
        if not self.config.use_llm:
            return encoder, None
        return encoder, strength * self._branch(llm, mask, text.shape[1])

    def stabilized(self, instruction: Tensor) -> tuple[Tensor, Tensor]:
        """e_i (B, K, Dt) and e_l (K, Dt), whose sum is e_s."""
        index = torch.arange(self.config.num_instructions, device=instruction.device)
        return self.instruction_conv(self.normed(instruction)), self.stabilizer(index)

    def normed(self, hidden: Tensor) -> Tensor:
        """s * Norm(h), or h itself without the norm."""
        return self.norm(hidden) if self.config.norm else hidden

    def variant(self, config: FuserConfig) -> "TokenFuser":
        """The same parameters used as another row of the ablation. ValueError where a part is missing."""
        for part in ("norm", "zero_conv", "use_llm", "stabilizer"):
            if getattr(config, part) and not getattr(self.config, part):
                raise ValueError(
                    f"this fuser was made without {part!r}, which the preset needs: load a fuser of that kind"
                )
        other = copy.copy(self)
        other.config = config
        return other

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise for training from scratch.

        | tensor | init |
        |---|---|
        | `encoder_conv` | 0: the encoder's tokens pass unchanged |
        | `llm_conv` | 0 with `zero_conv`, else normal, std 1 / sqrt(llm_dim), bias 0 |
        | `instruction_conv` | normal, std 1 / sqrt(llm_dim), bias 0 |
        | `norm.weight` (s) | `scale_init` |
        | `stabilizer` (e_l) | normal, std `stabilizer_std` |
        """
        for name, parameter in self.named_parameters():
            std = self._initial_std(name)
            nn.init.normal_(parameter, std=std, generator=generator) if std else nn.init.zeros_(parameter)
        if self.config.norm:
            nn.init.constant_(self.norm.weight, self.config.scale_init)

    def _initial_std(self, name: str) -> float:
        if name == "stabilizer.weight":
            return self.config.stabilizer_std
        zero = name.endswith("bias") or name.startswith("encoder_conv")
        if zero or (name.startswith("llm_conv") and self.config.zero_conv):
            return 0.0
        return self.config.llm_dim**-0.5

    def _branch(self, llm: Tensor, mask: Tensor | None, length: int) -> Tensor:
        """e_beta (B, length, Dt): only real tokens are projected, what is missing to `length` is zero."""
        llm = llm[:, :length]
        projected = self.llm_conv(self.normed(llm))
        if mask is not None:
            projected = projected * mask[:, :length, None]
        return nn.functional.pad(projected, (0, 0, 0, length - projected.shape[1]))

    def _check(self, text: Tensor, llm: Tensor, instruction: Tensor) -> None:
        config, batch = self.config, text.shape[0]
        expected = [("text", text, config.text_dim), ("language model", llm, config.llm_dim)]
        if config.stabilizer:
            expected.append(("instruction", instruction, config.llm_dim))
        for name, tensor, width in expected:
            if tensor.ndim != 3 or tensor.shape[-1] != width:
                raise ValueError(
                    f"{name} tokens have shape {tuple(tensor.shape)}, this fuser expects "
                    f"(B, tokens, {width}): use the encoders it was trained with"
                )
            if tensor.shape[0] not in (1, batch):
                raise ValueError(f"{name} tokens have batch {tensor.shape[0]}, expected 1 or {batch}")
        if config.stabilizer and instruction.shape[1] != config.num_instructions:
            raise ValueError(
                f"{instruction.shape[1]} instructions, this fuser expects {config.num_instructions}: write "
                f"{config.num_instructions} in the 'instructions' box of Phi-3.5 Encode, one per line."
            )


def untrained_state(config: FuserConfig, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of an untrained fuser, float32 on the CPU: for hosts whose `ops` do not initialise."""
    fuser = TokenFuser(config, device="cpu", dtype=torch.float32)
    fuser.init_weights(torch.Generator().manual_seed(seed))
    return {name: parameter.detach() for name, parameter in fuser.named_parameters()}
