"""A condition made on one ComfyUI, and its video on another that has no text encoder and no fuser at all."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from launcher.client import Client, File, Prompt, Run
from launcher.comfyui import Comfy
from launcher.console import Failure
from launcher.environment import overlay_folder
from launcher.server import PACK_CONTENTS, PACK_FOLDER, ROOT, Server
from mimir_core.config import DEFAULT_INSTRUCTIONS

WEIGHTS = ROOT / "mimir_core" / "tiny" / "weights"
PROMPT = "a red circle moves left above a blue square"
SAMPLING: dict[str, Any] = {"seed": 5, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
SAVED = "conditioning_00001_.safetensors"


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def reading(name: str, text: str, instructions: str = "\n".join(DEFAULT_INSTRUCTIONS)) -> Prompt:
    """Nodes that read `text`; the result is {name}, 0."""
    read = {"instructions": instructions, "answer_length": 8, "temperature": 0.0, "seed": 0, "layer": -1}
    fuse = {"preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0}
    return {
        "tiny": node("MimirLoadTiny", fuser_preset="mimir"),
        f"{name} t5": node("MimirT5Encode", clip=["tiny", 1], text=text),
        f"{name} phi": node("MimirPhiEncode", clip=["tiny", 2], text=text, **read),
        name: node(
            "MimirTokenFuser",
            conditioning=[f"{name} t5", 0],
            tokens=[f"{name} phi", 0],
            fuser=["tiny", 3],
            **fuse,
        ),
    }


def sampling(model: list[Any], vae: list[Any], positive: list[Any], negative: list[Any]) -> Prompt:
    conditions = {"positive": positive, "negative": negative, "latent_image": ["canvas", 0]}
    return {
        "canvas": node("MimirEmptyLatent", width=64, height=64, frames=9, batch=1),
        "sampled": node("KSampler", model=model, **conditions, **SAMPLING, denoise=1.0),
        "latent": node("SaveLatent", samples=["sampled", 0], filename_prefix="latents/a"),
        "frames": node("MimirVAEDecode", vae=vae, latent=["sampled", 0], tiling="auto"),
        "pictures": node("SaveImage", images=["frames", 0], filename_prefix="frame"),
    }


@dataclass
class Made:
    """What a run has left: latent and frames, lossless (an mp4 is not encoded alike twice), and its words."""

    latent: torch.Tensor
    frames: numpy.ndarray
    done: Run


def make(host: Client, prompt: Prompt) -> Made:
    done = host.run(prompt)
    (latent,) = (host.view(file) for file in done.files() if file.filename.endswith(".latent"))
    pictures = [host.view(file) for file in done.files() if file.filename.endswith(".png")]
    frames = numpy.stack([numpy.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])
    return Made(load(latent)["latent_tensor"], frames, done)


@pytest.fixture(scope="module")
def original(host: Client) -> Made:
    """Sampled where the encoders are, and its condition saved."""
    conditions = {**reading("positive", PROMPT), **reading("negative", "")}
    ends: tuple[list[Any], list[Any]] = (["positive", 0], ["negative", 0])
    options = {"filename_prefix": "conditioning", "dtype": "exact"}
    save = node("MimirSaveConditioning", positive=ends[0], negative=ends[1], **options)
    return make(host, {**conditions, "save": save, **sampling(["tiny", 0], ["tiny", 4], *ends)})


@pytest.fixture(scope="module")
def saved(host: Client, original: Made) -> bytes:
    """The file, as it is sent to somebody else."""
    (place,) = original.done.outputs["save"]["conditioning"]
    assert place == {"filename": SAVED, "subfolder": "mimir", "type": "output"}
    return host.view(File(**place))


@pytest.fixture(scope="module")
def elsewhere(comfy: Comfy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A second ComfyUI: a DiT and a VAE as files; no T5, no Phi-3.5 and no fuser, not even built-in ones."""
    base, overlay = tmp_path_factory.mktemp("elsewhere"), overlay_folder(comfy)
    pack = base / "custom_nodes" / PACK_FOLDER
    pack.mkdir(parents=True)
    for item in (ROOT / name for name in PACK_CONTENTS if (ROOT / name).exists()):
        ignore = shutil.ignore_patterns("__pycache__", "weights")
        shutil.copytree(item, pack / item.name, ignore=ignore) if item.is_dir() else shutil.copy(item, pack)
    for folder, name in (("diffusion_models", "transformer"), ("vae", "vae")):
        (base / "models" / folder).mkdir(parents=True)
        shutil.copy(WEIGHTS / f"{name}.safetensors", base / "models" / folder)
    options: dict[str, Any] = {"overlay": overlay if overlay.is_dir() else None, "pack": False}
    with Server(comfy, Path(sys.executable), base, **options) as running:
        assert not [*base.rglob("*t5*/*.safetensors"), *base.rglob("*phi*/*.safetensors")]
        yield running


