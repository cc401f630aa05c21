"""Safetensors files and folders, read without trusting them: what tensors there are, before any is loaded.

A model is a single file, a folder with one file, or a folder with shards and their index. Every error is one
sentence that names the file, says what it is and what was wanted instead, and what to do.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor

PIECE = 16_000_000  # values that are mapped at once where they are copied
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library itself
OUR_KEYS = ("config", "diffusion", "preview", "training")  # header entries of our own files, JSON each
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model")
BLOCK, BLOCKS = 65536, 64  # what `fingerprint` reads of a file's tensors: bytes, how many times
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class Wanted(NamedTuple):
    """What a loader needs, in words for its errors, and the folder of a diffusers model that has it."""

    name: str
    remedy: str
    subfolder: str = ""


class TensorInfo(NamedTuple):
    dtype: str  # of safetensors: F16, BF16, F8_E4M3 ...
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class Checkpoint:
    """What a model's files say about themselves."""

    path: Path  # what the user chose
    folder: Path  # where its weights lie
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    settings: dict[str, Any] | None  # config.json beside the weights

    @property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def header(self) -> dict[str, Any]:
        """The metadata, with our own entries decoded."""
        return {name: _decoded(name, value) for name, value in self.metadata.items()}

    def load(self, names: Mapping[str, str], own: bool = False) -> dict[str, Tensor]:
        """{new name: tensor} for `names` {name in the file: new name}, in the dtype on disk, on the CPU.

        The tensors are views of the mapped file, which stays in memory as long as one of them; good for a
        network that copies them. own: copies, for one that keeps them; the file is mapped piece by piece.
        """
        state: dict[str, Tensor] = {}
        for file in sorted({self.tensors[name].file for name in names}):
            wanted = [name for name in names if self.tensors[name].file == file]
            for piece in _pieces(wanted, self.tensors) if own else [wanted]:
                with safe_open(str(file), framework="pt", device="cpu") as opened:
                    for name in piece:
                        tensor = opened.get_tensor(name)
                        state[names[name]] = tensor.clone() if own else tensor
        return state


def open_checkpoint(path: str | Path, wanted: Wanted) -> Checkpoint:
    """Read the headers of the file or folder `path`. ValueError when it is no complete set of safetensors."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist, but {wanted.name} is needed here: {wanted.remedy}.")
    files = _files_of_folder(path, wanted) if path.is_dir() else _files_of_file(path)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, notes = read_header(file, wanted)
        tensors.update(found)
        metadata.update(notes)
    return Checkpoint(path, files[0].parent, tensors, metadata, _settings(files[0].parent))


def _pieces(names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """The names in runs of at least PIECE values."""
    piece: list[str] = []
    size = 0
    for name in names:
        piece.append(name)
        size += prod(tensors[name].shape)
        if size >= PIECE:
            yield piece
            piece, size = [], 0
    yield piece


def read_header(file: Path, wanted: Wanted) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of one safetensors file. ValueError when it is something else, or cut short."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        plausible = 2 <= length <= MAX_HEADER
        text = opened.read(min(length, size)) if plausible else b""
    if not plausible or not text.startswith(b"{"):
        raise refusal(file, _what_else(file), wanted)
    if len(text) < length:
        raise _truncated(file, wanted)
    try:
        entries = json.loads(text)
        notes = entries.pop("__metadata__", None) or {}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        tensors = {name: _info(entry, file) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refusal(file, "a file with a damaged safetensors header", wanted) from error
    if 8 + length + max(ends, default=0) > size:
        raise _truncated(file, wanted)
    return tensors, {str(name): str(value) for name, value in notes.items()}


def fingerprint(*paths: Path) -> str:
    """Hexadecimal SHA-256 that tells weights apart in milliseconds: of files, or of a folder's safetensors.

    It sees each file's size, its whole header (names, shapes, dtypes, metadata) and 64 blocks of 64 KiB
    evenly spaced over the tensors; files up to 4 MiB wholly. Retrained or converted weights differ; a change
    of a few bytes between two blocks of a large file is not seen. Names of files do not count, nor does the
    order of a header's entries, which safetensors leaves to chance.
    """
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            _digest(file, digest)
    return digest.hexdigest()


def _digest(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        digest.update(start + _sorted(opened.read(min(length, MAX_HEADER))))
        first = opened.tell()
        if size - first <= BLOCK * BLOCKS:
            digest.update(opened.read())
            return
        for block in range(BLOCKS):
            opened.seek(first + (size - first - BLOCK) * block // (BLOCKS - 1))
            digest.update(opened.read(BLOCK))


def _sorted(header: bytes) -> bytes:
    """A header's JSON in one order; what is no JSON as it is."""
    try:
        return json.dumps(json.loads(header), sort_keys=True).encode()
    except (ValueError, RecursionError):
        return header


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def refusal(path: Path, found: str, wanted: Wanted) -> ValueError:
    """The one sentence: what `path` is, what is needed, and where to get it."""
    return ValueError(f"{path.name} is {found}, but {wanted.name} is needed here: {wanted.remedy}.")


