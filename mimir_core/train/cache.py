"""From captioned clips to training features, computed once: `python -m mimir_core.train.cache`.

Reads what `python -m mimir_core.data` has kept, and writes what the trainer reads (features.py). An answer of
a language model scatters, so every caption is answered several times and the trainer draws one of them.
Shards are written whole, each from its clips and the seed alone: a run that was stopped goes on with the
first one that is missing, and gives the same bits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import weights
from ..config import DEFAULT_INSTRUCTIONS
from ..data.clips import Clip, read_kept
from ..data.video import read_frames
from ..headers import fingerprint
from ..llm import encode_prompt
from ..phi import Phi3ForCausalLM
from ..text import PhiTokenizer, T5Encoder
from ..tokens import LlmTokens
from ..vae import encode
from .features import NULL, Index, Shard, complete, padded, write_index, write_shard

PLAN = "plan.json"


@dataclass(frozen=True)
class CacheConfig:
    clips: str  # output folder of mimir_core.data
    videos: str  # the folder of videos it was made from
    out: str  # where the features go
    t5: str  # Hugging Face folder
    phi: str  # Hugging Face folder
    vae: str  # file or folder
    text_length: int = 226
    fps: float = 8.0
    answers: int = 3  # sampled for each caption; 1 takes the likeliest one
    answer_length: int = 64
    temperature: float = 0.7
    layer: int = -1
    instructions: tuple[str, ...] = DEFAULT_INSTRUCTIONS
    shard: int = 32  # clips
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("text_length", "answers", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")


class Readers(Protocol):
    """What features are made with: `Encoders`, or the same models in the hands of a host."""

    @property
    def origins(self) -> Mapping[str, Mapping[str, str]]:
        """File and fingerprint of "t5", "phi" and "vae"."""
        ...

    @property
    def latent_channels(self) -> int: ...

    def read_video(self, video: Tensor) -> Tensor:
        """(1, 3, F, H, W) in -1..1 -> (1, C, T, h, w), raw."""
        ...

    def read_text(self, captions: Sequence[str]) -> Tensor:
        """T5's reading, (B, n, Dt)."""
        ...

    def read_language(self, config: CacheConfig, caption: str, temperature: float, seed: int) -> LlmTokens:
        """The language model's reading, with one answer."""
        ...


@dataclass(frozen=True)
class Encoders:
    """The frozen models that are not needed any more once features are cached."""

    t5: T5Encoder
    phi: Phi3ForCausalLM
    tokenizer: PhiTokenizer
    vae: Any
    origins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.latent_channels

    def read_video(self, video: Tensor) -> Tensor:
        first = next(self.vae.parameters())
        with torch.inference_mode():
            return encode(self.vae, video.to(first.device, first.dtype))

    def read_text(self, captions: Sequence[str]) -> Tensor:
        return self.t5.encode(list(captions)).hidden

    def read_language(self, config: CacheConfig, caption: str, temperature: float, seed: int) -> LlmTokens:
        return encode_prompt(
            self.phi, self.tokenizer, caption, config.instructions, config.answer_length, temperature,
            seed=seed, layer=config.layer,
        )  # fmt: skip


class Captioned(NamedTuple):
    clip: Clip
    caption: str
    bucket: tuple[int, int, int]  # frames, height, width


def load_encoders(config: CacheConfig, device: str, dtype: torch.dtype | None = None) -> Encoders:
    """dtype: of Phi-3.5 and the VAE, None for that of their files; T5 computes in float32."""
    return Encoders(
        T5Encoder.from_folder(config.t5, config.text_length, device=device),
        weights.load_phi(config.phi, device, dtype),
        PhiTokenizer.from_folder(config.phi),
        weights.load_vae(config.vae, device, dtype),
        {name: _origin(getattr(config, name)) for name in ("t5", "phi", "vae")},
    )


