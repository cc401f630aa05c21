"""What the plan node needs of the host: files, the dtypes it would choose, the card and the main memory."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management as management
import torch
from comfy.ldm.modules import attention as host_attention

from ...mimir_core import memory, weights
from ...mimir_core.config import DIT_PRESETS, PHI_PRESETS, T5_PRESETS, DiTConfig, FuserConfig
from ...mimir_core.describe import describe
from ...mimir_core.headers import PIECE
from ...mimir_core.plan import Machine, Stage, report
from ...mimir_core.vae import VAE_PRESETS
from . import files
from .fuser import UNTRAINED
from .model import DTYPES as DIT_DTYPES
from .phi import compute_dtype
from .t5 import TEXT_LENGTH
from .tiny import FOLDER as TINY

NONE, BUILT_IN, AUTOMATIC = "none", "built-in tiny", "automatic"
CARDS = [AUTOMATIC, "none", "6", "8", "12", "16", "24", "32", "48", "80"]
PROMPT = 300  # tokens of the language model: template, a prompt of 200 and an instruction
INSTRUCTIONS = 4
SMALL = 20_000_000  # parameters of a toy, which is computed in float32
DTYPES_COMPUTED = [torch.bfloat16, torch.float16, torch.float32]
DTYPES_ON_DISK = {1: torch.float8_e4m3fn, 2: torch.bfloat16, 4: torch.float32}


class Source(NamedTuple):
    """A network that has not been loaded."""

    title: str
    config: Any
    sizes: dict[str, int]  # bytes of its weights: "on disk", and by dtype
    parameters: int

    @property
    def stored(self) -> int:
        return self.sizes["on disk"]


@dataclass(frozen=True)
class Kind:
    """Where a part's files are, how they are checked, the built-in one, and published ones to plan with."""

    folder: str
    check: Callable[[Path], weights.Checked[Any]]
    tiny: str
    published: dict[str, Source]

    def choices(self) -> list[str]:
        found = files.choices(self.folder, folders=self.folder != files.FUSER)
        return [NONE, BUILT_IN, *self.published, *found]

    def source(self, name: str) -> Source | None:
        """What `name` stands for; None for none. ValueError when the file is another model."""
        if name in (NONE, UNTRAINED):
            return None
        if name in self.published:
            return self.published[name]
        if name == BUILT_IN:
            return self.read(TINY / self.tiny)._replace(title="Mimir Tiny")
        return self.read(files.resolve(self.folder, name))

    def read(self, path: Path) -> Source:
        """From the headers. ValueError when it is another model."""
        checked, found = self.check(path), describe(path)
        if found.problem is not None:
            raise ValueError(f"{path.name}: {found.problem}")
        return Source(path.name, checked.config, dict(found.memory), found.parameters)


def _published(title: str, config: Any, count: int, size: int, wide: int = 0) -> dict[str, Source]:
    """`wide`: how many of the `count` values stay in 16 bit where the loader makes fp8 of the others."""
    sizes = {"on disk": count * size, "bfloat16": 2 * count, "float16": 2 * count, "float32": 4 * count}
    sizes["fp8_e4m3fn"] = count + wide
    return {f"{title} (not on disk)": Source(title, config, sizes, count)}


