"""Trains the tokenizers, T5 and the language model of Mimir Tiny, and writes them as Hugging Face folders.

Each function resumes when it is run again: batches come from (seed, step), so that a run that was stopped and
continued gives the same weights as one that was not. Sizes in the signatures are those of the shipped
weights.

Letters: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..config import DEFAULT_INSTRUCTIONS, PHI_PRESETS, T5_PRESETS, PhiConfig, to_dict
from ..phi import Phi3ForCausalLM
from .bpe import PHI_SPECIALS, SENTINELS, T5_SPECIALS, train_tokenizers
from .captions import canonical, caption, instruction_answers
from .corpus import ANSWERS, Chat, chat, t5_pair, t5_text
from .loop import LoopConfig, train
from .world import random_scene

__all__ = ["train_llm", "train_t5", "train_tokenizers", "llm_exact", "t5_exact"]

T5_LENGTH = 64  # n: the encoder always reads this many tokens, padding included, as the DiT's text does
IGNORE = -100  # targets that do not count
ANSWER = PHI_SPECIALS.index("<|assistant|>")  # the token that an answer follows
Batch = tuple[Tensor, Tensor]


# --- T5 -----------------------------------------------------------------------------------------------------


def train_t5(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 1200,
    batch: int = 48,
    device: str = "cpu",
    every: int = 100,
) -> None:
    """Trains T5 to turn captions into simple captions and to fill gaps; keeps its encoder.

    Reads and writes `out_dir`/t5: the tokenizer's files must be there, config.json and model.safetensors
    are added.
    """
    folder = Path(out_dir) / "t5"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    model = _t5_model().to(device)

    def loss(step: int) -> Tensor:
        source, target = t5_batch(tokenizer, random.Random(f"t5:{seed}:{step}"), batch)
        source, target = source.to(device), target.to(device)
        return model(input_ids=source, attention_mask=torch.ones_like(source), labels=target).loss

    config = LoopConfig(steps=steps, adam_rate=3e-3, log_every=every, save_every=every)
    report = lambda: _words(t5_exact(model, tokenizer))
    train("t5", model, loss, config, Path(out_dir) / "checkpoints", seed, report)
    _save_t5_encoder(model, folder)


def t5_batch(tokenizer: Tokenizer, rng: random.Random, count: int) -> Batch:
    """Source (B, 64) padded with 0, and target (B, L) padded with -100: half gaps to fill in captions of any
    style, half captions as videos have them with their simple captions.
    """
    pairs = [t5_pair(rng) for _ in range(count)]
    for index in range(0, count, 2):
        pairs[index] = (t5_text(rng), "")
    sources = [e.ids for e in tokenizer.encode_batch([p[0] for p in pairs])]
    targets = [e.ids for e in tokenizer.encode_batch([p[1] for p in pairs])]
    for index in range(0, count, 2):
        sources[index], targets[index] = corrupt(sources[index], rng)
    return _padded(sources, 0, T5_LENGTH), _padded(targets, IGNORE)


def corrupt(ids: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """T5's span corruption: up to four spans become sentinels, the target lists sentinels and spans."""
    body, end = ids[:-1], ids[-1:]
    first_sentinel = T5_SPECIALS.index("<extra_id_0>")
    source, target, position = [], [], 0
    for sentinel in range(first_sentinel, first_sentinel + min(4, SENTINELS, max(1, len(body) // 5))):
        start = position + rng.randint(0, 4)
        stop = start + rng.randint(1, 3)
        if start >= len(body):
            break
        source += [*body[position:start], sentinel]
        target += [sentinel, *body[start:stop]]
        position = stop
    return source + body[position:] + end, target + end


@torch.no_grad()
def t5_exact(model: nn.Module, tokenizer: Tokenizer, count: int = 200) -> dict[str, float]:
    """Share of held-out scenes whose simple caption the decoder would write letter for letter, per style."""
    rates = {}
    device = next(model.parameters()).device
    for style in ("simple", "seen", "long"):
        rng = random.Random(f"t5 exact:{style}")
        scenes = [random_scene(rng, held_out=True) for _ in range(count)]
        texts = [caption(s, style, rng) for s in scenes], [canonical(s) for s in scenes]
        sources, targets = ([e.ids for e in tokenizer.encode_batch(part)] for part in texts)
        source, target = _padded(sources, 0, T5_LENGTH).to(device), _padded(targets, IGNORE).to(device)
        logits = model(input_ids=source, attention_mask=torch.ones_like(source), labels=target).logits
        rates[style] = _all_right(logits, target)
    return rates


def _t5_model() -> Any:
    """T5 v1.1 with a two-layer decoder, random weights.

    Position biases start large (std 2): from transformers' near-zero ones training sits on a plateau
    where words are known but not their order (simple captions 65 % exact after 800 steps, against 100 %
    after 400).
    """
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(**_t5_values()))
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=2.0)
    return model


def _t5_values() -> dict[str, Any]:
    """What config.json says."""
    values: dict[str, Any] = to_dict(T5_PRESETS["tiny"])
    values |= {"num_decoder_layers": 2, "dropout_rate": 0.0, "tie_word_embeddings": True}
    values |= {"pad_token_id": 0, "eos_token_id": T5_SPECIALS.index("</s>"), "decoder_start_token_id": 0}
    return values


def _save_t5_encoder(model: Any, folder: Path) -> None:
    state = {
        name: value for name, value in model.state_dict().items() if name.startswith(("shared.", "encoder."))
    }
    state.pop("encoder.embed_tokens.weight", None)
    config = {**_t5_values(), "model_type": "t5", "architectures": ["T5EncoderModel"], "dtype": "float16"}
    _save_folder(folder, state, config)


# --- language model -----------------------------------------------------------------------------------------


def train_llm(
    out_dir: str | Path,
    seed: int = 0,
    steps: int = 1200,
    batch: int = 64,
    device: str = "cpu",
    every: int = 100,
) -> None:
    """Trains the language model on chats. Reads and writes `out_dir`/phi, like `train_t5`."""
    folder = Path(out_dir) / "phi"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = phi_config(tokenizer)
    model = Phi3ForCausalLM(config)
    model.tie_weights()
    model.init_weights(torch.Generator().manual_seed(seed), std=0.05)
    model.to(device)

    def loss(step: int) -> Tensor:
        ids, weights = llm_batch(tokenizer, random.Random(f"llm:{seed}:{step}"), batch)
        ids, weights = ids.to(device), weights[:, 1:].to(device)
        logits = model.logits(model(ids[:, :-1])[0])  # (B, L - 1, V)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    loop = LoopConfig(steps=steps, adam_rate=3e-3, log_every=every, save_every=every)
    report = lambda: _words(llm_exact(model, tokenizer))
    train("phi", model, loss, loop, Path(out_dir) / "checkpoints", seed, report)
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    _save_folder(folder, state, {**config.to_dict(), "dtype": "float16"})


def phi_config(tokenizer: Tokenizer) -> PhiConfig:
    """The preset "tiny"; ValueError when its special tokens are not the tokenizer's."""
    config = PHI_PRESETS["tiny"]
    found = tuple(tokenizer.token_to_id(name) for name in ("<s>", "<|end|>", "<|endoftext|>"))
    expected = (config.bos_token_id, config.eos_token_id[0], config.pad_token_id)
    if found != expected or tokenizer.get_vocab_size() != config.vocab_size:
        raise ValueError(f"tokenizer has special tokens {found}, expected {expected}: train it again")
    return config


def render(turn: Chat) -> str:
    """A chat as text, in the format of the tokenizer's chat template."""
    content = turn.prompt if turn.instruction is None else f"{turn.prompt}\n{turn.instruction}"
    return f"<|user|>\n{content}<|end|>\n<|assistant|>\n{turn.answer}<|end|>\n"


def llm_batch(tokenizer: Tokenizer, rng: random.Random, count: int) -> Batch:
    """Token ids and their weights in the loss, both (B, L): the answer counts 20 times the prompt."""
    turns = [chat(rng) for _ in range(count)]
    ids = [e.ids for e in tokenizer.encode_batch([render(turn) for turn in turns])]
    weights = []
    for row in ids:
        answer = row.index(ANSWER) + 1
        weights.append([0.05] * answer + [1.0] * (len(row) - answer))
    return _padded(ids, 0), _padded(weights, 0.0)


@torch.no_grad()
def llm_exact(model: Phi3ForCausalLM, tokenizer: Tokenizer, count: int = 200) -> dict[str, float]:
    """Share of held-out scenes answered letter for letter (greedy), per caption style and instruction.

    How an answer begins is free, so its beginning is given.
    """
    frame = next(frame for frame in ANSWERS if frame.endswith("see: {}"))
    given = len(tokenizer.encode(frame.removesuffix(" {}")).ids)
    rates = {}
    for style in ("simple", "seen", "held", "long", "unread"):
        rng = random.Random(f"llm exact:{style}")
        scenes = [random_scene(rng, held_out=True) for _ in range(count)]
        turns = [Chat(caption(s, style, rng), None, frame.format(canonical(s))) for s in scenes]
        rates[style] = _llm_right(model, tokenizer, turns, given)
    for index, instruction in enumerate(DEFAULT_INSTRUCTIONS):
        rng = random.Random(f"llm exact:{index}")
        scenes = [random_scene(rng, held_out=True) for _ in range(count)]
        turns = [Chat(caption(s, "held", rng), instruction, instruction_answers(s)[index]) for s in scenes]
        rates[f"instruction {index + 1}"] = _llm_right(model, tokenizer, turns)
    return rates


def _llm_right(model: Phi3ForCausalLM, tokenizer: Tokenizer, turns: list[Chat], given: int = 0) -> float:
    rows = [e.ids for e in tokenizer.encode_batch([render(turn) for turn in turns])]
    starts = [row.index(ANSWER) + 1 + given for row in rows]
    targets = [[IGNORE] * start + row[start:] for start, row in zip(starts, rows)]
    device = next(model.parameters()).device
    ids, target = _padded(rows, 0).to(device), _padded(targets, IGNORE).to(device)
    return _all_right(model.logits(model(ids[:, :-1])[0]), target[:, 1:])


# --- shared -------------------------------------------------------------------------------------------------


def _words(rates: dict[str, float]) -> str:
    return " ".join(f"{name} {rate:.2f}" for name, rate in rates.items())


def _save_folder(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    halves = {name: value.detach().to(torch.float16).contiguous().cpu() for name, value in state.items()}
    header = {"format": "pt", "config": json.dumps(config, sort_keys=True, default=str)}
    save_file(halves, folder / "model.safetensors", metadata=header)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _padded(rows: list[list[Any]], fill: float, length: int | None = None) -> Tensor:
    """Rows as one tensor (B, L), padded at the end; longer rows are cut at `length`, keeping the last."""
    length = length or max(len(row) for row in rows)
    rows = [row if len(row) <= length else [*row[: length - 1], row[-1]] for row in rows]
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def _all_right(logits: Tensor, target: Tensor) -> float:
    """Share of rows where the likeliest token is the target everywhere: what greedy decoding gets right."""
    right = (logits.argmax(-1) == target) | (target == IGNORE)  # (B, L)
    return right.all(dim=1).float().mean().item()
