"""From a prompt to the language model's tokens: query, answer and instruction hidden states.

The answer and the instructions all continue the same prompt, so the longest beginning that their token
sequences share is read once and every sequence continues from that cache.

Letters: Lq prompt tokens, La answer tokens, K instructions, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import DEFAULT_INSTRUCTIONS
from .phi import KeyValueCache, Phi3ForCausalLM
from .text import PhiTokenizer
from .tokens import LlmTokens

log = logging.getLogger(__name__)


class Sampling(NamedTuple):
    """How an answer is drawn. Temperature 0 takes the likeliest token, whatever the rest says."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def encode_prompt(
    model: Phi3ForCausalLM,
    tokenizer: PhiTokenizer,
    prompt: str,
    instructions: Sequence[str] = DEFAULT_INSTRUCTIONS,
    max_answer_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    layer: int = -1,
    on_token: Callable[[int, int], None] | None = None,
    *,
    system: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    options: Any = None,
) -> LlmTokens:
    """Hidden states of `prompt`, of the model's answer to it, and of each instruction. Batch 1.

    layer: as transformers counts hidden states: -1 after the final norm, -2 before the last layer.
    max_answer_tokens: 0 for no answer. A stop token ends the answer sooner and is not part of it.
    on_token(done, total): after each answer token. seed: of the answer, the same on every device.
    device, dtype: where and in what to compute; the parameters' own when None. options: for the attention.
    A prompt beyond the model's positions is shortened with a warning; `prompt` of the result is what was
    read. ValueError for settings out of range.
    """
    sampling = Sampling(temperature, top_p, seed)
    _check(max_answer_tokens, sampling)
    reader = _Reader(
        model, layer, device if device is not None else model.lm_head.weight.device, dtype, options
    )
    prompt = _shortened(model, tokenizer, prompt, instructions, max_answer_tokens, system)
    turns = [tokenizer.turn(prompt, instruction, system) for instruction in (None, *instructions)]
    shared, prefix = common_prefix([turn.ids for turn in turns]), model.new_cache()
    start = reader.read(turns[0].ids[:shared], prefix) if shared else None

    cache = prefix.fork()
    query, last = reader.whole(turns[0].ids, shared, start, cache)
    answer_ids, answer = _answer(reader, tokenizer, last, cache, max_answer_tokens, sampling, on_token)
    ends = [reader.whole(turn.ids, shared, start, prefix.fork())[0][:, -1:] for turn in turns[1:]]
    return LlmTokens(
        query=query[:, turns[0].query],
        answer=torch.cat([query[:, :0], *answer], dim=1),
        instruction=torch.cat([query[:, :0], *ends], dim=1),
        pieces=[*turns[0].pieces, *map(tokenizer.piece, answer_ids)],
        prompt=prompt,
        answer_text=tokenizer.decode(answer_ids),
        instructions=tuple(instructions),
        layer=layer,
        template=turns[0].template,
    )


@torch.no_grad()
def encode_known(
    model: Phi3ForCausalLM,
    tokenizer: PhiTokenizer,
    prompts: Sequence[str],
    answers: Sequence[str],
    instructions: Sequence[str] = DEFAULT_INSTRUCTIONS,
    layer: int = -1,
) -> list[LlmTokens]:
    """`encode_prompt` for many prompts whose answers are known, in one batch per turn: training features.

    Equals `encode_prompt` wherever the model would give the known answer.
    """
    turns = [tokenizer.turn(prompt) for prompt in prompts]
    replies = [tokenizer.answer_ids(answer) for answer in answers]
    states = _batch(model, [[*t.ids, *reply] for t, reply in zip(turns, replies, strict=True)], layer)
    ends = [
        [
            state[:, -1:]
            for state in _batch(model, [tokenizer.turn(p, instruction).ids for p in prompts], layer)
        ]
        for instruction in instructions
    ]
    return [
        LlmTokens(
            query=states[i][:, turns[i].query],
            answer=states[i][:, len(turns[i].ids) :],
            instruction=torch.cat([states[i][:, :0], *(end[i] for end in ends)], dim=1),
            pieces=[*turns[i].pieces, *map(tokenizer.piece, replies[i])],
            prompt=prompts[i],
            answer_text=tokenizer.decode(replies[i]),
            instructions=tuple(instructions),
            layer=layer,
            template=turns[i].template,
        )
        for i in range(len(prompts))
    ]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with; always leaves each sequence a token to read."""
    shortest = min(len(sequence) for sequence in sequences)
    for index in range(shortest - 1):
        if len({sequence[index] for sequence in sequences}) > 1:
            return index
    return shortest - 1


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from scores (V,). Drawn on the CPU in float64, so that a seed means the same on every device.

    top_p keeps the likeliest tokens whose probabilities sum to top_p, the last one included that crosses it.
    """
    scores = logits.detach().cpu().double()
    if sampling.temperature == 0:
        return int(scores.argmax())
    probabilities = torch.softmax(scores / sampling.temperature, dim=-1)  # (V,)
    ordered, order = probabilities.sort(descending=True)
    drop = order[ordered.cumsum(0) - ordered >= sampling.top_p]
    probabilities[drop[drop != order[0]]] = 0.0
    totals = probabilities.cumsum(0)  # (V,)
    draw = torch.rand((), generator=generator, dtype=torch.float64) * totals[-1]
    return int(torch.searchsorted(totals, draw, right=True).clamp(max=len(totals) - 1))


