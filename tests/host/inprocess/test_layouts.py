"""Every form in which people have a CogVideoX: loaded by our node, it samples diffusers' video.

Each file is written by diffusers from a tiny random configuration and then renamed, sharded or rounded here.
Reduced-precision files are compared with diffusers holding the same rounded numbers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sample
import folder_paths
import pytest
import torch
from mimir_pack.mimir_core.recognise import to_comfy
from mimir_pack.nodes import load
from mimir_pack.nodes.decode import MimirVAEDecode
from mimir_pack.nodes.host import files
from mimir_pack.tests.host.inprocess import references
from mimir_pack.tests.host.inprocess.test_sampling import (
    SEED,
    conditioning,
    ksampler,
    pipeline,
    prompt_embeds,
    relative,
)
from safetensors.torch import load_file, save_file

# A single file says nothing about its training size: it is taken to be the published one.
NATIVE = {"sample_width": 90, "sample_height": 60, "sample_frames": 49, "num_layers": 1}
NATIVE_15 = {"sample_width": 300, "sample_height": 300, "sample_frames": 81, "num_layers": 1}
# Nor do shapes tell sin-cos positions: width 1920 does, so the 2B is as wide as the real one here.
WIDE = {"num_attention_heads": 30, "attention_head_dim": 64}
CONFIG = {
    "2b": {**references.DIT_2B, **NATIVE, **WIDE},
    "5b": {**references.DIT_5B, **NATIVE, "num_layers": 2},
    "1.5": {**references.DIT_15, **NATIVE_15},
}
SHIFT = {"2b": 3.0, "5b": 1.0, "1.5": 1.0}
SCALE = {"2b": 1.15258426, "5b": 0.7, "1.5": 0.7}
LANDSCAPE, PORTRAIT = (4, 6), (6, 4)  # latent height and width: 480 x 720 and 720 x 480 in small

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model folders of a host, empty."""
    folder = tmp_path_factory.mktemp("models")
    before = dict(folder_paths.folder_names_and_paths)
    for key in (files.DIFFUSION, files.VAE):
        folder_paths.folder_names_and_paths[key] = ([str(folder)], {".safetensors"})
        folder_paths.filename_list_cache.pop(key, None)
    yield folder
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(before)


@pytest.fixture(scope="module")
def written(root: Path) -> Callable[[str], tuple[Any, Path]]:
    """written(variant) -> (diffusers' transformer, the folder that it wrote in fp16, the dtype it was in)."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(variant: str) -> tuple[Any, Path]:
        if variant not in made:
            model = references.transformer(**CONFIG[variant])
            if variant == "2b":  # a width of 1920 needs smaller weights for a velocity of order 1
                for parameter in model.parameters():
                    parameter.data *= 0.3 if parameter.ndim > 1 else 1
            model.half().save_pretrained(root / variant)
            made[variant] = model.float(), root / variant
        return made[variant]

    return get


@pytest.fixture(scope="module")
def expected(written: Any) -> Callable[..., torch.Tensor]:
    """expected(variant, size, steps) -> diffusers' latents for the noise of SEED, as the host scales them."""
    made: dict[Any, torch.Tensor] = {}

    def get(variant: str, size: tuple[int, int], steps: int) -> torch.Tensor:
        key = (variant, size, steps)
        if key not in made:
            noise = comfy.sample.prepare_noise(empty(variant, size)["samples"], SEED)
            made[key] = pipeline(written(variant)[0], SHIFT[variant], noise, steps) / SCALE[variant]
        return made[key]

    return get


def empty(variant: str, size: tuple[int, int]) -> dict[str, Any]:
    return {"samples": torch.zeros(1, 16, 2, *size)}


def sampled(model: Any, variant: str, size: tuple[int, int], steps: int) -> torch.Tensor:
    positive, negative = conditioning(prompt_embeds()), conditioning(prompt_embeds(seed=6))
    return ksampler(model, positive, negative, empty(variant, size), steps)


def state_of(folder: Path) -> State:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def single(written: Path, to: Path, rename: Callable[[str], str]) -> str:
    save_file({rename(name): tensor for name, tensor in state_of(written).items()}, to)
    return to.name


