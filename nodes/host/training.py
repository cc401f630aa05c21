"""The trainer inside ComfyUI: out of its inference mode, with its memory, under its progress bar."""

import gc
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management as management
import comfy.utils
import folder_paths
import torch

from ...mimir_core.provenance import NO_ORIGIN
from ...mimir_core.train.config import TrainConfig
from ...mimir_core.train.features import FeatureSet
from ...mimir_core.train.folder import CONFIG, METRICS, RunFolder, export_fuser
from ...mimir_core.train.loop import Progress, Stopped
from ...mimir_core.train.loop import train as run
from .curve import average, curve
from .files import FUSER
from .fuser import Fuser, load_fuser, save_fuser, untrained_fuser
from .lora import load_lora
from .model import MimirModel, load_dit
from .names import FEATURES, FOLDER, RUNS, place, remember, shown_place
from .report import show

PRECISIONS = {"auto": "", "float32": "no", "bfloat16": "bf16", "float16": "fp16"}
FOLDERS = ("models/mimir", "output/mimir")  # where fusers are saved
LARGE = 500_000_000  # parameters from which "auto" may choose 16 bit
LOOK = 1.0  # seconds between two drawings of the loss


class Trained(NamedTuple):
    fuser: Fuser
    model: Any  # MODEL, with what has been trained about it
    losses: dict[str, list[float]]  # as core's trainer gives them to Plot Loss Graph
    report: str


def train(
    model: Any, features: str, name: str, fuser: Fuser | None, precision: str, settings: Mapping[str, Any]
) -> Trained:
    """Trains, or goes on, in output/mimir/training/<name>_<number>.

    settings: the node's; most are fields of TrainConfig. An interrupt leaves a checkpoint and
    ends the run as interrupted. ValueError for a model, features or settings that do not fit.
    """
    data, first, base = _features(features), place(RUNS, name), _base(model)
    config = TrainConfig(
        features=str(data.folder), base=str(base), run="", fuser=_start(fuser, first), log_every=1,
        precision=PRECISIONS[precision] or _precision(model), **_fields(settings),
    )  # fmt: skip
    config = _placed(config, first, data.fingerprint())
    watch = Watch(config)
    with _away_from_host():
        run(config, watch, cpu=management.get_torch_device().type == "cpu")
    watch.raise_if_interrupted()
    remember(f"{RUNS}/{name}", Path(config.run) / CONFIG)
    return _result(config, model)


