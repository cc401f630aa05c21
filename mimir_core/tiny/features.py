"""Training features of Mimir Tiny, computed once: latents, T5 tokens and language model tokens of captioned
clips.

Each shard holds SHARD clips with CAPTIONS captions each, drawn from its number and the seed alone, so that
shards can be made in any order or by several processes.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..llm import encode_known
from ..phi import Phi3ForCausalLM
from ..text import PhiTokenizer, T5Encoder
from .captions import canonical, caption
from .corpus import vary
from .vae_train import Vae
from .world import Staging, random_scene, render, stage

SHARD = 1000
CAPTIONS = 2  # per clip: one simple, one seen or long
TEXT_LENGTH = 64
LITTLE_WORDS = {"a", "an", "the", "of", "to", "and", "is", "it", "in", "on", "with", "there", "they", "we"}


@dataclass(frozen=True)
class Features:
    """N clips with two captions each: a simple one, and a seen or long one. float16 on disk and in memory."""

    latents: Tensor  # (N, 16, 3, 8, 8), unscaled
    t5: Tensor  # (N, 2, 64, 96)
    t5_doubtful: Tensor  # (N, 2, 64, 96), of the same captions with words that T5 never read
    llm: Tensor  # (N, 2, 64, 128), padded with zeros
    length: Tensor  # (N, 2), real tokens in llm
    query: Tensor  # (N, 2), how many of them are query tokens; the others are the answer's
    instruction: Tensor  # (N, 2, 4, 128)

    @classmethod
    def load(cls, folder: Path, shards: int) -> Features:
        """All shards of a folder."""
        parts = [load_file(folder / f"{index:04d}.safetensors") for index in range(shards)]
        return cls(**{key: torch.cat([part[key] for part in parts]) for key in parts[0]})


def make_shard(
    path: Path,
    index: int,
    seed: int,
    vae: Vae,
    t5: T5Encoder,
    phi: Phi3ForCausalLM,
    tokenizer: PhiTokenizer,
    clips: int = SHARD,
) -> None:
    """Writes one shard, unless it is there."""
    if path.exists():
        return
    stagings, texts, answers = draw(seed, index, clips)
    latents = torch.cat([_encode(vae, stagings[i : i + 20]) for i in range(0, clips, 20)])
    found = [
        _text(texts[i : i + 50], answers[i : i + 50], t5, phi, tokenizer) for i in range(0, len(texts), 50)
    ]
    t5_tokens, llm, length, query, instruction = (torch.cat(column) for column in zip(*found, strict=True))
    doubtful = doubtful_features(texts, t5, seed, index)
    pairs = {
        "t5": t5_tokens,
        "llm": llm,
        "length": length,
        "query": query,
        "instruction": instruction,
        "t5_doubtful": doubtful,
    }
    tensors = {"latents": latents, **{k: v.unflatten(0, (clips, CAPTIONS)) for k, v in pairs.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, partial)
    partial.rename(path)


def draw(seed: int, index: int, clips: int) -> tuple[list[Staging], list[str], list[str]]:
    """The clips of one shard, their captions (two a clip) and what the language model answers to each."""
    rng = random.Random(f"features/{seed}/{index}")
    scenes = [random_scene(rng) for _ in range(clips)]
    stagings = [stage(scene, rng) for scene in scenes]
    texts, answers = [], []
    for scene in scenes:
        other = rng.choice(("seen", "seen", "long"))
        texts += [caption(scene, "simple", rng), vary(caption(scene, other, rng), rng)]
        answers += [canonical(scene)] * CAPTIONS
    return stagings, texts, answers


def doubtful_features(texts: list[str], t5: T5Encoder, seed: int, index: int) -> Tensor:
    """T5's tokens of the captions with invented words in them: (captions, 64, 96)."""
    rng = random.Random(f"doubt/{seed}/{index}")
    doubted = [invent_words(text, rng) for text in texts]
    parts = [t5.encode(doubted[i : i + 50]).hidden.cpu() for i in range(0, len(texts), 50)]
    return torch.cat(parts)


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
def _encode(vae: Vae, stagings: list) -> Tensor:
    video = render(stagings).to(vae.device)
    with torch.autocast(video.device.type, torch.bfloat16):
        return vae.encode(video).latent_dist.mean.float().cpu()


def _text(
    texts: list[str], answers: list[str], t5: T5Encoder, phi: Phi3ForCausalLM, tokenizer: PhiTokenizer
) -> tuple[Tensor, ...]:
    tokens = encode_known(phi, tokenizer, texts, answers)
    sequences = [t.sequence()[0, :TEXT_LENGTH] for t in tokens]
    llm = torch.stack([torch.nn.functional.pad(s, (0, 0, 0, TEXT_LENGTH - len(s))) for s in sequences])
    length = torch.tensor([len(s) for s in sequences])
    query = torch.tensor([min(t.query.shape[1], TEXT_LENGTH) for t in tokens])
    instruction = torch.cat([t.instruction for t in tokens])
    return t5.encode(texts).hidden.cpu(), llm.cpu(), length, query, instruction.cpu()
