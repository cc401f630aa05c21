"""CONDITIONING that knows how it was made, and the files that carry it to a host without the encoders."""

import os
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management as management
import folder_paths

from ...mimir_core import __version__, tiny
from ...mimir_core.conditioning import EXACT, Saved, load_conditions, save_conditions, zeros_like
from ...mimir_core.provenance import (
    NO_ORIGIN,
    RECORD,
    Record,
    current,
    differences,
    fused_record,
    sealed,
    text_differences,
    text_record,
)
from ...mimir_core.text import Cut, Piece
from .files import SUFFIXES, stamp
from .names import DATASETS, FEATURES, FOLDER, RUNS, require_portable

OUTPUT = " [output]"  # how core marks a file of the output folder in a list of input files
EXAMPLE = "mimir_tiny_example.safetensors [built-in]"  # so that its template runs on a fresh ComfyUI
EXAMPLE_FILE = Path(tiny.__file__).parent / "weights" / "example_conditioning.safetensors"
DATE = {"yyyy": "%Y", "yy": "%y", "MM": "%m", "dd": "%d", "hh": "%H", "mm": "%M", "ss": "%S"}
DATE_PARTS = "|".join(DATE)
NO_NEGATIVE = (
    "The file has no negative: zeros stand for it, which is the empty prompt that CogVideoX was trained with."
)


class Written(NamedTuple):
    path: Path
    report: str
    place: dict[str, str]  # as core names an output: filename, subfolder, type


def origin_of(clip: Any) -> dict[str, str]:
    """Which weights a CLIP holds, as far as its loader has said, and what has been changed about them."""
    origin = dict(getattr(clip.cond_stage_model, "origin", None) or NO_ORIGIN)
    dtypes = sorted(str(dtype) for dtype in getattr(clip.cond_stage_model, "dtypes", ()) if dtype is not None)
    if dtypes and "dtype" not in origin:
        origin["dtype"] = " and ".join(dtypes).replace("torch.", "")
    patches = clip.patcher.patches
    changed = []
    if patches:
        strengths = sorted({f"{patch[0]:g}" for entries in patches.values() for patch in entries})
        changed.append(f"a LoRA on {len(patches)} tensors (strength {', '.join(strengths)})")
    if clip.layer_idx is not None:
        changed.append(f"clip layer {clip.layer_idx}")
    if clip.patcher.forced_hooks is not None:
        changed.append("hooks")
    return {**origin, "changed": " and ".join(changed)} if changed else origin


def record_text(
    conditioning: list[Any], clip: Any, prompt: str, length: int, cut: Cut | None, pieces: Sequence[Piece]
) -> list[Any]:
    """The condition that T5 made of `prompt`, which now says so."""
    left_out = (cut.tokens, cut.text) if cut is not None else (0, "")
    record = text_record(prompt, origin_of(clip), length, *left_out, pieces)
    return [
        [tokens, {**options, RECORD: sealed(record, tokens, __version__)}] for tokens, options in conditioning
    ]


def fused_options(entry: Any, tokens: Any, llm: Record, fuser: Record) -> dict[str, Any]:
    """The options of a condition's `entry` after its fusion to `tokens`."""
    text, options = entry
    record = fused_record(current(options, text), llm, fuser)
    return {**options, RECORD: sealed(record, tokens, __version__)}


def save(positive: Any, negative: Any, prefix: str, precision: str = EXACT) -> Written:
    """Write a file below output/mimir, numbered as core does. ValueError when a file cannot hold it."""
    text = _dated(prefix.strip()) or "conditioning"
    name = os.path.normpath(os.path.join(FOLDER, text))
    if not Path(name).is_relative_to(FOLDER) or name == FOLDER:
        raise ValueError(
            f"filename_prefix is '{prefix}', expected a name below output/{FOLDER}, without '..'."
        )
    require_portable("filename_prefix", text)
    root = folder_paths.get_output_directory()
    folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(name, root)
    file = Path(folder) / f"{stem}_{counter:05}_.safetensors"
    save_conditions(file, positive, negative, precision, __version__)
    size = file.stat().st_size / 1e6
    place = {"filename": file.name, "subfolder": subfolder.replace(os.sep, "/"), "type": "output"}
    report = (
        f"Saved {precision} ({size:.1f} MB) as output/{place['subfolder']}/{file.name}.\nTo share it, send "
        "this file: it belongs into ComfyUI/input."
    )
    return Written(file, report, place)


