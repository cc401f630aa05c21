"""Trains Mimir Tiny from nothing and writes the shipped files: `python -m mimir_core.tiny.train`.

Stages, each resumed where it stopped when the same command is run again:

    text      tokenizers, T5, the language model
    vae       frames, then clips, then the decoder alone on noisy latents
    features  latents and tokens of 16,000 captioned clips
    baseline  the DiT on T5's tokens
    mimir     the DiT and the Token Fuser, from the baseline
    polish    both, more slowly
    control   two short runs from the baseline, with and without the language model: what to compare
    export    writes the parts as float16 safetensors (--run, --to)

One thread per process is fastest on a CPU with few cores; processes may work on different stages, or on
different shards of the features.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .. import weights
from ..config import DIT_PRESETS, DiffusionConfig, to_dict
from ..headers import fingerprint
from ..text import PhiTokenizer, T5Encoder
from ..train.cache import Encoders
from ..train.features import FeatureSet
from ..train.loop import Progress, train
from . import dit_train
from .features import finish, make_shard
from .parts import WEIGHTS
from .text_train import train_llm, train_t5, train_tokenizers
from .vae_train import VAE_CONFIG, VaeTraining, latent_scale, preview_factors, train_decoder, train_vae


class Recipe:
    """The stages, over one folder of checkpoints and features."""

    def __init__(self, folder: Path, seed: int, device: str, shards: range, vae: Path | None) -> None:
        self.folder, self.seed, self.device, self.shards = folder, seed, device, shards
        self.given_vae = vae

    def text(self) -> None:
        """Tokenizers and both text models, as Hugging Face style folders in text/."""
        train_tokenizers(self.folder / "text")
        train_t5(self.folder / "text", self.seed, device=self.device)
        train_llm(self.folder / "text", self.seed, device=self.device)

    def vae(self) -> None:
        """Encoder and decoder, then the decoder alone; nothing when a trained VAE is given."""
        if self.given_vae is not None:
            return
        training = VaeTraining(self.seed, self.device)
        training.vae = train_vae(self.folder, self.seed, self.device)
        save_file(train_decoder(training, self.folder).state_dict(), self.folder / "vae.safetensors")

    def features(self) -> None:
        """Shards that are there are kept."""
        encoders = self.encoders()
        for index in self.shards:
            make_shard(self.folder / dit_train.FEATURES, index, encoders, self.seed)
            print(f"features {index + 1}", flush=True)
        if self.shards.start == 0:
            finish(self.folder / dit_train.FEATURES, encoders, len(self.shards), origins=self.origins())

    def baseline(self) -> None:
        """Also writes the untrained DiT, whose header holds the scale of the latents."""
        features = FeatureSet(self.folder / dit_train.FEATURES)
        latents = torch.stack([features.latents(clip) for clip in features.clips[:1000]])
        dit_train.start_dit(self.folder, DiffusionConfig(latent_scale=latent_scale(latents)), self.seed)
        self._train(dit_train.baseline)

    def mimir(self) -> None:
        self._train(dit_train.mimir)

    def polish(self) -> None:
        self._train(dit_train.polish)

    def control(self) -> None:
        self._train(dit_train.treated)
        self._train(dit_train.control)

    def export(self, target: Path, run: str) -> None:
        """Every part into `target`, in float16, the networks of one of the runs."""
        target.mkdir(parents=True, exist_ok=True)
        vae, half = self._vae("cpu"), torch.float16
        for name in ("t5", "phi"):
            shutil.copytree(self.folder / "text" / name, target / name, dirs_exist_ok=True)
        weights.save_vae(target / "vae.safetensors", self._vae_config(), vae.state_dict(), half)
        dit = weights.read_transformer(self.folder / run / "transformer.safetensors")
        preview = preview_factors(vae, dit.diffusion.latent_scale, self.seed)
        weights.save_transformer(
            target / "transformer.safetensors", dit.config, dit.diffusion, dit.state, half, preview
        )
        fuser = weights.read_fuser(self.folder / run / "fuser.safetensors")
        training = {**fuser.header["training"], **self._exported(target)}
        weights.save(
            target / "fuser.safetensors", fuser.state, half, config=to_dict(fuser.config), training=training
        )
        size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 1e6
        print(f"wrote {target}: {size:.1f} MB")

    def encoders(self) -> Encoders:
        """T5, the language model and the VAE in float32."""
        text = self.folder / "text"
        return Encoders(
            T5Encoder.from_folder(text / "t5", DIT_PRESETS["tiny"].max_text_seq_length, device=self.device),
            weights.load_phi(text / "phi", self.device, torch.float32),
            PhiTokenizer.from_folder(text / "phi"),
            self._vae(self.device),
        )

    def origins(self) -> dict[str, dict[str, str]]:
        """File and fingerprint of what features are made with."""
        text, vae = self.folder / "text", self.given_vae or self.folder / "vae.safetensors"
        files = {"t5": text / "t5", "phi": text / "phi", "vae": vae}
        return {name: _origin(path) for name, path in files.items()}

    @staticmethod
    def _exported(target: Path) -> dict[str, dict[str, str]]:
        """What the fuser was trained with, as the files that it is shipped with."""
        files = {"base": target / "transformer.safetensors", "t5": target / "t5", "phi": target / "phi"}
        return {name: _origin(path) for name, path in files.items()}

    def _train(self, config: Callable[[Path, int], Any]) -> None:
        def report(progress: Progress) -> None:
            if progress.step % 100 == 0:
                print(f"{config.__name__} {progress.step}/{progress.steps} {progress.loss:.4f}", flush=True)

        train(config(self.folder, self.seed), report, cpu=self.device == "cpu")

    def _vae(self, device: str) -> Any:
        if self.given_vae is not None:
            return weights.load_vae(self.given_vae, device, torch.float32)
        vae = VaeTraining(self.seed, device).vae
        vae.load_state_dict(load_file(self.folder / "vae.safetensors"))
        return vae.eval()

    def _vae_config(self) -> dict[str, Any]:
        features = FeatureSet(self.folder / dit_train.FEATURES)
        latents = torch.stack([features.latents(clip) for clip in features.clips[:1000]])
        return {**VAE_CONFIG, "scaling_factor": latent_scale(latents)}


def _origin(path: Path) -> dict[str, str]:
    return {"file": path.name, "fingerprint": fingerprint(path)}


STAGES = ("text", "vae", "features", "baseline", "mimir", "polish", "control", "export")


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
    parser.add_argument("--first-shard", type=int, default=0, help="for a second process")
    parser.add_argument("--vae", type=Path, help="a trained VAE of this world, instead of a new one")
    parser.add_argument("--run", default="polish", help="whose networks `export` takes")
    parser.add_argument("--to", type=Path, default=WEIGHTS, help="where `export` writes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    shards = range(options.first_shard, options.shards)
    recipe = Recipe(options.out, options.seed, options.device, shards, options.vae)
    stages = {name: getattr(recipe, name) for name in STAGES}
    stages["export"] = partial(recipe.export, options.to, options.run)
    for stage in STAGES:
        if stage in options.stages:
            stages[stage]()


if __name__ == "__main__":
    main()
