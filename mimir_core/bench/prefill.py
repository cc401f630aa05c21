"""The language model's part: prompt, answer and instructions from one prefill, against separate ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..config import DEFAULT_INSTRUCTIONS, PhiConfig
from ..llm import encode_prompt
from ..phi import Phi3ForCausalLM
from ..text import PhiTokenizer
from .shapes import Prefill

TOKENIZER = Path(__file__).parents[1] / "tiny" / "weights" / "phi"
WORDS = "a red circle moves left above a blue square while the day turns to night and".split()


class Reader:
    """A random language model and a prompt of exactly `shape.tokens` tokens."""

    def __init__(self, shape: Prefill, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device = shape, device
        self.model = random_phi(shape.config, device, dtype)
        shipped = PhiTokenizer.from_folder(TOKENIZER)
        self.tokenizer = PhiTokenizer(shipped.tokenizer, frozenset(), shipped.template)  # no early end
        self.prompt = prompt_of(self.tokenizer, shape.tokens)

    def shared(self) -> Tensor:
        """Prompt, answer and instruction states (1, L, D), as the nodes get them."""
        tokens = encode_prompt(self.model, self.tokenizer, self.prompt, max_answer_tokens=self.shape.answer)
        return torch.cat((tokens.query, tokens.answer, tokens.instruction), dim=1)

    @torch.no_grad()
    def separate(self) -> Tensor:
        """The same states, every turn read from its beginning."""
        turn = self.tokenizer.turn(self.prompt)
        cache = self.model.new_cache()
        states = self._read(turn.ids, cache)
        answer, last = [states[:, :0]], states[:, -1:]
        for _ in range(self.shape.answer):
            last = self._read([int(self.model.logits(last)[0, -1].argmax())], cache)
            answer.append(last)
        turns = (self.tokenizer.turn(self.prompt, instruction) for instruction in DEFAULT_INSTRUCTIONS)
        ends = [self._read(other.ids, self.model.new_cache())[:, -1:] for other in turns]
        return torch.cat((states[:, turn.query], *answer, *ends), dim=1)

    def _read(self, ids: list[int], cache: object) -> Tensor:
        return self.model(torch.tensor([ids], device=self.device), cache)[0]


def random_phi(config: PhiConfig, device: torch.device, dtype: torch.dtype) -> Phi3ForCausalLM:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return Phi3ForCausalLM(config, device=device, dtype=dtype).eval()


def prompt_of(tokenizer: PhiTokenizer, tokens: int) -> str:
    """A prompt of which a turn holds exactly `tokens` tokens."""
    text = ""
    for number in range(10 * tokens):
        longer = f"{text} {WORDS[number % len(WORDS)]}".strip()
        if len(tokenizer.turn(longer).query) > tokens:
            break
        text = longer
    while len(tokenizer.turn(text).query) < tokens:  # a word of several tokens did not fit: single letters
        text += " a"
    return text
