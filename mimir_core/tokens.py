"""What the language model hands to the fuser (and what travels on a MIMIR_TOKENS wire)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LlmTokens:
    """Hidden states of one prompt. B batch, Lq prompt and La answer tokens, K instructions, D width."""

    query: Tensor  # (B, Lq, D) at the prompt's own tokens, chat template cut off
    answer: Tensor  # (B, La, D) at the generated tokens; La may be 0
    instruction: Tensor  # (B, K, D) at the last position of prompt + instruction
    pieces: list[str]  # text of each token, query then answer: Lq + La entries
    prompt: str
    answer_text: str
    instructions: tuple[str, ...]  # K entries
    layer: int  # which hidden state; -1 is the last one, after the final norm
    made: Mapping[str, Any] | None = None  # the model's origin and settings, JSON-ready; None: unknown
    template: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # pieces read before and after the prompt
    gain: Tensor | None = None  # (B, Lq + La) weight of what each token adds to the condition; None: all 1

    def __post_init__(self) -> None:
        found = (self.query.shape[1] + self.answer.shape[1], self.instruction.shape[1])
        expected = (len(self.pieces), len(self.instructions))
        if found != expected:
            raise ValueError(f"hidden states for {found} (tokens, instructions), but {expected} are named")
        if self.gain is not None and self.gain.shape != (self.query.shape[0], len(self.pieces)):
            raise ValueError(f"gain has shape {tuple(self.gain.shape)} for {len(self.pieces)} tokens")

    def sequence(self, parts: str = "query+answer") -> Tensor:
        """(B, L, D): query tokens then answer tokens, or one kind (`parts` is FuserConfig.llm_tokens)."""
        return torch.cat([getattr(self, part) for part in parts.split("+")], dim=1)

    def weights(self, parts: str = "query+answer") -> Tensor | None:
        """(B, L): the gain of each token of `sequence(parts)`; None when there is none."""
        if self.gain is None:
            return None
        split = self.query.shape[1]
        kinds = {"query": self.gain[:, :split], "answer": self.gain[:, split:]}
        return torch.cat([kinds[part] for part in parts.split("+")], dim=1)