def _fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The node's settings under the trainer's names."""
    rates = {"rate_new": settings["learning_rate"], "rate_old": settings["learning_rate_dit"]}
    same = {name: value for name, value in settings.items() if not name.startswith("learning_rate")}
    rank = settings["lora_rank"]
    return {**same, **rates, "rate_vectors": settings["learning_rate"] / 3, "lora_alpha": float(rank)}


class Watch:
    """The report callback: moves the bar, draws the loss, and stops the trainer when the user interrupts."""

    def __init__(self, config: TrainConfig) -> None:
        self.bar = comfy.utils.ProgressBar(config.steps)
        self.losses = _losses(Path(config.run))
        self.began, self.looked, self.first = time.monotonic(), 0.0, 0
        self.interrupt: BaseException | None = None

    def __call__(self, progress: Progress) -> None:
        self.losses[progress.step] = progress.loss
        self.first = self.first or progress.step
        now = time.monotonic()
        due = now - self.looked >= LOOK or progress.step == progress.steps
        try:
            management.throw_exception_if_processing_interrupted()
            self.bar.update_absolute(progress.step, progress.steps, self._picture() if due else None)
        except management.InterruptProcessingException as interrupt:
            self.interrupt = interrupt
            raise Stopped from interrupt  # a checkpoint is written first
        if due:
            self.looked = now
            show(self._line(progress, now))

    def raise_if_interrupted(self) -> None:
        if self.interrupt is not None:
            raise self.interrupt

    def _picture(self) -> tuple[str, Any, int]:
        picture = curve(self.losses)
        return ("JPEG", picture, max(picture.size))

    def _line(self, progress: Progress, now: float) -> str:
        rate = (progress.step - self.first + 1) / max(
            now - self.began, 1e-9
        )  # steps a second, start included
        left = (progress.steps - progress.step) / rate
        return f"Step {progress.step} of {progress.steps}, loss {progress.loss:.4f}, {_minutes(left)} left."


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _features(name: str) -> FeatureSet:
    folder = place(FEATURES, name, "features")
    if not folder.is_dir():
        raise ValueError(
            f"There are no features called '{name}': connect Cache Features, or type the name of older ones."
        )
    return FeatureSet(folder)


def _base(model: Any) -> Path:
    """The file or folder of the DiT on a MODEL wire. ValueError where training could not start from it."""
    found = model.model
    if not isinstance(found, MimirModel) or found.path is None:
        raise ValueError(
            "Train Token Fuser needs the MODEL of Load Mimir DiT or Load Mimir Tiny: training reads its file."
        )
    if model.patches:
        raise ValueError(
            f"This MODEL is changed by a LoRA on {len(model.patches)} tensors, but training starts from the "
            "file of the model alone. Connect Load Mimir DiT here, and the LoRA after training."
        )
    return found.path


def _precision(model: Any) -> str:
    """bfloat16 where a large model is on a card that computes in it."""
    device = management.get_torch_device()
    large = sum(parameter.numel() for parameter in model.model.parameters()) >= LARGE
    return "bf16" if large and device.type != "cpu" and management.should_use_bf16(device) else "no"


def _start(fuser: Fuser | None, first: Path) -> str:
    """A file with the fuser to go on from, named after its content; empty for a new one."""
    if fuser is None or fuser.module is None:
        return ""
    mark = (fuser.origin or NO_ORIGIN)["fingerprint"][:8]
    file = first.with_name(f"{first.name}_start_{mark}.safetensors")
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        export_fuser(file, fuser.module.config, fuser.module.state_dict(), **fuser.training)
    return str(file)


def _placed(config: TrainConfig, first: Path, data: str) -> TrainConfig:
    """`config` in the newest numbered folder of this name if that holds this very run, else in a new one."""
    found = first.parent.iterdir() if first.parent.is_dir() else ()
    known = {int(path.name[len(first.name) + 1 :]): path for path in found if _is_run(path, first.name)}
    for number in sorted(known, reverse=True):
        here = replace(config, run=str(known[number]))
        if not RunFolder(here.run).differences(here, data):
            return here
    return replace(config, run=str(first.with_name(f"{first.name}_{max(known, default=0) + 1:03}")))


def _is_run(path: Path, name: str) -> bool:
    return re.fullmatch(re.escape(name) + r"_\d{3,}", path.name) is not None


@contextmanager
def _away_from_host() -> Iterator[None]:
    """Gradients instead of the host's inference mode, and the device's memory for as long as it takes."""
    management.unload_all_models()
    management.soft_empty_cache()
    try:
        with torch.inference_mode(False), torch.enable_grad(), _own_accelerate():
            yield
    finally:
        gc.collect()
        management.soft_empty_cache()


@contextmanager
def _own_accelerate() -> Iterator[None]:
    """accelerate has one device and precision per process: other packs and the next run keep theirs."""
    try:
        from accelerate.state import AcceleratorState, PartialState
    except ImportError:
        yield  # the trainer says what to install
        return
    shared = (AcceleratorState._shared_state, PartialState._shared_state)
    kept = [dict(state) for state in shared]
    try:
        for state in shared:
            state.clear()
        yield
    finally:
        for state, before in zip(shared, kept, strict=True):
            state.clear()
            state.update(before)


def _losses(folder: Path) -> dict[int, float]:
    """{step: loss} of what a run folder has already."""
    file = folder / METRICS
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def _result(config: TrainConfig, model: Any) -> Trained:
    """What the run folder holds now, as the graph passes it on."""
    folder, losses = Path(config.run), _losses(Path(config.run))
    files, fuser = [], untrained_fuser()
    if config.has_fuser:
        fuser = replace(load_fuser(folder / "fuser.safetensors"), name=folder.name)
        files.append("fuser.safetensors")
    if config.train == "fuser+lora":
        model = load_lora(model, folder / "lora.safetensors", 1.0)[0]
        files.append("lora.safetensors (for Load Mimir LoRA: copy it into models/loras)")
    elif config.train != "fuser":
        model = load_dit(folder / "transformer.safetensors")
        files.append("transformer.safetensors (for Load Mimir DiT: copy it into models/diffusion_models)")
    return Trained(fuser, model, {"loss": average(list(losses.values()))}, _report(config, losses, files))


def _report(config: TrainConfig, losses: Mapping[int, float], files: list[str]) -> str:
    values = list(losses.values())
    part = max(1, len(values) // 10)
    first, last = sum(values[:part]) / part, sum(values[-part:]) / part
    more = f" This run already had more than {config.steps}." if max(losses) > config.steps else ""
    return (
        f"{max(losses)} steps, loss {first:.4f} in the first tenth and {last:.4f} in the last.{more}\n"
        f"In {shown_place(Path(config.run))}: {', '.join(files)}."
    )


def save(fuser: Fuser, name: str, folder: str) -> tuple[str, str]:
    """(path of the written file, what to do with it). `folder` is one of FOLDERS."""
    if folder == FOLDERS[0]:
        root = Path(folder_paths.get_folder_paths(FUSER)[0])
        use = "Press R in ComfyUI, and Load Token Fuser offers it."
    else:
        root = Path(folder_paths.get_output_directory(), FOLDER)
        use = "To use it, copy it into models/mimir."
    path = save_fuser(fuser, root, name)
    remember(f"{folder}/{name}", path)
    return str(path), f"Saved as {folder}/{path.relative_to(root).as_posix()}. {use}"
