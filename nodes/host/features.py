"""Training features made with the host's encoders, or of the built-in world with the built-in ones."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...mimir_core.data.clips import INDEX as CLIPS
from ...mimir_core.data.config import DataConfig
from ...mimir_core.headers import fingerprint
from ...mimir_core.tiny.features import draw, finish, make_shard
from ...mimir_core.tiny.parts import WEIGHTS, load_parts
from ...mimir_core.tokens import LlmTokens
from ...mimir_core.train.cache import CacheConfig, Encoders, cache, captioned
from ...mimir_core.train.features import INDEX
from . import dataset, phi, t5, vae
from .conditioning import NO_ORIGIN, origin_of
from .files import stamp
from .names import DATASETS, FEATURES, place, remember, shown_place
from .report import one_bar, show

WORLD = "built_in_world"
SHARD = 32  # clips of the built-in world that are made between two looks at the progress bar
NOT_PHI = (
    "Cache Features got another encoder as clip_phi. Connect Load Phi-3.5 there, and Load T5 to clip_t5."
)
NO_INSTRUCTIONS = (
    "instructions is empty: write one or more, a line each. A fuser takes as many later as in training."
)


@dataclass(frozen=True)
class HostReaders:
    """`Readers` of mimir_core.train.cache: T5, Phi-3.5 and the VAE of the graph, as their own nodes use
    them."""

    t5: Any  # CLIP
    phi: Any  # CLIP
    vae: Any
    done: Callable[[], None]  # after each video and each answer

    @property
    def origins(self) -> Mapping[str, Mapping[str, str]]:
        found = {"t5": origin_of(self.t5), "phi": origin_of(self.phi), "vae": _origin(self.vae)}
        kept = ("file", "fingerprint", "changed")
        return {name: {key: origin[key] for key in kept if key in origin} for name, origin in found.items()}

    @property
    def latent_channels(self) -> int:
        return self.vae.latent_channels

    @property
    def text_length(self) -> int:
        return getattr(self.t5.tokenizer, "length", t5.TEXT_LENGTH)

    def read_video(self, video: Tensor) -> Tensor:
        frames = (video[0].permute(1, 2, 3, 0) + 1) / 2  # (F, H, W, 3) in 0..1
        latents = vae.encode(self.vae, frames, "auto")[0]
        self.done()
        return latents

    def read_text(self, captions: Sequence[str]) -> Tensor:
        return torch.cat([t5.encode(self.t5, caption)[0][0][0] for caption in captions])

    def read_language(self, config: CacheConfig, caption: str, temperature: float, seed: int) -> LlmTokens:
        settings = (config.answer_length, temperature, seed, config.layer)
        tokens = phi.encode(self.phi, caption, config.instructions, *settings)
        self.done()
        return tokens


def _origin(found: Any) -> Mapping[str, str]:
    return getattr(found, "origin", None) or NO_ORIGIN


class Work:
    """Counts videos and answers for the progress bar."""

    def __init__(self, step: Callable[[int, int], None], clips: int, answers: int) -> None:
        self.step, self.parts, self.total, self.count = step, 1 + answers, clips * (1 + answers), 0

    def one(self) -> None:
        self.count = min(self.count + 1, self.total)  # the empty prompt comes last and is not counted
        self.step(self.count, self.total)

    def clips(self, done: int, total: int) -> None:
        """Shards that were there before count as well."""
        self.count = done * self.parts
        self.step(self.count, self.total)
        show(f"{done} of {total} clips.")


def cache_features(clips: str, name: str, encoders: tuple[Any, Any, Any], **settings: Any) -> str:
    """Writes output/mimir/features/name from the prepared dataset `clips`, and says what it is.

    encoders: T5's CLIP, Phi-3.5's CLIP, VAE. settings: fields of CacheConfig.
    """
    if not phi.is_phi(encoders[1]):
        raise ValueError(NOT_PHI)
    if not settings["instructions"]:
        raise ValueError(NO_INSTRUCTIONS)
    folder, out = place(DATASETS, clips, "dataset"), place(FEATURES, name)
    videos = dataset.videos_of(folder)
    fps, total = DataConfig.read_json(folder / "config.json").output.fps, len(captioned(folder))
    with one_bar() as step:
        work = Work(step, total, settings["answers"])
        readers = HostReaders(*encoders, work.one)
        config = CacheConfig(
            str(folder), str(videos), str(out), "", "", "",
            text_length=readers.text_length, fps=fps, **settings,
        )  # fmt: skip
        cache(config, readers, work.clips)
    remember(f"{FEATURES}/{name}", out / INDEX)
    return f"{total} clips with {settings['answers']} answers each, in {shown_place(out)}."


def fingerprint_clips(name: str | None) -> str:
    """Of a prepared dataset that is named rather than linked."""
    return "" if name is None else _stamp(place(DATASETS, name, "dataset") / CLIPS)


def fingerprint_features(name: str | None) -> str:
    """Of features that are named rather than linked."""
    return "" if name is None else _stamp(place(FEATURES, name, "features") / INDEX)


def _stamp(file: Path) -> str:
    return stamp(file) if file.is_file() else "missing"


def world_features(clips: int, seed: int) -> tuple[str, str]:
    """Features of `clips` captioned clips of the built-in world, SHARD at a time: (name, what they are).

    The name also stands for the built-in encoders, so that features of other ones are made anew.
    """
    models = {"t5": WEIGHTS / "t5", "phi": WEIGHTS / "phi", "vae": WEIGHTS / "vae.safetensors"}
    origins = {name: {"file": path.name, "fingerprint": fingerprint(path)} for name, path in models.items()}
    mark = hashlib.sha256("".join(o["fingerprint"] for o in origins.values()).encode()).hexdigest()[:8]
    name, shards = f"{WORLD}/{clips}_seed{seed}_{mark}", -(-clips // SHARD)
    out = place(FEATURES, name)
    if not (out / INDEX).is_file():
        parts = load_parts()
        encoders = Encoders(parts.t5, parts.phi, parts.phi_tokenizer, parts.vae)  # type: ignore[arg-type]
        with one_bar() as step:
            for index in range(shards):
                make_shard(out, index, encoders, seed, SHARD)
                step(index + 1, shards)
        finish(out, encoders, shards, SHARD, origins)
    remember(WORLD, out / INDEX)
    examples = "\n".join(dict.fromkeys(draw(seed, 0, SHARD).captions[:4]))
    return name, f"{shards * SHARD} clips, two captions each, in {shown_place(out)}. For example:\n{examples}"
