"""The shipped parts of Mimir Tiny, read from a folder and built into networks.

    transformer.safetensors  vae.safetensors  fuser.safetensors  t5/  phi/

Every header carries its network's configuration as JSON; the two text models are Hugging Face style folders.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .. import weights
from ..pipeline import Models
from ..text import PhiTokenizer, T5Encoder

WEIGHTS = Path(__file__).parent / "weights"


def load_parts(folder: Path = WEIGHTS, device: str = "cpu") -> Models:
    """All parts of `folder` on `device`, in float32."""
    transformer, diffusion = weights.load_transformer(
        folder / "transformer.safetensors", device, torch.float32
    )
    return Models(
        transformer,
        diffusion,
        T5Encoder.from_folder(folder / "t5", transformer.config.max_text_seq_length, device=device),
        weights.load_vae(folder / "vae.safetensors", device, torch.float32),
        weights.load_phi(folder / "phi", device, torch.float32),
        PhiTokenizer.from_folder(folder / "phi"),
        weights.load_fuser(folder / "fuser.safetensors", device, torch.float32),
    )
