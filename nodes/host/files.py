"""Where model files lie: the host's folder keys, plus `mimir` for fusers. Nothing here creates a folder."""

import os
from pathlib import Path

import folder_paths

DIFFUSION, TEXT, VAE, FUSER = "diffusion_models", "text_encoders", "vae", "mimir"
LORA = "loras"
PARTS = {
    DIFFUSION: "transformer",
    TEXT: "text_encoder",
    VAE: "vae",
}  # of the root folder of a diffusers model
SUFFIXES = (".safetensors", ".sft")
DEPTH = 3  # how deep below a model folder a Hugging Face folder is looked for


def register() -> None:
    """Tells the host about our own folder key, keeping what extra_model_paths.yaml says about it."""
    folder_paths.add_model_folder_path(FUSER, os.path.join(folder_paths.models_dir, FUSER))
    paths, _ = folder_paths.folder_names_and_paths[FUSER]
    folder_paths.folder_names_and_paths[FUSER] = (paths, set(SUFFIXES))


def choices(key: str, folders: bool = True) -> list[str]:
    """Names for a combo: safetensors files, and sub-folders that look like a Hugging Face model."""
    found = _model_folders(key) if folders else set()
    files = {name for name in folder_paths.get_filename_list(key) if name.lower().endswith(SUFFIXES)}
    return sorted(found) + sorted(name for name in files if not _inside(name, found))


def everything() -> list[str]:
    """Names for a combo: every model file and folder under our keys, as key/name, of whatever format."""
    found: list[str] = []
    for key in (DIFFUSION, TEXT, VAE, FUSER, LORA):
        folders = _model_folders(key)
        other = (name for name in folder_paths.get_filename_list(key) if not _inside(name, folders))
        found += [f"{key}/{name}" for name in (*sorted(folders), *sorted(other))]
    return found


def split(name: str) -> tuple[str, str]:
    """(folder key, name under it) of a name that `everything` gave."""
    key, _, rest = name.partition("/")
    return key, rest


def resolve(key: str, name: str) -> Path:
    """The path of a file or folder that `choices` named. ValueError when it is gone or lies elsewhere."""
    roots = folder_paths.get_folder_paths(key)
    for root in roots:
        path = Path(
            os.path.normpath(os.path.join(root, name))
        )  # symbolic links stay: people keep models on other disks
        if path.exists() and path.is_relative_to(os.path.normpath(root)):
            return path
    where = " or ".join(roots) or "no folder"
    raise ValueError(
        f"'{name}' was not found. Put the file or folder into {where}, press R in ComfyUI and choose it "
        f"again."
    )


def fingerprint(key: str, name: str) -> str:
    """Changes when the file, or any file directly in the folder, changes; so that the node runs again."""
    try:
        return stamp(resolve(key, name))
    except ValueError:
        return "missing"


def stamp(path: Path) -> str:
    """Names, times and sizes of a file, or of all files in a folder."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return " ".join(
        f"{file.name}:{file.stat().st_mtime_ns}:{file.stat().st_size}" for file in files if file.is_file()
    )


def _model_folders(key: str) -> set[str]:
    found: set[str] = set()
    for root in map(Path, folder_paths.get_folder_paths(key)):
        _search(root, root, DEPTH, found)
    return found


def _search(root: Path, folder: Path, depth: int, found: set[str]) -> None:
    if depth == 0 or not folder.is_dir():
        return
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        if _is_model_folder(child):
            found.add(str(child.relative_to(root)))
        else:
            _search(root, child, depth - 1, found)


def _is_model_folder(folder: Path) -> bool:
    marks = ("config.json", "model_index.json")
    return any((folder / mark).is_file() for mark in marks) or any(folder.glob("*.index.json"))


def _inside(name: str, folders: set[str]) -> bool:
    return any(str(parent) in folders for parent in Path(name).parents)
