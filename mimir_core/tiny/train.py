"""Trains Mimir Tiny from nothing and writes the shipped files: `python -m mimir_core.tiny.train`.

Stages, each resumed where it stopped when the same command is run again:

    text      tokenizers, T5, the language model
    vae       frames, then clips
    features  latents and tokens of 16,000 captioned clips
    decoder   the VAE's decoder alone, on noisy latents (nothing below needs it; it may run beside `dit`)
    dit       the baseline, then Mimir, then trust
    export    writes the parts as float16 safetensors

One thread per process is fastest on a CPU with few cores; two processes may work on different stages.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .. import weights
from ..config import DiffusionConfig, to_dict
from ..llm import encode_prompt
from ..phi import Phi3ForCausalLM
from ..text import PhiTokenizer, T5Encoder
from .dit_train import DitTraining, read_answers, train_dit
from .features import TEXT_LENGTH, Features, make_shard
from .parts import WEIGHTS
from .text_train import train_llm, train_t5, train_tokenizers
from .vae_train import VAE_CONFIG, VaeTraining, latent_scale, preview_factors, train_decoder, train_vae

STAGES = ("text", "vae", "features", "decoder", "dit", "export")


def text_stage(folder: Path, seed: int, device: str, shards: int) -> None:
    """Tokenizers and both text models, as Hugging Face style folders in `folder`/text."""
    train_tokenizers(folder / "text")
    train_t5(folder / "text", seed, device=device)
    train_llm(folder / "text", seed, device=device)


def vae_stage(folder: Path, seed: int, device: str, shards: int) -> None:
    """Frames and clips; the encoder is settled after this."""
    vae = train_vae(folder, seed, device)
    save_file(vae.state_dict(), folder / "vae.safetensors")


def features_stage(folder: Path, seed: int, device: str, shards: int) -> None:
    """Shards that are there are kept, so that several processes may share the work."""
    vae = _vae(folder, seed, device)
    t5, phi, tokenizer = _text_models(folder, device)
    for index in range(shards):
        make_shard(folder / "features" / f"{index:04d}.safetensors", index, seed, vae, t5, phi, tokenizer)
        print(f"features {index + 1}/{shards}", flush=True)


def decoder_stage(folder: Path, seed: int, device: str, shards: int) -> None:
    """Writes vae_final.safetensors."""
    training = VaeTraining(seed, device)
    training.vae.load_state_dict(load_file(folder / "vae.safetensors"))
    save_file(train_decoder(training, folder).state_dict(), folder / "vae_final.safetensors")


def dit_stage(folder: Path, seed: int, device: str, shards: int) -> None:
    """Baseline, Mimir, trust."""
    model = train_dit(_dit_training(folder, seed, device, shards), folder)
    save_file(model.state_dict(), folder / "mimir.safetensors")


def export_stage(folder: Path, seed: int, device: str, shards: int, target: Path = WEIGHTS) -> None:
    """Everything into `target`."""
    training = _dit_training(folder, seed, "cpu", shards)
    training.model.load_state_dict(load_file(folder / "mimir.safetensors"))
    read_answers(training.model)
    vae = _vae(folder, seed, "cpu", "vae_final.safetensors")
    preview = preview_factors(vae, training.diffusion.latent_scale, seed)
    target.mkdir(parents=True, exist_ok=True)
    dit, fuser, half = training.model.dit, training.model.fuser, torch.float16
    weights.save_transformer(
        target / "transformer.safetensors", dit.config, training.diffusion, dit.state_dict(), half, preview
    )
    weights.save(
        target / "fuser.safetensors", fuser.state_dict(), half, config=to_dict(fuser.config), preset="mimir"
    )
    config = {**VAE_CONFIG, "scaling_factor": training.diffusion.latent_scale}
    weights.save_vae(target / "vae.safetensors", config, vae.state_dict(), half)
    for name in ("t5", "phi"):
        shutil.copytree(folder / "text" / name, target / name, dirs_exist_ok=True)
    print(f"wrote {target}: {sum(f.stat().st_size for f in target.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def _vae(folder: Path, seed: int, device: str, name: str = "vae.safetensors") -> Any:
    training = VaeTraining(seed, device)
    training.vae.load_state_dict(load_file(folder / name))
    return training.vae.eval()


def _text_models(folder: Path, device: str) -> tuple[T5Encoder, Phi3ForCausalLM, PhiTokenizer]:
    t5 = T5Encoder.from_folder(folder / "text" / "t5", TEXT_LENGTH, device=device)
    phi = weights.load_phi(folder / "text" / "phi", device, torch.float32)
    return t5, phi, PhiTokenizer.from_folder(folder / "text" / "phi")


def _dit_training(folder: Path, seed: int, device: str, shards: int) -> DitTraining:
    features = Features.load(folder / "features", shards)
    t5, phi, tokenizer = _text_models(folder, "cpu")
    null = encode_prompt(phi, tokenizer, "", max_answer_tokens=32)
    return DitTraining(
        features, t5, null, DiffusionConfig(latent_scale=latent_scale(features.latents)), seed, device
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/tiny"), help="folder for checkpoints and features"
    )
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=16, help="of 1,000 clips each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    for stage in STAGES:
        if stage in options.stages:
            globals()[f"{stage}_stage"](options.out, options.seed, options.device, options.shards)


if __name__ == "__main__":
    main()