def _dated(prefix: str) -> str:
    """%date:yyyy-MM-dd% as the page writes it into names; it does so only for core's own nodes."""
    now = datetime.now()

    def written(found: re.Match[str]) -> str:
        return re.sub(DATE_PARTS, lambda part: now.strftime(DATE[part[0]]), found[1])

    return re.sub("%date:([^%]*)%", written, prefix)


def choices() -> list[str]:
    """Files of the input folder (and of input/mimir), and below output/mimir what training has not made; the
    newest first, and Mimir Tiny's example behind them."""
    given, made = Path(folder_paths.get_input_directory()), Path(folder_paths.get_output_directory())
    found = [
        (file, given, "") for folder in (given, given / FOLDER) for file in _safetensors(folder.glob("*"))
    ]
    below = _safetensors((made / FOLDER).rglob("*"))
    found += [(file, made, OUTPUT) for file in below if not _of_training(file, made)]
    found.sort(key=lambda item: item[0].stat().st_mtime, reverse=True)
    example = [EXAMPLE] if EXAMPLE_FILE.is_file() else []
    return [file.relative_to(root).as_posix() + mark for file, root, mark in found] + example


def _of_training(file: Path, made: Path) -> bool:
    """Whether a file below output/mimir is features, a checkpoint or what a run has trained."""
    return file.relative_to(made / FOLDER).parts[0] in (DATASETS, FEATURES, RUNS)


def resolve(name: str) -> Path:
    """The path of a file that `choices` named. ValueError when it is gone or lies elsewhere."""
    if name == EXAMPLE and EXAMPLE_FILE.is_file():
        return EXAMPLE_FILE
    root = (
        folder_paths.get_output_directory() if name.endswith(OUTPUT) else folder_paths.get_input_directory()
    )
    path = Path(os.path.normpath(os.path.join(root, name.removesuffix(OUTPUT))))
    if path.is_file() and path.is_relative_to(os.path.normpath(root)):
        return path
    raise ValueError(
        f"'{name}' was not found. Put the file into {folder_paths.get_input_directory()}, press R in ComfyUI "
        "and choose it again."
    )


def fingerprint(name: str) -> str:
    """Changes when the file changes, so that the node runs again."""
    try:
        return stamp(resolve(name))
    except ValueError:
        return "missing"


def load(
    name: str, compare: Any = None, compare_negative: Any = None, prompt: str = "", instructions: str = ""
) -> tuple[list[Any], list[Any], str]:
    """(positive, negative, what the file says and what differs from the given) on the host's device."""
    saved = load_conditions(resolve(name))
    found = _compared(saved, compare, compare_negative, prompt, instructions)
    notes = [] if saved.negative else [NO_NEGATIVE]
    if found is not None:
        notes.append("\n  ".join([_verdict(len(found)), *found]))
    positive = _placed(saved.positive)
    negative = zeros_like(positive) if saved.negative is None else _placed(saved.negative)
    return positive, negative, "\n".join([*notes, "", saved.text()] if notes else [saved.text()])


def _compared(
    saved: Saved, compare: Any, compare_negative: Any, prompt: str, instructions: str
) -> list[str] | None:
    """What differs, in words; None when there is nothing to compare with."""
    tokens, options = saved.positive[0]
    found = text_differences(current(options, tokens), prompt, instructions)
    if compare is not None:
        found += differences(saved.positive, compare)
    if compare_negative is not None:
        found += [f"negative, {line}" for line in differences(saved.negative or [], compare_negative)]
    given = compare is not None or compare_negative is not None or (prompt + instructions).strip()
    return found if given else None


def _verdict(count: int) -> str:
    if count == 0:
        return "Nothing differs from what the graph holds."
    return f"{count} difference{'s' if count > 1 else ''} from what the graph holds:"


def _safetensors(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if file.is_file() and file.suffix.lower() in SUFFIXES]


def _placed(condition: list[Any]) -> list[Any]:
    return [_moved(entry, management.intermediate_device()) for entry in condition]


def _moved(value: Any, device: Any) -> Any:
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if isinstance(value, (list, tuple)) else value