# Parameters counted from the published configurations (tests/host/inprocess/test_plan.py).
KINDS: dict[str, Kind] = {
    "dit": Kind(files.DIFFUSION, weights.check_transformer, "transformer.safetensors", {
        **_published("CogVideoX-5B", DIT_PRESETS["5b"], 5_570_283_072, 2, 21_218_880),
        **_published("CogVideoX-1.5-5B", DIT_PRESETS["1.5-5b"], 5_570_676_352, 2, 21_612_160),
        **_published("CogVideoX-2B", DIT_PRESETS["2b"], 1_693_783_872, 2, 12_785_472),
    }),
    "t5": Kind(files.TEXT, weights.check_t5, "t5", {
        **_published("T5-XXL fp16", T5_PRESETS["xxl"], 4_762_310_656, 2),
        **_published("T5-XXL fp8", T5_PRESETS["xxl"], 4_762_310_656, 1),
    }),
    "phi": Kind(files.TEXT, weights.check_phi, "phi", _published(
        "Phi-3.5-mini", PHI_PRESETS["phi-3.5-mini"], 3_821_079_552, 2, 197_200_896)),
    "fuser": Kind(files.FUSER, weights.check_fuser, "fuser.safetensors", _published(
        "full-size fuser", FuserConfig(), 41_974_784, 2)),
    "vae": Kind(files.VAE, weights.check_vae, "vae.safetensors", _published(
        "CogVideoX VAE", VAE_PRESETS["5b"], 215_583_907, 2)),
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What the run is to be. Names are those of the combos."""

    width: int
    height: int
    frames: int
    batch: int
    cfg: bool
    answer_length: int
    tiling: str
    dit_dtype: str
    phi_dtype: str
    phi_device: str = "default"


@dataclass(frozen=True)
class Place:
    """Where the run is planned for."""

    machine: Machine
    device: torch.device | None  # of this computer; None for a card that is only named

    @property
    def cpu(self) -> bool:
        return not self.machine.card

    def stored(self, source: Source, choice: torch.dtype | None, file: torch.dtype) -> torch.dtype:
        """What the host keeps a DiT in."""
        if choice is not None:
            return choice
        if self.device is None:
            return file if file.itemsize <= 2 else torch.bfloat16
        return management.unet_dtype(self.device, source.parameters, DTYPES_COMPUTED, file)

    def computed(self, stored: torch.dtype) -> torch.dtype:
        """What it computes in."""
        if self.device is None:
            return stored if stored.itemsize == 2 else torch.bfloat16 if stored.itemsize == 1 else stored
        return management.unet_manual_cast(stored, self.device, DTYPES_COMPUTED) or stored


def plan(names: dict[str, str], settings: Settings, card: str) -> str:
    """The report for these files (a name of `choices` for each of KINDS), settings and card."""
    place = place_of(card)
    found = stages({kind: KINDS[kind].source(name) for kind, name in names.items()}, settings, place)
    if not found:
        raise ValueError("Plan Memory: every part is 'none'. Choose at least one file.")
    title = (
        f"{settings.width} x {settings.height}, {settings.frames} frames, batch {settings.batch}, "
        f"cfg {'on' if settings.cfg else 'off'}"
    )
    kind = "of a process on a CPU" if place.cpu else "on a CPU, and computed for cards"
    basis = f"Computed from the files' headers. Checked against measurements {kind} (see the README)."
    return report(title, found, place.machine, basis)


def place_of(card: str) -> Place:
    """This computer, or this computer with another card, or without one."""
    main = torch.device("cpu")
    ram = {"ram": management.get_total_memory(main), "ram_free": int(management.get_free_memory(main))}
    reserve, least = int(management.extra_reserved_memory()), int(management.minimum_inference_memory())
    common = {"reserve": reserve, "least": least, **ram}
    device = management.get_torch_device()
    if card == AUTOMATIC and device.type != "cpu":
        total = int(management.get_total_memory(device))
        ours = sum(model.loaded_size() for model in management.loaded_models() if model.load_device == device)
        free = min(int(management.get_free_memory(device)) + ours, total)
        return Place(Machine(total, free, **common), device)
    if card in (AUTOMATIC, "none"):
        return Place(Machine(0, 0, **common), main)
    size = int(float(card) * 2**30)
    return Place(Machine(size, int(memory.USABLE * size), **common), None)


def stages(sources: dict[str, Source | None], settings: Settings, place: Place) -> list[Stage]:
    """One Stage for each part that there is, in the order of a run."""
    makers = {"t5": _t5, "phi": _phi, "fuser": _fuser, "dit": _dit, "vae": _vae}
    return [make(source, settings, place) for kind, make in makers.items() if (source := sources.get(kind))]


def _t5(source: Source, settings: Settings, place: Place) -> Stage:
    work = memory.t5(source.config, TEXT_LENGTH, _itemsize(source))
    return Stage("T5", source.title, source.stored, work, on_cpu=_on_cpu(place), cached=source.stored,
                 advice="an fp8 file is half as large.")  # fmt: skip


def _phi(source: Source, settings: Settings, place: Place) -> Stage:
    weights_ = source.sizes.get(settings.phi_dtype, source.stored)
    on_cpu = _on_cpu(place) or settings.phi_device == "cpu"
    device = torch.device("cpu") if on_cpu else place.device
    if device is not None:
        size = compute_dtype(source.config, device).itemsize
    else:
        size = 2 if source.config.hidden_size >= 1024 else 4
    tokens = PROMPT + settings.answer_length
    work = memory.phi(source.config, tokens, size, max(weights_ // max(source.parameters, 1), 1))
    return Stage("Phi-3.5", source.title, weights_, work, on_cpu=on_cpu, cached=_cached(source, weights_),
                 advice="dtype fp8_e4m3fn in Load Phi-3.5, or device cpu.")  # fmt: skip


def _fuser(source: Source, settings: Settings, place: Place) -> Stage:
    work = memory.fuser(source.config, TEXT_LENGTH, PROMPT + settings.answer_length)
    return Stage("Token Fuser", source.title, source.stored, work)


def _dit(source: Source, settings: Settings, place: Place) -> Stage:
    config: DiTConfig = source.config
    choice, _ = DIT_DTYPES[settings.dit_dtype]
    stored = place.stored(source, choice, DTYPES_ON_DISK[_itemsize(source)])
    name = str(stored).removeprefix("torch.")
    weights_ = source.sizes.get(_size_name(name), source.stored)
    size = place.computed(stored).itemsize
    latent = memory.latent_of(settings.width, settings.height, settings.frames)
    text = config.max_text_seq_length + INSTRUCTIONS
    cast = 0 if size == stored.itemsize else 4 * config.width**2 * size

    def work(items: int) -> int:
        free = place.machine.ram_free - weights_
        scores = _scores(config, latent, items, text, size, free) if place.cpu else 0
        return cast + memory.dit(config, latent, items, text, size, scores)

    both, one = work(settings.batch * (1 + settings.cfg)), work(settings.batch)
    return Stage("DiT", f"{source.title}, {name}", weights_, both, one if settings.cfg else None,
                 "with prompt and negative one after the other", cached=_cached(source, weights_),
                 advice="dtype fp8_e4m3fn in Load Mimir DiT, fewer frames or a smaller size.")  # fmt: skip


def _vae(source: Source, settings: Settings, place: Place) -> Stage:
    config = source.config
    toy = source.parameters < SMALL
    device = management.vae_device() if place.device is not None else None  # --cpu-vae
    dtype = torch.bfloat16 if device is None else management.vae_dtype(device, DTYPES_COMPUTED)
    size = 4 if toy else dtype.itemsize
    tile = (config.get("sample_height", 480) // 2, config.get("sample_width", 720) // 2)
    latent = memory.latent_of(settings.width, settings.height, settings.frames)
    whole, tiled = (memory.vae_decode(config, latent, size, part, lays_out=True) for part in (None, tile))
    frames = settings.batch * 3 * settings.frames * settings.width * settings.height * 4
    weights_ = source.parameters * size
    common: dict[str, Any] = {
        "splits": False,
        "on_cpu": device is not None and device.type == "cpu",
        "result": 3 * frames,
        "advice": "fewer frames at once, a smaller size, or ComfyUI with --cpu-vae.",
    }
    if settings.tiling == "auto":
        return Stage("VAE Decode", source.title, weights_, whole, tiled, "in tiles", **common)
    return Stage("VAE Decode", source.title, weights_, tiled if settings.tiling == "on" else whole, **common)


def _cached(source: Source, weights_: int) -> int:
    """What reading a file piece by piece takes beyond the weights, before they have their final precision."""
    piece = min(PIECE * _itemsize(source), source.stored)
    return max(source.stored + piece - weights_, 0)


def _scores(
    config: DiTConfig, latent: tuple[int, int, int], items: int, text: int, size: int, free: float
) -> int:
    """What the host's attention on a CPU needs beside its inputs; the other kernels need next to nothing."""
    if host_attention.optimized_attention is not host_attention.attention_sub_quad:
        return 0
    tokens = memory.dit_tokens(config, latent, text)
    return memory.chunked_scores(items * config.num_attention_heads, tokens, size, free)


def _on_cpu(place: Place) -> bool:
    """Whether the host runs text encoders in main memory although there is a card."""
    return place.device is not None and management.text_encoder_device().type == "cpu"


def _itemsize(source: Source) -> int:
    """Bytes per value on disk, of most values."""
    return min((1, 2, 4), key=lambda size: abs(size - source.stored / max(source.parameters, 1)))


def _size_name(dtype: str) -> str:
    return "fp8_e4m3fn" if dtype.startswith("float8") else dtype
