"""Every shipped workflow on the real host, as a person gets it: queued, run, and its video looked into.

The workflow for real weights runs on tiny random files of the real layouts, which diffusers and transformers
write.
"""

from __future__ import annotations

import io
import json
import re
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
RELEASED = sorted((ROOT / "tests" / "workflows").glob("*/*.json"))
REAL = ("mimir_cogvideox_2b_text_to_video", "mimir_cogvideox_5b_text_to_video")
# The built-in model's templates: the frames of each video that they save.
TINY = {
    "mimir_tiny_long_video": (33,),
    "mimir_tiny_saved_conditioning": (9,),
    "mimir_tiny_text_to_video": (9,),
    "mimir_tiny_video_to_video": (9, 9),
    "mimir_with_ksampler": (9,),
}
TRAIN = "mimir_train_tiny"
PHI_FOLDER = "Phi-3.5-mini-instruct"
SMALL: dict[str, Any] = {"width": 64, "height": 64, "frames": 9, "steps": 3, "answer_length": 4}


def read(name: str) -> Workflow:
    return json.loads(WORKFLOWS[name].read_text(encoding="utf-8"))


def models_of(workflow: Workflow) -> list[dict[str, str]]:
    """The files that ComfyUI offers to download for a workflow."""
    return [model for node in workflow["nodes"] for model in node.get("properties", {}).get("models", ())]


@pytest.fixture(scope="module")
def full_size_files(server: Server) -> None:
    """Tiny random weights under the names that the workflows for real weights ask for."""
    models = server.base / "models"
    for model in (model for name in REAL for model in models_of(read(name))):
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
    return run_workflow(host, read(name), text, **values)


def run_workflow(host: Client, workflow: Workflow, text: str | None = None, **values: Any) -> Run:
    prompt = to_prompt(workflow, host.object_info())
    if text is not None:
        set_text(prompt, text)
    for key, value in values.items():
        set_value(prompt, (key,), value)
    return host.run(prompt)


def is_video(file: File) -> bool:
    return file.filename.endswith(".mp4")


def videos(host: Client, done: Run) -> list[numpy.ndarray]:
    """The frames of each video that a run has saved, (F, H, W, 3) in 0..255."""
    return [decoded(host, file) for file in done.files()]


def decoded(host: Client, file: File) -> numpy.ndarray:
    with av.open(io.BytesIO(host.view(file))) as video:
        return numpy.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


def frames(host: Client, done: Run) -> numpy.ndarray:
    (video,) = videos(host, done)
    return video


@pytest.mark.parametrize("name", TINY)
def test_the_built_in_model_makes_a_video(host: Client, name: str) -> None:
    made = videos(host, run(host, name))
    assert sorted(video.shape for video in made) == [(count, 64, 64, 3) for count in TINY[name]]
    assert all(video.std() > 10 for video in made), "a picture without contrast"


@pytest.mark.parametrize("path", RELEASED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_workflow_of_a_released_version_still_runs(host: Client, full_size_files: None, path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    made = frames(host, run_workflow(host, workflow, **SMALL))
    assert made.shape == (9, 64, 64, 3)


def test_every_released_version_has_its_workflows() -> None:
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert versions and {path.parent.name for path in RELEASED} == set(versions)


def test_other_words_and_other_seeds_give_other_videos(host: Client) -> None:
    name = "mimir_tiny_text_to_video"
    first, words, seed = (
        frames(host, run(host, name, text, seed=number, steps=4)).astype(float)
        for text, number in (("a red circle", 1), ("two blue squares", 1), ("a red circle", 2))
    )
    assert abs(first - words).mean() > 1 and abs(first - seed).mean() > 1


@pytest.mark.parametrize("name", REAL)
def test_a_workflow_for_real_weights_runs(host: Client, full_size_files: None, name: str) -> None:
    done = run(host, name, **SMALL)
    assert frames(host, done).shape == (9, 64, 64, 3)


def test_a_fuser_is_trained_and_used(host: Client) -> None:
    """With a few steps of everything; what the whole of it shows was looked at."""
    done = run(host, TRAIN, steps=4, clips=32, warmup=0)
    made = {file.filename.split("_0")[0]: decoded(host, file) for file in done.files() if is_video(file)}
    assert set(made) == {"Mimir_before", "Mimir_after"}
    assert all(video.shape == (9, 64, 64, 3) for video in made.values())
    assert abs(made["Mimir_before"].astype(float) - made["Mimir_after"]).mean() > 0.1


def test_every_download_is_chosen_by_the_node_that_offers_it() -> None:
    for name in WORKFLOWS:
        for node in read(name)["nodes"]:
            for model in node.get("properties", {}).get("models", ()):
                assert model["name"] in node["widgets_values"], f"{name}: node {node['id']}"
                assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(
                    model["name"]
                )


def test_every_workflow_is_tested_here() -> None:
    assert set(WORKFLOWS) == {*TINY, *REAL, TRAIN}