class _Reader:
    """The model with the settings of one call: reads tokens, returns chosen layer and final hidden states."""

    def __init__(
        self, model: Phi3ForCausalLM, layer: int, device: Any, dtype: torch.dtype | None, options: Any
    ) -> None:
        self.model, self.layer, self.device, self.dtype, self.options = model, layer, device, dtype, options

    def read(self, ids: Sequence[int], cache: KeyValueCache) -> tuple[Tensor, Tensor]:
        """(chosen layer (1, L, D), final layer (1, L, D)) of new tokens."""
        tokens = torch.tensor([list(ids)], device=self.device)
        chosen, final = self.model(tokens, cache, (self.layer, -1), self.dtype, self.options)
        return chosen, final

    def whole(
        self, ids: Sequence[int], shared: int, start: tuple[Tensor, Tensor] | None, cache: KeyValueCache
    ) -> tuple[Tensor, Tensor]:
        """Chosen states (1, L, D) and the last final one (1, 1, D) of a sequence whose beginning is read.

        `cache` holds its first `shared` tokens, `start` their states.
        """
        if start is None or not self.model.same_regime(shared, len(ids)):
            cache.clear()
            chosen, final = self.read(ids, cache)
            return chosen, final[:, -1:]
        chosen, final = self.read(ids[shared:], cache)
        return torch.cat((start[0], chosen), dim=1), final[:, -1:]


def _answer(
    reader: _Reader,
    tokenizer: PhiTokenizer,
    last: Tensor,
    cache: KeyValueCache,
    limit: int,
    sampling: Sampling,
    on_token: Callable[[int, int], None] | None,
) -> tuple[list[int], list[Tensor]]:
    """Generates up to `limit` tokens after the turn in `cache`: the tokens, their states (1, 1, D) each."""
    generator = torch.Generator().manual_seed(sampling.seed)
    ids: list[int] = []
    states: list[Tensor] = []
    while len(ids) < limit:
        token = sample(reader.model.logits(last)[0, -1], sampling, generator)
        if token in tokenizer.stop_ids:
            break
        chosen, last = reader.read([token], cache)
        ids.append(token)
        states.append(chosen)
        if on_token is not None:
            on_token(len(ids), limit)
    return ids, states


def _shortened(
    model: Phi3ForCausalLM,
    tokenizer: PhiTokenizer,
    prompt: str,
    instructions: Sequence[str],
    answer: int,
    system: str | None,
) -> str:
    """`prompt`, or as much of it as fits the model's positions with every instruction and the answer."""
    empty = [len(tokenizer.turn("", instruction, system).ids) for instruction in (None, *instructions)]
    room = model.config.max_position_embeddings - max(empty) - answer - 4  # seams may take a few tokens more
    kept = tokenizer.shorten(prompt, max(room, 0))
    if len(kept) < len(tokenizer.defuse(prompt)):
        log.warning(
            "The language model reads %d tokens at most: the prompt was cut after '...%s'.",
            room,
            kept[-40:].strip(),
        )
    return kept


def _batch(model: Phi3ForCausalLM, rows: Sequence[Sequence[int]], layer: int) -> list[Tensor]:
    """Hidden states (1, L, D) of each row; padding comes last and cannot be seen by what is before it."""
    length = max(len(row) for row in rows)
    ids = torch.tensor(
        [[*row, *[0] * (length - len(row))] for row in rows], device=model.lm_head.weight.device
    )
    (states,) = model(ids, layers=(layer,))
    return [states[i : i + 1, : len(row)] for i, row in enumerate(rows)]


def _check(max_answer_tokens: int, sampling: Sampling) -> None:
    if max_answer_tokens < 0:
        raise ValueError(f"max_answer_tokens is {max_answer_tokens}, expected 0 (no answer) or more")
    if sampling.temperature < 0:
        raise ValueError(f"temperature is {sampling.temperature}, expected 0 (the likeliest token) or more")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p is {sampling.top_p}, expected more than 0 and at most 1")