def loading(file: str = SAVED, **inputs: Any) -> Prompt:
    return {"loaded": node("MimirLoadConditioning", file=file, **inputs)}


def test_the_video_is_the_same_without_the_encoders(original: Made, saved: bytes, elsewhere: Server) -> None:
    (elsewhere.base / "input" / SAVED).write_bytes(saved)
    host = Client(elsewhere.url, alive=elsewhere.raise_if_dead)
    assert SAVED in str(host.object_info("MimirLoadConditioning"))
    models = {
        "dit": node("MimirLoadModel", model_name="transformer.safetensors", dtype="default"),
        "vae": node("MimirLoadVAE", vae_name="vae.safetensors"),
    }
    prompt = {**models, **loading(), **sampling(["dit", 0], ["vae", 0], ["loaded", 0], ["loaded", 1])}
    found = make(host, prompt)
    assert torch.equal(found.latent, original.latent)
    assert numpy.array_equal(found.frames, original.frames)
    assert found.frames.shape == (9, 64, 64, 3) and found.frames.std() > 10
    (text,) = found.done.text("loaded")
    assert f"prompt: {PROMPT}" in text and DEFAULT_INSTRUCTIONS[1] in text and "differ" not in text
    with pytest.raises(Failure, match="'gone.safetensors' was not found. Put the file into .*input"):
        host.run({**prompt, **loading("gone.safetensors")})


def shown(host: Client, prompt: Prompt) -> str:
    """What Load Conditioning says; its STRING goes to a node that shows it, so that it runs."""
    out = {"out": node("PreviewAny", source=["loaded", 2])}
    done = host.run({**prompt, **out})
    return done.text("loaded")[0]


def compared(host: Client, changed: Prompt) -> list[str]:
    """The lines of differences between the saved file and the positive condition of `changed`."""
    text = shown(host, {**changed, **loading(f"mimir/{SAVED} [output]", compare=["positive", 0])})
    return [line.strip() for line in text.split("\n\n")[0].splitlines()]


def test_what_has_changed_is_reported(host: Client, server: Server, saved: bytes) -> None:
    assert compared(host, reading("positive", PROMPT)) == ["Nothing differs from what the graph holds."]

    other = "\n".join(["Count the corners.", *DEFAULT_INSTRUCTIONS[1:]])
    summary, instruction, *_ = compared(host, reading("positive", PROMPT, other))
    assert "difference" in summary
    assert instruction == (
        f"instruction 1: the file has '{DEFAULT_INSTRUCTIONS[0]}', the graph has 'Count the corners.'"
    )

    weaker = reading("positive", PROMPT)
    weaker["positive"]["inputs"]["strength"] = 0.5
    assert "strength: the file has 1, the graph has 0.5" in compared(host, weaker)

    retrained = reading("positive", PROMPT)
    retrained["fuser"] = node("MimirLoadFuser", fuser_name=retrained_fuser(server))
    retrained["positive"]["inputs"]["fuser"] = ["fuser", 0]
    (line,) = [line for line in compared(host, retrained) if line.startswith("fuser: ")]
    first, second = line.removeprefix("fuser: the file has ").split(", the graph has ")
    assert first.startswith("fuser.safetensors (") and second.startswith("fuser.safetensors (")
    assert first != second

    text = shown(host, loading(f"mimir/{SAVED} [output]", prompt="a blue circle", instructions=other))
    assert text.startswith("2 differences from what the graph holds:\n  prompt: ")


def retrained_fuser(server: Server) -> str:
    """The built-in fuser with one number changed, under the same name."""
    source = WEIGHTS / "fuser.safetensors"
    state = load_file(str(source))
    state["llm_conv.bias"][0] += 1e-3
    with safe_open(str(source), "pt") as opened:
        header = opened.metadata()
    (server.base / "models" / "mimir").mkdir(exist_ok=True)
    save_file(state, str(server.base / "models" / "mimir" / source.name), header)
    return source.name
