"""What a model file is before it is loaded: from its header alone, also where no loader takes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import weights
from .config import DIT_PRESETS, PHI_PRESETS, T5_PRESETS, DiTConfig, FuserConfig, PhiConfig, T5Config
from .dit import CogVideoXTransformer
from .headers import Checkpoint, TensorInfo, has_tokenizer, open_checkpoint
from .lora import Unfit, match_lora
from .recognise import FileKind, dit_variant, model_names, quantised, recognise

GB = 10**9
# Names in a safetensors header -> ours, and bytes of a value.
PRECISIONS = {
    "F64": ("fp64", 8),
    "F32": ("fp32", 4),
    "F16": ("fp16", 2),
    "BF16": ("bf16", 2),
    "F8_E4M3": ("fp8_e4m3fn", 1),
    "F8_E5M2": ("fp8_e5m2", 1),
}
PUBLISHED = {
    "2b": "CogVideoX-2B",
    "5b": "CogVideoX-5B",
    "1.5-5b": "CogVideoX-1.5-5B",
    "tiny": "Mimir Tiny's DiT",
}
TOKENIZER = (
    "put tokenizer.json and tokenizer_config.json of the same model into its folder, beside the weights."
)
LORA_TARGETS = ("5b", "1.5-5b", "2b", "tiny")
LORA_SIZES = "CogVideoX-2B (width 1920, 30 blocks) and CogVideoX-5B and 1.5 (width 3072, 42 blocks)"


class Count(NamedTuple):
    tensors: int
    values: int


@dataclass(frozen=True)
class Description:
    """What lies at a path. Sizes are in bytes."""

    file: str
    name: str  # what it is, in words
    loader: str | None = None  # the node that takes it
    problem: str | None = None  # why none does, and what to use instead
    layout: str = ""  # whose tensor names, and how many files
    precisions: Mapping[str, Count] = field(default_factory=dict)
    scaled: bool = False  # fp8 with a scale per layer
    size: int = 0  # on disk
    memory: Mapping[str, int] = field(default_factory=dict)  # {dtype of its loader: its weights in that}

    @property
    def parameters(self) -> int:
        return sum(count.values for count in self.precisions.values())

    @property
    def precision(self) -> str:
        """The one that most of its values have."""
        most = max(self.precisions, key=lambda name: self.precisions[name].values, default="")
        return f"{most} with scales" if self.scaled else most

    @property
    def line(self) -> str:
        """One line, for the node that loads it."""
        return f"{self.name}, {self.precision}, {_gb(self.size)}"

    @property
    def text(self) -> str:
        """Everything, a line for each."""
        return "\n".join([f"{self.file}: {self.name}", *self._use(), *self._size(), *self._memory()])

    def _use(self) -> list[str]:
        if self.problem is not None:
            return [f"Not usable: {self.problem}"]
        return [f"Node: {self.loader}"] if self.loader else []

    def _size(self) -> list[str]:
        counts = [f"{name} ({_counted(count.tensors)}, {_billions(count.values)})"
                  for name, count in self.precisions.items()]  # fmt: skip
        scales = ", fp8 with a scale per layer" if self.scaled else ""
        lines = [f"Precision: {', '.join(counts)}{scales}"] if counts else []
        lines += [f"Parameters: {_billions(self.parameters)}"] if counts else []
        lines += [f"On disk: {_gb(self.size)}"] if self.size else []
        return lines + ([f"Layout: {self.layout}"] if self.layout else [])

    def _memory(self) -> list[str]:
        sizes = ", ".join(f"{_gb(size)} as {dtype}" for dtype, size in self.memory.items())
        return [f"Memory for its weights: {sizes}"] if sizes else []


class _Known(NamedTuple):
    """A kind that a loader takes."""

    loader: str
    check: Callable[[Path], weights.Checked[Any]]
    name: Callable[[Any], str]
    dtypes: tuple[str, ...]  # that the loader offers besides "as on disk"
    blocks: str = ""  # names of the matrices that fp8 takes begin with this
    own_tokenizer: Callable[[Any], bool] = lambda _: False  # whether one must lie beside it


def describe(path: str | Path, part: str = "") -> Description:
    """What a file or folder is. Never raises for one that cannot be used: `problem` says why.

    part: the folder to look at where `path` is the root of a diffusers model (transformer, vae ...).
    """
    path = Path(path)
    try:
        checkpoint = open_checkpoint(path, weights.ANY._replace(subfolder=part))
    except ValueError as error:
        size = path.stat().st_size if path.is_file() else 0
        return Description(path.name, "no model that this pack reads", problem=str(error), size=size)
    kind, prefix = recognise(checkpoint)
    known = KNOWN.get(kind.kind)
    common: dict[str, Any] = {
        "file": path.name,
        "layout": _layout(checkpoint, kind, prefix),
        "precisions": _precisions(checkpoint.tensors),
        "scaled": any(map(quantised, checkpoint.tensors)),
        "size": sum(file.stat().st_size for file in checkpoint.files),
    }
    if kind.kind == "lora":
        return Description(**_lora(path), **common)
    if known is None:
        return _foreign(checkpoint, kind, common)
    try:
        found = known.check(path)
    except ValueError as error:
        return Description(name=_refused(checkpoint, kind, prefix), problem=str(error), **common)
    common |= {"name": known.name(found.config), "memory": _memory(found, known)}
    beside = path if path.is_dir() else path.parent  # where the loaders look
    if known.own_tokenizer(found.config) and not has_tokenizer(beside):
        return Description(problem=f"tokenizer missing: {TOKENIZER}", **common)
    return Description(loader=known.loader, **common)


def _foreign(checkpoint: Checkpoint, kind: FileKind, common: Mapping[str, Any]) -> Description:
    """A file that no loader of ours takes, named as far as it is known."""
    name = kind.name.partition(" ")[2] if kind.name.startswith(("a ", "an ")) else kind.name
    if kind.kind == "mimir-conditioning":
        return Description(name="saved condition", loader="Load Conditioning (Mimir)", **common)
    problem = f"it is {kind.name}; CogVideoX, its VAE and LoRAs, T5-XXL and Phi-3.5 are used here."
    return Description(name=name, problem=problem, **common)


def _refused(checkpoint: Checkpoint, kind: FileKind, prefix: str) -> str:
    """What a file of a known kind is that its loader refuses."""
    if kind.kind.startswith("cogvideox-") and kind.kind != "cogvideox-vae":
        names = model_names(checkpoint, kind, prefix)
        shapes = {ours: checkpoint.tensors[name].shape for name, ours in names.items()}
        if "patch_embed.proj.weight" in shapes:
            return (dit_variant(shapes) or kind.name).removeprefix("a ")
    return kind.name.removeprefix("a ")


def _lora(path: Path) -> dict[str, Any]:
    """Name, loader or problem of a LoRA: which CogVideoX its modules fit."""
    fits: dict[str, Any] = {}
    problem = ""
    for preset in LORA_TARGETS:
        try:
            fits[PUBLISHED[preset]] = match_lora(path, _parameters(preset))
        except Unfit as error:
            problem = (
                problem or f"{path.name} is {error.found}, which fits none that was published: {LORA_SIZES}."
            )
        except ValueError as error:
            problem = problem or str(error)
    if not fits:
        return {"name": "LoRA", "problem": problem}
    most = max(len(match.places) for match in fits.values())
    models = [name for name, match in fits.items() if len(match.places) == most]
    summary = fits[models[0]].summary
    return {"name": f"LoRA for {' or '.join(models)}, {summary}", "loader": "Load Mimir LoRA"}


@lru_cache
def _parameters(preset: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = CogVideoXTransformer(DIT_PRESETS[preset]).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _layout(checkpoint: Checkpoint, kind: FileKind, prefix: str) -> str:
    names = "ComfyUI's names" if kind.kind == "cogvideox-comfy" else "the published names"
    before = f" behind '{prefix}'" if prefix else ""
    count = len(checkpoint.files)
    return f"{names}{before}, {'one file' if count == 1 else f'{count} files'}"


def _precisions(tensors: Mapping[str, TensorInfo]) -> dict[str, Count]:
    """How many tensors and values there are of each precision, most first; scales and marks left out."""
    found: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if not quantised(name):
            label = PRECISIONS.get(tensor.dtype, (tensor.dtype.lower(), 0))[0]
            found.setdefault(label, []).append(prod(tensor.shape))
    counts = {label: Count(len(sizes), sum(sizes)) for label, sizes in found.items()}
    return dict(sorted(counts.items(), key=lambda item: -item[1].values))


def _memory(found: weights.Checked[Any], known: _Known) -> dict[str, int]:
    """Bytes of the weights as on disk, and in every dtype that the loader offers."""
    tensors = found.checkpoint.tensors
    infos = {ours: tensors[name] for name, ours in found.names.items() if not quantised(ours)}
    if "shared.weight" in infos:
        infos.pop("encoder.embed_tokens.weight", None)  # the same tensor under its second name
    stored = {ours: _bytes(info) for ours, info in infos.items()}
    sizes = {"on disk": sum(stored.values())}
    for dtype in known.dtypes:
        if dtype.startswith("fp8"):
            sizes[dtype] = sum(
                prod(info.shape) if known.blocks and ours.startswith(known.blocks) and len(info.shape) == 2
                else stored[ours] for ours, info in infos.items()
            )  # fmt: skip
        else:
            width = 4 if dtype == "float32" else 2
            sizes[dtype] = sum(width * prod(info.shape) for info in infos.values())
    return sizes


def _bytes(tensor: TensorInfo) -> int:
    return prod(tensor.shape) * PRECISIONS.get(tensor.dtype, ("", 1))[1]


def _dit_name(config: DiTConfig) -> str:
    for preset, name in PUBLISHED.items():
        theirs = DIT_PRESETS[preset]
        if all(
            getattr(config, key) == getattr(theirs, key) for key in ("num_layers", "width", "patch_size_t")
        ):
            return name
    kind = "CogVideoX 1.5" if config.patch_size_t else "CogVideoX"
    return f"{kind} transformer of {config.num_layers} layers, width {config.width}"


def _t5_name(config: T5Config) -> str:
    theirs = T5_PRESETS["xxl"]
    if (config.d_model, config.num_layers) == (theirs.d_model, theirs.num_layers):
        return "T5-XXL encoder"
    return f"T5 v1.1 encoder of {config.num_layers} layers, width {config.d_model}"


def _phi_name(config: PhiConfig) -> str:
    theirs = PHI_PRESETS["phi-3.5-mini"]
    if (config.hidden_size, config.num_hidden_layers) == (theirs.hidden_size, theirs.num_hidden_layers):
        return "Phi-3.5-mini" if config.long_factor else "Phi-3-mini (4k, not 3.5)"
    return f"Phi-3 of {config.num_hidden_layers} layers, width {config.hidden_size}"


def _fuser_name(config: FuserConfig) -> str:
    return f"Token Fuser from Phi's {config.llm_dim} to T5's {config.text_dim}"


_DIT = _Known(
    "Load Mimir DiT",
    weights.check_transformer,
    _dit_name,
    ("bfloat16", "float16", "float32", "fp8_e4m3fn"),
    "transformer_blocks.",
)
KNOWN: dict[str, _Known] = {
    "cogvideox-transformer": _DIT,
    "cogvideox-comfy": _DIT,
    "cogvideox-vae": _Known(
        "Load CogVideoX VAE", weights.check_vae, lambda _: "CogVideoX VAE", ("bfloat16", "float32")
    ),
    "t5-encoder": _Known(
        "Load T5", weights.check_t5, _t5_name, (), own_tokenizer=lambda config: config != T5_PRESETS["xxl"]
    ),
    "phi3": _Known(
        "Load Phi-3.5",
        weights.check_phi,
        _phi_name,
        ("bfloat16", "float32", "fp8_e4m3fn"),
        "model.layers.",
        own_tokenizer=lambda _: True,
    ),
    "mimir-fuser": _Known("Load Token Fuser", weights.check_fuser, _fuser_name, ()),
}


def _gb(size: int) -> str:
    if size >= GB // 10:
        return f"{size / GB:.1f} GB"
    return f"{size / 10**6:.1f} MB" if size >= 10**5 else f"{size / 1000:.1f} kB"


def _counted(tensors: int) -> str:
    return f"{tensors} tensor{'' if tensors == 1 else 's'}"


def _billions(values: int) -> str:
    if values >= 10**8:
        return f"{values / 10**9:.2f} B"
    return f"{values / 10**6:.2f} M" if values >= 10**5 else f"{values:,}"
