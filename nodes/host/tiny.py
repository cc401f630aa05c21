"""The built-in model: five parts from the pack's own folder."""

from pathlib import Path
from typing import Any

from ...mimir_core import tiny
from ...mimir_core.config import DIT_PRESETS
from .fuser import UNTRAINED, Fuser, load_fuser, untrained_fuser
from .model import load_dit
from .phi import load_phi
from .t5 import load_t5
from .vae import load_vae

FOLDER = Path(tiny.__file__).parent / "weights"
MIMIR = "mimir"


def fuser_names() -> list[str]:
    """The shipped fusers: "mimir", other rows of the ablation (fuser_<row>.safetensors), and none."""
    rows = sorted(path.stem.removeprefix("fuser_") for path in FOLDER.glob("fuser_*.safetensors"))
    return [MIMIR, *rows, UNTRAINED]


def load_tiny(fuser_name: str) -> tuple[Any, Any, Any, Fuser, Any]:
    """(MODEL, CLIP of T5, CLIP of Phi, fuser, VAE)."""
    if not (FOLDER / "transformer.safetensors").is_file():
        raise ValueError(
            f"Mimir Tiny's weights are not in {FOLDER}: get a complete copy of this pack, or train them with "
            "'python -m mimir_core.tiny.train'."
        )
    return (
        load_dit(FOLDER / "transformer.safetensors"),
        load_t5(FOLDER / "t5", DIT_PRESETS["tiny"].max_text_seq_length),
        load_phi(FOLDER / "phi"),
        _fuser(fuser_name),
        load_vae(FOLDER / "vae.safetensors"),
    )


def _fuser(name: str) -> Fuser:
    if name == UNTRAINED:
        return untrained_fuser()
    return load_fuser(FOLDER / ("fuser.safetensors" if name == MIMIR else f"fuser_{name}.safetensors"))
