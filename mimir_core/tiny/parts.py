"""The shipped parts of Mimir Tiny, read from a folder of safetensors files and built into networks.

    transformer.safetensors  vae.safetensors  fuser.safetensors  t5/  phi/

Every header carries its network's configuration as JSON; the two text models are Hugging Face style folders.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import DiffusionConfig, DiTConfig, FuserConfig, PhiConfig, to_dict
from ..dit import CogVideoXTransformer
from ..fuser import TokenFuser
from ..phi import Phi3ForCausalLM
from ..text import PhiTokenizer, T5Encoder

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Parts:
    """Everything that turns a prompt into frames. Networks are float32, in evaluation mode."""

    vae: AutoencoderKLCogVideoX
    t5: T5Encoder
    phi: Phi3ForCausalLM
    phi_tokenizer: PhiTokenizer
    transformer: CogVideoXTransformer
    fuser: TokenFuser
    diffusion: DiffusionConfig


def load_parts(folder: Path = WEIGHTS, device: str = "cpu") -> Parts:
    """All parts of `folder` on `device`."""
    dit_header = header(folder / "transformer.safetensors")
    dit_config = DiTConfig.from_dict(dit_header["config"])
    return Parts(
        load_vae(folder / "vae.safetensors").to(device),
        T5Encoder.from_folder(folder / "t5", dit_config.max_text_seq_length, device=device),
        load_phi(folder / "phi").to(device),
        PhiTokenizer.from_folder(folder / "phi"),
        _filled(CogVideoXTransformer(dit_config), folder / "transformer.safetensors").to(device),
        _filled(
            TokenFuser(FuserConfig.from_dict(header(folder / "fuser.safetensors")["config"])),
            folder / "fuser.safetensors",
        ).to(device),
        DiffusionConfig.from_dict(dit_header["diffusion"]),
    )


def load_phi(folder: Path) -> Phi3ForCausalLM:
    """The language model of a Hugging Face style folder, float32."""
    config = PhiConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = Phi3ForCausalLM(config)
    state = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def load_vae(path: Path) -> AutoencoderKLCogVideoX:
    """The VAE of one file, float32."""
    return _filled(AutoencoderKLCogVideoX(**header(path)["config"]), path)


def save_part(path: Path, state: dict[str, Tensor], **header_values: Any) -> None:
    """Writes a state in float16 with JSON values in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in state.items()}
    save_file(
        halves, path, {"format": "pt", **{k: json.dumps(v, sort_keys=True) for k, v in header_values.items()}}
    )


def save_transformer(
    path: Path, model: CogVideoXTransformer, diffusion: DiffusionConfig, **extra: Any
) -> None:
    """Writes the DiT with its own and its schedule's configuration."""
    save_part(path, model.state_dict(), config=to_dict(model.config), diffusion=to_dict(diffusion), **extra)


def header(path: Path) -> dict[str, Any]:
    """The JSON values of a file's header."""
    with safe_open(path, "pt") as file:
        found = file.metadata() or {}
    return {k: json.loads(v) for k, v in found.items() if k != "format"}


def _filled(model: nn.Module, path: Path) -> Any:
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval()