def sharded(written: Path, to: Path) -> str:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel.from_pretrained(written, torch_dtype=torch.float16)
    total = sum(tensor.numel() * 2 for tensor in model.state_dict().values())
    model.save_pretrained(to, max_shard_size=max(total // 2, 1))
    assert len(list(to.glob("*.safetensors"))) > 1
    return to.name


def whole_model(written: Path, to: Path) -> str:
    """The root folder of a diffusers model, as it is downloaded."""
    shutil.copytree(written, to / "transformer")
    (to / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    return to.name


LAYOUTS: dict[str, Callable[[Path, Path], str]] = {
    "folder": lambda written, to: written.name,
    "sharded folder": sharded,
    "root folder": whole_model,
    "diffusers keys": lambda written, to: single(written, to, str),
    "model.diffusion_model.": lambda w, to: single(w, to, lambda name: f"model.diffusion_model.{name}"),
    "diffusion_model.": lambda w, to: single(w, to, lambda name: f"diffusion_model.{name}"),
    "ComfyUI's keys": lambda w, to: single(w, to, to_comfy),
    "ComfyUI's keys, prefixed": lambda w, to: single(w, to, lambda n: f"model.diffusion_model.{to_comfy(n)}"),
}


@pytest.mark.parametrize("variant", CONFIG)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_samples_the_pipelines_video(root, written, expected, run_node, layout, variant):
    _, folder = written(variant)
    is_folder = "folder" in layout
    name = LAYOUTS[layout](folder, root / f"{variant} {layout}{'' if is_folder else '.safetensors'}")
    (model,) = run_node(load.MimirLoadModel, model_name=name, dtype="default")
    assert_holds(model, state_of(folder), variant)  # so what holds of one layout holds of all
    slow = variant == "2b" and layout != "diffusers keys"
    for size in (LANDSCAPE,) if slow else (LANDSCAPE, PORTRAIT):
        assert relative(sampled(model, variant, size, 10), expected(variant, size, 10)) < 1e-3
    if not is_folder:
        (root / name).unlink()


def assert_holds(model: Any, state: State, variant: str) -> None:
    """The MODEL has these very weights and the configuration they were written with."""
    found = model.model.diffusion_model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in state.items())
    known = (
        "sample_width",
        "sample_height",
        "patch_size_t",
        "use_rotary_positional_embeddings",
        "num_layers",
    )
    dit = model.model.dit
    assert {k: getattr(dit, k) for k in known} == {k: CONFIG[variant].get(k, getattr(dit, k)) for k in known}


@pytest.mark.parametrize("variant", ["5b", "1.5"])
def test_fifty_steps_from_a_single_file(root, written, expected, run_node, variant):
    name = single(written(variant)[1], root / f"{variant} fifty.safetensors", to_comfy)
    (model,) = run_node(load.MimirLoadModel, model_name=name, dtype="default")
    assert relative(sampled(model, variant, LANDSCAPE, 50), expected(variant, LANDSCAPE, 50)) < 1e-3


@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT])
def test_fifty_steps_of_a_2b_that_has_its_configuration_beside_it(root, run_node, size):
    """Of any width: config.json says what shapes do not, sin-cos positions and the training size."""
    reference = references.transformer(**references.DIT_2B)
    reference.save_pretrained(root / "own" / "folder")
    single(root / "own" / "folder", root / "own" / "any name.safetensors", to_comfy)
    shutil.copy(root / "own" / "folder" / "config.json", root / "own")
    (model,) = run_node(load.MimirLoadModel, model_name="own/any name.safetensors", dtype="default")
    noise = comfy.sample.prepare_noise(empty("2b", size)["samples"], SEED)
    wanted = pipeline(reference, SHIFT["2b"], noise, 50) / SCALE["2b"]
    assert relative(sampled(model, "2b", size, 50), wanted) < 1e-3
    assert relative(wanted, pipeline(reference, 1.0, noise, 50) / SCALE["2b"]) > 0.01  # the shift matters


def rounded(state: State, file: Path, form: str, rename: Callable[[str], str]) -> State:
    """Writes `state` in `form` under other names, and returns the numbers that the file stands for."""
    if form in references.SCALED:
        numbers = references.save_scaled(state, file, form, (".to_", ".ff.net.", "norm1.linear"))
        kept = load_file(file)
        save_file({rename(name): tensor for name, tensor in kept.items()}, file)
        return numbers
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    stored = {name: tensor.to(dtypes[form]) for name, tensor in state.items()}
    save_file({rename(name): tensor for name, tensor in stored.items()}, file)
    return {name: tensor.float() for name, tensor in stored.items()}


@pytest.mark.parametrize("rename", [str, to_comfy], ids=["diffusers keys", "ComfyUI's keys"])
@pytest.mark.parametrize("form", ["bf16", "fp8", *references.SCALED])
def test_every_precision_samples_its_own_numbers(root, run_node, form, rename):
    reference = references.transformer(**CONFIG["5b"])
    name = f"5b {form}.safetensors"
    reference.load_state_dict(rounded(reference.state_dict(), root / name, form, rename))
    (model,) = run_node(load.MimirLoadModel, model_name=name, dtype="default")
    noise = comfy.sample.prepare_noise(empty("5b", LANDSCAPE)["samples"], SEED)
    found = sampled(model, "5b", LANDSCAPE, 10)
    assert relative(found, pipeline(reference, 1.0, noise, 10) / SCALE["5b"]) < 1e-3


@pytest.mark.parametrize("layout", ["folder", "single file", "root folder"])
def test_the_decoded_video_is_the_pipelines(root, written, run_node, layout):
    reference, names = references.vae(), {"folder": "vae", "single file": "v.safetensors", "root folder": "r"}
    reference.save_pretrained(root / {"root folder": "r/vae"}.get(layout, "vae"))
    if layout == "single file":
        shutil.copy(root / "vae" / "diffusion_pytorch_model.safetensors", root / "v.safetensors")
        (root / "config.json").write_text((root / "vae" / "config.json").read_text())  # 8 norm groups, not 32
    (root / "r").mkdir(exist_ok=True)
    (root / "r" / "model_index.json").write_text("{}")
    (vae,) = run_node(load.MimirLoadVAE, vae_name=names[layout])
    (model,) = run_node(load.MimirLoadModel, model_name="5b", dtype="default")
    latent = {"samples": torch.zeros(1, 16, 3, *LANDSCAPE)}
    positive, negative = conditioning(prompt_embeds()), conditioning(prompt_embeds(seed=6))
    found = ksampler(model, positive, negative, latent, 10)
    (frames,) = run_node(MimirVAEDecode, vae=vae, latent={"samples": found}, tiling="off")
    noise = comfy.sample.prepare_noise(latent["samples"], SEED)
    latents = pipeline(written("5b")[0], 1.0, noise, 10) / SCALE["5b"]
    video = reference.decode(latents).sample  # (1, 3, F, H, W) in -1..1
    wanted = (video[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    assert frames.shape == wanted.shape == (9, 32, 48, 3)
    assert relative(frames, wanted) < 1e-3
