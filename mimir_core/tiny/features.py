"""Training features of Mimir Tiny in the trainer's format (train/features.py): rendered clips through the
VAE, their captions through T5 and the language model.

Each shard is drawn from its number and the seed alone, so shards can be made in any order or by several
processes. A clip has two captions, a simple one and a seen or long one, and each caption two answers of the
language model in different wording.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import DEFAULT_INSTRUCTIONS
from ..llm import encode_known, encode_prompt
from ..tokens import LlmTokens
from ..train.cache import Encoders
from ..train.features import NULL, Index, Shard, padded, write_index, write_shard
from .captions import caption
from .corpus import answer, vary, wide_caption
from .world import FRAMES, SIZE, Staging, random_scene, render, stage

SHARD = 1000  # clips
CAPTIONS, ANSWERS = 2, 2
_T5 = {"t5": "captions", "t5_doubtful": "doubtful"}  # tensor: which texts it is T5's reading of
BATCH = 50
LITTLE_WORDS = {"a", "an", "the", "of", "to", "and", "is", "it", "in", "on", "with", "there", "they", "we"}


class Drawn(NamedTuple):
    """The clips of one shard. Texts are two a clip: caption, what T5 reads when it is to be doubted, and the
    answers.
    """

    stagings: list[Staging]
    captions: list[str]
    doubtful: list[str]
    answers: list[tuple[str, ...]]


def make_features(
    folder: Path, encoders: Encoders, shards: int, seed: int = 0, clips: int = SHARD, origins: Any = None
) -> None:
    """Write the shards that are missing, then what makes the folder complete.

    origins: file and fingerprint of "t5", "phi" and "vae", for the index.
    """
    for index in range(shards):
        make_shard(folder, index, encoders, seed, clips)
        print(f"features {index + 1}/{shards}", flush=True)
    finish(folder, encoders, shards, clips, origins)


def make_shard(folder: Path, index: int, encoders: Encoders, seed: int, clips: int = SHARD) -> None:
    """One shard, unless it is there."""
    if _path(folder, index).exists():
        return
    drawn = draw(seed, index, clips)
    stagings = drawn.stagings
    latents = torch.cat([_encode(encoders.vae, stagings[i : i + 20]) for i in range(0, clips, 20)])
    tensors = {"latents": _half(latents), **_texts(encoders, drawn)}
    write_shard(folder, _path(folder, index).name, tensors)


def finish(folder: Path, encoders: Encoders, shards: int, clips: int = SHARD, origins: Any = None) -> None:
    """The empty prompt and the index, which makes the folder complete."""
    empty = encode_prompt(encoders.phi, encoders.tokenizer, "", max_answer_tokens=32)
    rows = {"t5": encoders.t5.encode([""]).hidden.cpu()[:, None], **_tokens([[empty]], 1, 1)}
    write_shard(folder, NULL, {name: _half(tensor) for name, tensor in rows.items()})
    size = (encoders.vae.config.latent_channels, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    written = tuple(Shard(_path(folder, index).name, clips, size) for index in range(shards))
    write_index(folder, Index(written, DEFAULT_INSTRUCTIONS, -1, dict(origins or {})))


def draw(seed: int, index: int, clips: int) -> Drawn:
    """The clips of shard `index` with all their texts."""
    rng = random.Random(f"features/{seed}/{index}")
    scenes = [random_scene(rng) for _ in range(clips)]
    drawn = Drawn([stage(scene, rng) for scene in scenes], [], [], [])
    for scene in scenes:
        other = rng.choice(("seen", "seen", "long"))
        for text in (caption(scene, "simple", rng), vary(caption(scene, other, rng), rng)):
            drawn.captions.append(text)
            drawn.doubtful.append(doubtful(text, scene.kind, rng))
            drawn.answers.append(tuple(answer(scene, rng) for _ in range(ANSWERS)))
    return drawn


def doubtful(text: str, kind: str, rng: random.Random) -> str:
    """What T5 reads of a caption that it is not to be trusted with: invented words, or a caption of another
    scene in words that no video was captioned with. Who hears only such words must ask the language model.
    """
    if rng.random() < 0.5:
        return invent_words(text, rng)
    return vary(wide_caption(random_scene(rng, kind), rng, plain=False), rng)


def invent_words(text: str, rng: random.Random) -> str:
    """`text` with a third to all of its words replaced by invented ones; little words stay.

    "a red circle moves left" -> "a zopu circle vebari left"
    """
    share = rng.uniform(0.3, 1.0)

    def replace(match: re.Match[str]) -> str:
        if match[0].lower() in LITTLE_WORDS or rng.random() > share:
            return match[0]
        return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))

    return re.sub(r"[A-Za-z]+", replace, text)


@torch.no_grad()
def _encode(vae: Any, stagings: list[Staging]) -> Tensor:
    """(B, C, T, h, w), raw."""
    video = render(stagings).to(vae.device)
    with torch.autocast(video.device.type, torch.bfloat16):
        return vae.encode(video).latent_dist.mean.float().cpu()


def _texts(encoders: Encoders, drawn: Drawn) -> dict[str, Tensor]:
    """Every tensor of the captions, (clips, CAPTIONS, ...)."""
    columns: list[dict[str, Tensor]] = []
    read: list[list[LlmTokens]] = []
    for start in range(0, len(drawn.captions), BATCH):
        part = slice(start, start + BATCH)
        texts = {name: getattr(drawn, field)[part] for name, field in _T5.items()}
        columns.append({name: encoders.t5.encode(rows).hidden.cpu() for name, rows in texts.items()})
        read += _answered(encoders, drawn.captions[part], drawn.answers[part])
    clips = len(drawn.stagings)
    hidden = {name: torch.cat([column[name] for column in columns]) for name in _T5}
    shaped = {name: tensor.unflatten(0, (clips, CAPTIONS)) for name, tensor in hidden.items()}
    return {name: _half(tensor) for name, tensor in {**shaped, **_tokens(read, CAPTIONS, ANSWERS)}.items()}


def _answered(
    encoders: Encoders, captions: Sequence[str], answers: Sequence[tuple[str, ...]]
) -> list[list[LlmTokens]]:
    """For each caption its tokens with each of its answers; only the first carry the instructions."""
    columns = [
        encode_known(encoders.phi, encoders.tokenizer, captions, column, () if i else DEFAULT_INSTRUCTIONS)
        for i, column in enumerate(zip(*answers))
    ]
    return [list(row) for row in zip(*columns)]


def _tokens(read: Sequence[Sequence[LlmTokens]], captions: int, answers: int) -> dict[str, Tensor]:
    """The language model's tensors of (clips x captions) texts with `answers` answers each."""
    query, query_length = padded([row[0].query[0].cpu().float() for row in read])
    answer, answer_length = padded([tokens.answer[0].cpu().float() for row in read for tokens in row])
    shape = (len(read) // captions, captions)
    return {
        "query": query.unflatten(0, shape),
        "query_length": query_length.unflatten(0, shape),
        "answer": answer.unflatten(0, (*shape, answers)),
        "answer_length": answer_length.unflatten(0, (*shape, answers)),
        "instruction": torch.cat([row[0].instruction.cpu().float() for row in read]).unflatten(0, shape),
    }


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:04d}.safetensors"
