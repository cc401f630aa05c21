"""Every shipped workflow on the real host, as a person gets it: queued, run, and its video looked into.

The workflow for real weights runs on tiny random files of the real layouts, which diffusers and transformers
write.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy
import pytest
import torch

from launcher.client import Client, File, Run
from launcher.server import Server
from launcher.workflow import Workflow, set_text, set_value, to_prompt

from .inprocess import references

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {path.stem: path for path in sorted((ROOT / "workflows").glob("*.json"))}
PHI_FOLDER = "Phi-3.5-mini-instruct"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "steps": 3, "answer_length": 4}


def read(name: str) -> Workflow:
    return json.loads(WORKFLOWS[name].read_text(encoding="utf-8"))


def models_of(workflow: Workflow) -> list[dict[str, str]]:
    """The files that ComfyUI offers to download for a workflow."""
    return [model for node in workflow["nodes"] for model in node.get("properties", {}).get("models", ())]


@pytest.fixture(scope="module")
def full_size_files(server: Server) -> None:
    """Tiny random weights under the names that the workflow for real weights asks for."""
    models = server.base / "models"
    for model in models_of(read("mimir_cogvideox_5b_text_to_video")):
        (models / model["directory"]).mkdir(exist_ok=True)
        write_single_file(model["directory"], models / model["directory"] / model["name"])
    references.tokenizer(append_eos=True).save_pretrained(models / "text_encoders")
    references.save_phi(models / "text_encoders" / PHI_FOLDER)


def write_single_file(directory: str, path: Path) -> None:
    from safetensors.torch import save_file

    make = {"diffusion_models": references.transformer, "text_encoders": references.t5, "vae": narrow_vae}
    state = make[directory]().state_dict()
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)


def narrow_vae() -> Any:
    """A VAE with the 32 groups of the published one, which a single file does not tell."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

    torch.manual_seed(2)
    config = {**references.VAE, "block_out_channels": (32,) * 4, "norm_num_groups": 32}
    return AutoencoderKLCogVideoX(**config)


def run(host: Client, name: str, text: str | None = None, **values: Any) -> Run:
    """Run a shipped workflow with some of its values changed."""
    prompt = to_prompt(read(name), host.object_info())
    if text is not None:
        set_text(prompt, text)
    for key, value in values.items():
        set_value(prompt, (key,), value)
    return host.run(prompt)


def frames(host: Client, done: Run) -> numpy.ndarray:
    """The frames of the video that a run has saved, (F, H, W, 3) in 0..255."""
    (file,) = done.files()
    return decoded(host, file)


def is_video(file: File) -> bool:
    return file.filename.endswith(".mp4")


def decoded(host: Client, file: File) -> numpy.ndarray:
    with av.open(io.BytesIO(host.view(file))) as video:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


@pytest.mark.parametrize("name", ["mimir_tiny_text_to_video", "mimir_with_ksampler"])
def test_the_built_in_model_makes_a_video(host: Client, name: str) -> None:
    video = frames(host, run(host, name))
    assert video.shape == (9, 64, 64, 3)
    assert video.std() > 10, "a picture without contrast"


def test_other_words_and_other_seeds_give_other_videos(host: Client) -> None:
    name = "mimir_tiny_text_to_video"
    first, words, seed = (
        frames(host, run(host, name, text, seed=number, steps=4)).astype(float)
        for text, number in (("a red circle", 1), ("two blue squares", 1), ("a red circle", 2))
    )
    assert abs(first - words).mean() > 1 and abs(first - seed).mean() > 1


def test_the_workflow_for_real_weights_runs(host: Client, full_size_files: None) -> None:
    done = run(host, "mimir_cogvideox_5b_text_to_video", **SMALL)
    assert frames(host, done).shape == (9, 64, 64, 3)


def test_a_fuser_is_trained_and_used(host: Client) -> None:
    """With a few steps of everything; what the whole of it shows was looked at."""
    done = run(host, "mimir_train_tiny", steps=4, clips=32, warmup=0)
    videos = {file.filename.split("_0")[0]: decoded(host, file) for file in done.files() if is_video(file)}
    assert set(videos) == {"Mimir_before", "Mimir_after"}
    assert all(video.shape == (9, 64, 64, 3) for video in videos.values())
    assert abs(videos["Mimir_before"].astype(float) - videos["Mimir_after"]).mean() > 0.1


def test_every_download_is_chosen_by_the_node_that_offers_it() -> None:
    for name in WORKFLOWS:
        for node in read(name)["nodes"]:
            for model in node.get("properties", {}).get("models", ()):
                assert model["name"] in node["widgets_values"], f"{name}: node {node['id']}"
                assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(
                    model["name"]
                )


def test_every_workflow_is_tested_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert WORKFLOWS and all(f'"{name}"' in source for name in WORKFLOWS)