def _info(entry: Mapping[str, Any], file: Path) -> TensorInfo:
    shape, (start, end) = tuple(int(side) for side in entry["shape"]), entry["data_offsets"]
    size = SIZES.get(entry["dtype"])
    if size is not None and prod(shape) * size != end - start:
        raise ValueError(f"a tensor of shape {shape} does not fill its {end - start} bytes")
    return TensorInfo(entry["dtype"], shape, file)


def _truncated(file: Path, wanted: Wanted) -> ValueError:
    return ValueError(
        f"{file.name} is an incomplete safetensors file (its end is missing), but {wanted.name} is "
        "needed here: download it again, completely."
    )


def _what_else(file: Path) -> str:
    """What a file is that is not safetensors, from its first bytes."""
    with file.open("rb") as opened:
        head = opened.read(512)
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights themselves (run 'git lfs pull' or download the file)"
    if head.startswith(b"GGUF"):
        return "a GGUF file, which this pack does not read"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "a PyTorch pickle, which could run code and is never loaded (get the safetensors version)"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page, not weights (the download went wrong)"
    if all(byte in b"\t\n\r" or byte >= 32 for byte in head):
        return "a text file, not weights"
    return "not a safetensors file"


def _files_of_file(path: Path) -> list[Path]:
    """The file itself, or all shards when an index beside it says that it is one of them."""
    for index in sorted(path.parent.glob("*.safetensors.index.json")):
        names = _weight_map(index)
        if path.name in names.values() and all((path.parent / name).is_file() for name in names.values()):
            return sorted({path.parent / name for name in names.values()})
    return [path]


def _files_of_folder(folder: Path, wanted: Wanted) -> list[Path]:
    part = folder / wanted.subfolder
    if wanted.subfolder and part.is_dir() and (folder / "model_index.json").is_file():
        return _files_of_folder(part, wanted)
    indices, files = sorted(folder.glob("*.safetensors.index.json")), sorted(folder.glob("*.safetensors"))
    if indices:
        return _shards(min(indices, key=lambda index: len(index.name)), wanted)
    if len(files) == 1 and "-of-" not in files[0].stem:
        return files
    if files:
        return [_one_of(folder, files, wanted)]
    if wanted.subfolder and part.is_dir():
        return _files_of_folder(part, wanted)
    pickles = [file for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern)]
    found = "only PyTorch pickles, which are never loaded" if pickles else "no safetensors file in it"
    raise refusal(folder, f"a folder with {found}", wanted)


def _one_of(folder: Path, files: list[Path], wanted: Wanted) -> Path:
    """The file that Hugging Face would load. ValueError when it has another name, or is a lone shard."""
    for file in files:
        if file.stem in ("diffusion_pytorch_model", "model"):
            return file
    split = any("-of-" in file.stem for file in files)
    found = "parts of a split model, without their index" if split else f"{len(files)} safetensors files"
    remedy = "download the .safetensors.index.json as well" if split else "choose one of the files"
    raise ValueError(f"{folder.name} is a folder with {found}, but {wanted.name} is needed here: {remedy}.")


def _shards(index: Path, wanted: Wanted) -> list[Path]:
    files = sorted({index.parent / name for name in _weight_map(index).values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        named = f"{', '.join(missing[:3])}{more}, which {'is' if len(missing) == 1 else 'are'} not there"
        raise ValueError(
            f"{index.parent.name} is a folder whose index names {named if missing else 'no file'}, but "
            f"{wanted.name} is needed here: download the missing files."
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """{tensor: file name} of an index, file names only: nothing outside its folder is ever opened."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): Path(str(file)).name for name, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index.name} is not an index of safetensors shards ({error}): download it again."
        ) from error


def _settings(folder: Path) -> dict[str, Any] | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}): download it again.") from error
    return found if isinstance(found, dict) else None


def _decoded(name: str, value: str) -> Any:
    if name not in OUR_KEYS:
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value
