"""Training features on disk: what the encoders and the VAE make of captioned clips, computed once.

A folder holds `index.json`, one `null.safetensors` (the empty prompt) and shards, each with N clips of one
size. Tokens of different length are padded with zeros; their true lengths stand beside them.

Letters: N clips, V captions per clip, A sampled answers per caption, n text tokens, Lq prompt and La answer
tokens, K instructions, Dt and Dl the widths of T5 and the language model.

    latents            (N, C, T, h, w)     raw, as the VAE gives them
    t5                 (N, V, n, Dt)
    t5_doubtful        (N, V, n, Dt)       optional: T5's reading of a distorted caption
    query              (N, V, Lq, Dl)      query_length   (N, V)
    answer             (N, V, A, La, Dl)   answer_length  (N, V, A)
    instruction        (N, V, K, Dl)
"""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
INDEX, NULL = "index.json", "null.safetensors"
REQUIRED = ("latents", "t5", "query", "query_length", "answer", "answer_length", "instruction")


@dataclass(frozen=True)
class Shard:
    file: str
    clips: int
    size: tuple[int, int, int, int]  # (C, T, h, w) of its latents


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    shards: tuple[Shard, ...]
    instructions: tuple[str, ...]
    layer: int  # of the language model
    origins: dict[str, Any] = field(default_factory=dict)  # "t5", "phi", "vae": file name and fingerprint
    format: int = FORMAT


class Clip(NamedTuple):
    shard: int
    row: int


class Text(NamedTuple):
    """One caption as the encoders read it."""

    t5: Tensor  # (n, Dt)
    doubtful: Tensor | None  # (n, Dt)
    query: Tensor  # (Lq, Dl), real tokens only
    answer: Tensor  # (La, Dl), real tokens only
    instruction: Tensor  # (K, Dl)


class FeatureSet:
    """Features read row by row from memory-mapped shards: nothing is held but what a step needs."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self._open: dict[str, Any] = {}
        self.null = self._text(NULL, 0, 0, 0)
        self.clips = [Clip(s, row) for s, shard in enumerate(self.index.shards) for row in range(shard.clips)]
        first = self._file(self.index.shards[0].file)
        self.captions: int = first.get_slice("t5").get_shape()[1]
        self.answers: int = first.get_slice("answer").get_shape()[2]

    def __len__(self) -> int:
        return len(self.clips)

    def latents(self, clip: Clip) -> Tensor:
        """(C, T, h, w), float32."""
        return self._row(self.index.shards[clip.shard].file, "latents", clip.row).float()

    def text(self, clip: Clip, caption: int, answer: int) -> Text:
        """One of the clip's captions with one of its answers, float32."""
        return self._text(self.index.shards[clip.shard].file, clip.row, caption, answer)

    def batch(self, seed: int, step: int, size: int) -> list[Clip]:
        """The clips of one step, all of one size. Every clip comes once per epoch, in an order of its own."""
        per_epoch = len(_epoch(self.index.shards, seed, 0, size))
        epoch, place = divmod(step, per_epoch)
        return [self.clips[i] for i in _epoch(self.index.shards, seed, epoch, size)[place]]

    def fingerprint(self) -> str:
        """Hash of the index and of every shard's header and size: another data set has another one."""
        digest = hashlib.sha256((self.folder / INDEX).read_bytes())
        for shard in self.index.shards:
            path = self.folder / shard.file
            digest.update(f"{shard.file}:{path.stat().st_size}".encode())
        return digest.hexdigest()[:16]

    def _text(self, file: str, row: int, caption: int, answer: int) -> Text:
        query = int(self._row(file, "query_length", row)[caption])
        length = int(self._row(file, "answer_length", row)[caption, answer])
        doubtful = "t5_doubtful" in self._file(file).keys()
        return Text(
            t5=self._row(file, "t5", row)[caption].float(),
            doubtful=self._row(file, "t5_doubtful", row)[caption].float() if doubtful else None,
            query=self._row(file, "query", row)[caption, :query].float(),
            answer=self._row(file, "answer", row)[caption, answer, :length].float(),
            instruction=self._row(file, "instruction", row)[caption].float(),
        )

    def _row(self, file: str, name: str, row: int) -> Tensor:
        return self._file(file).get_slice(name)[row]

    def _file(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(str(self.folder / file), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{self.folder / file} is damaged ({error}): delete it and cache the features again, "
                    "which makes the missing file anew."
                ) from error
        return self._open[file]


@lru_cache(maxsize=4)
def _epoch(shards: tuple[Shard, ...], seed: int, epoch: int, size: int) -> tuple[tuple[int, ...], ...]:
    """All batches of one epoch: clips of one size, shuffled; a size's last batch is filled up at random."""
    rng = random.Random(f"epoch/{seed}/{epoch}")
    sizes: dict[tuple[int, ...], list[int]] = {}
    start = 0
    for shard in shards:
        sizes.setdefault(shard.size, []).extend(range(start, start + shard.clips))
        start += shard.clips
    batches: list[tuple[int, ...]] = []
    for clips in sizes.values():
        order = rng.sample(clips, len(clips))
        order += [rng.choice(clips) for _ in range(-len(clips) % size)]
        batches += [tuple(order[i : i + size]) for i in range(0, len(order), size)]
    return tuple(rng.sample(batches, len(batches)))


def write_shard(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Shard:
    """One shard, complete or not there at all. Floating tensors are stored as they are."""
    missing = [key for key in REQUIRED if key not in tensors and (key != "latents" or name != NULL)]
    if missing:
        raise ValueError(f"a shard needs {', '.join(REQUIRED)}; {', '.join(missing)} not given")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
    partial.replace(folder / name)
    size = tuple(tensors["latents"].shape[1:]) if "latents" in tensors else (0, 0, 0, 0)
    return Shard(name, len(tensors["t5"]), size)  # type: ignore[arg-type]


def complete(path: Path, clips: int) -> bool:
    """Whether `path` is a whole shard of `clips` clips, by its header and size."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            held = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}
    except (SafetensorError, OSError):
        return False
    return set(REQUIRED) <= held.keys() and set(held.values()) == {clips}


def write_index(folder: Path, index: Index) -> None:
    """The last file to be written: a folder without it is not finished."""
    text = json.dumps(asdict(index), indent=1)
    partial = folder / f"{INDEX}.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / INDEX)


def read_index(folder: Path) -> Index:
    """ValueError, in one sentence, when the folder holds no complete set of features."""
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} holds no cached features ({INDEX} is not there): cache them first.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        shards = tuple(Shard(s["file"], s["clips"], tuple(s["size"])) for s in values["shards"])
        known = {"instructions": tuple(values["instructions"]), "layer": values["layer"]}
        index = Index(shards, origins=values["origins"], format=values["format"], **known)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): cache the features again.") from error
    if index.format != FORMAT:
        raise ValueError(f"{path} has format {index.format}, this version reads {FORMAT}: cache again.")
    lost = [name for name in (NULL, *(s.file for s in index.shards)) if not (folder / name).is_file()]
    if lost or not index.shards:
        raise ValueError(f"{folder} lacks {', '.join(lost[:3]) or 'any shard'}: cache the features again.")
    return index


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences (L_i, D) -> one tensor (B, L, D) padded with zeros, and their lengths (B,)."""
    length = max(max((len(row) for row in rows), default=0), 1)
    out = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    return out, torch.tensor([len(row) for row in rows])