def cache(
    config: CacheConfig, encoders: Readers, report: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Write every shard that is missing, then the index; returns the number of clips.

    ValueError when nothing was kept, or when the folder holds features of other clips or settings.
    """
    folder, clips = Path(config.out), captioned(Path(config.clips))
    parts = _parts(clips, config.shard)
    _same_plan(folder, config, encoders, clips)
    shards: list[Shard] = []
    for index, part in enumerate(parts):
        name = f"{index:05d}.safetensors"
        if not complete(folder / name, len(part)):
            write_shard(folder, name, _features(config, encoders, part))
        shards.append(Shard(name, len(part), _latent_size(part[0].bucket, encoders)))
        report(sum(shard.clips for shard in shards), len(clips))
    write_shard(folder, NULL, _texts(config, encoders, [("", "null")]))
    write_index(folder, Index(tuple(shards), config.instructions, config.layer, _origins(encoders)))
    return len(clips)


def captioned(folder: Path) -> list[Captioned]:
    """The kept clips that have a caption. ValueError when there is none."""
    found = [
        Captioned(clip, verdict.caption, verdict.bucket)
        for clip, verdict, _ in read_kept(folder)
        if verdict.caption.strip() and verdict.bucket is not None
    ]
    if not found:
        raise ValueError(
            f"{folder} holds no clip that was kept and has a caption: give the videos captions (a .txt "
            "beside each, or a captioning model) and run python -m mimir_core.data again."
        )
    return found


def _parts(clips: Sequence[Captioned], size: int) -> list[list[Captioned]]:
    """Clips of one bucket each, in order, `size` at most."""
    buckets: dict[tuple[int, int, int], list[Captioned]] = {}
    for item in clips:
        buckets.setdefault(item.bucket, []).append(item)
    return [group[i : i + size] for group in buckets.values() for i in range(0, len(group), size)]


def _features(config: CacheConfig, encoders: Readers, part: Sequence[Captioned]) -> dict[str, Tensor]:
    """All tensors of one shard."""
    latents = torch.cat([_latents(config, encoders, item) for item in part])
    texts = _texts(config, encoders, [(item.caption, _name(item)) for item in part])
    return {"latents": _stored(latents), **texts}


def _latents(config: CacheConfig, encoders: Readers, item: Captioned) -> Tensor:
    """(1, C, T, h, w), raw."""
    clip = item.clip
    frames = read_frames(Path(config.videos) / clip.file, clip.start, clip.end, item.bucket, config.fps)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None]  # (1, 3, F, H, W)
    return encoders.read_video(video / 127.5 - 1).float().cpu()


def _texts(config: CacheConfig, encoders: Readers, captions: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors of texts, one caption a clip; each with a name that its sampling is seeded by."""
    read = [
        [_read(config, encoders, text, name, i) for i in range(config.answers)] for text, name in captions
    ]
    query, query_length = padded([answers[0].query[0].cpu().float() for answers in read])
    flat = [tokens.answer[0].cpu().float() for answers in read for tokens in answers]
    answer, answer_length = padded(flat)
    return {
        "t5": _stored(encoders.read_text([text for text, _ in captions]).cpu())[:, None],
        "query": _stored(query)[:, None],
        "query_length": query_length[:, None],
        "answer": _stored(answer).unflatten(0, (len(read), 1, config.answers)),
        "answer_length": answer_length.unflatten(0, (len(read), 1, config.answers)),
        "instruction": _stored(torch.stack([answers[0].instruction.cpu().float() for answers in read])),
    }


def _read(config: CacheConfig, encoders: Readers, text: str, name: str, index: int) -> LlmTokens:
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{name}/{index}".encode()).digest()[:7], "big")
    temperature = config.temperature if config.answers > 1 else 0.0
    return encoders.read_language(config, text, temperature, seed)


def _same_plan(folder: Path, config: CacheConfig, encoders: Readers, clips: Sequence[Captioned]) -> None:
    """Write down what this folder is made of, or check that it is made of just that."""
    plan = json.loads(json.dumps(asdict(config)))
    for moved in ("clips", "videos", "out"):  # where things lie does not change what they are
        plan.pop(moved)
    content = json.dumps([[_name(item), item.caption, item.bucket] for item in clips])
    plan = {**plan, **_origins(encoders), "content": hashlib.sha256(content.encode()).hexdigest()[:16]}
    path = folder / PLAN
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in plan if known.get(name) != plan[name])
        if changed:
            raise ValueError(
                f"{folder} holds features made with other {', '.join(changed)}: choose another name or "
                "folder, or delete this one to make them again."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")


def _latent_size(bucket: tuple[int, int, int], encoders: Readers) -> tuple[int, int, int, int]:
    frames, height, width = bucket
    return encoders.latent_channels, (frames - 1) // 4 + 1, height // 8, width // 8


def _name(item: Captioned) -> str:
    return f"{item.clip.file}@{item.clip.start:g}"


def _stored(tensor: Tensor) -> Tensor:
    """bfloat16: hidden states of a language model can be larger than float16 holds."""
    return tensor.to(torch.bfloat16)


def _origins(encoders: Readers) -> dict[str, dict[str, str]]:
    return {name: dict(origin) for name, origin in encoders.origins.items()}


def _origin(path: str) -> dict[str, str]:
    return {"file": Path(path).name, "fingerprint": fingerprint(Path(path))}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--config", required=True, metavar="FILE", help="settings as JSON; see CacheConfig")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    try:
        values = json.loads(Path(options.config).read_text(encoding="utf-8"))
        values["instructions"] = tuple(values.get("instructions", DEFAULT_INSTRUCTIONS))
        config = CacheConfig(**values)
        number = cache(config, load_encoders(config, options.device), _line)
    except (ValueError, TypeError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"{number} clips in {config.out}")
    return 0


def _line(done: int, total: int) -> None:
    print(f"{done}/{total} clips", flush=True)


if __name__ == "__main__":
    sys.exit(main())
