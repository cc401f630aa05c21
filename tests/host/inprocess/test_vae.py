"""The VAE through the host, ours and core's nodes, against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mimir_pack.nodes.decode import MimirVAEDecode, MimirVAEEncode
from mimir_pack.nodes.host import vae as host_vae
from mimir_pack.tests.host.inprocess import references

import nodes as host_nodes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(diffusers' VAE, ours), from a folder that diffusers wrote."""
    folder: Path = tmp_path_factory.mktemp("models") / "vae"
    reference = references.vae()
    reference.save_pretrained(folder)
    return reference, host_vae.load_vae(folder)


def latents(frames: int = 3, height: int = 6, width: int = 8, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(1))


def images(video: torch.Tensor) -> torch.Tensor:
    """diffusers' (B, 3, F, H, W) in -1..1 as the host's IMAGE."""
    return ((video + 1) / 2).clamp(0, 1).movedim(1, -1).flatten(0, 1)


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_decode_whole_is_diffusers(pair, run_node, frames):
    reference, vae = pair
    (found,) = run_node(MimirVAEDecode, vae=vae, latent={"samples": latents(frames)}, tiling="off")
    assert torch.allclose(found, images(reference.decode(latents(frames)).sample), atol=1e-6)
    assert found.shape == (4 * frames - 3, 48, 64, 3)


def test_core_vae_decode_and_batches(pair):
    reference, vae = pair
    with torch.inference_mode():
        (found,) = host_nodes.VAEDecode().decode(vae, {"samples": latents(batch=2)})
    assert torch.allclose(found, images(reference.decode(latents(batch=2)).sample), atol=1e-6)


def test_tiled_is_diffusers_own_tiling(pair, run_node):
    reference, vae = pair
    z = latents(3, 12, 16)
    reference.enable_tiling(*vae.tile, 0.25, 0.25)
    expected = images(reference.decode(z).sample)
    reference.disable_tiling()
    (found,) = run_node(MimirVAEDecode, vae=vae, latent={"samples": z}, tiling="on")
    assert torch.allclose(found, expected, atol=1e-6)
    whole = images(reference.decode(z).sample)
    assert not torch.allclose(found, whole, atol=1e-6) and (found - whole).abs().mean() < 0.1


def test_core_tiled_nodes(pair):
    reference, vae = pair
    z = latents(3, 12, 16)
    reference.enable_tiling(64, 64, 0.25, 0.25)
    expected = images(reference.decode(z).sample)
    reference.disable_tiling()
    with torch.inference_mode():
        (found,) = host_nodes.VAEDecodeTiled().decode(vae, z_dict(z), 64, 16, 8, 4)
    assert torch.allclose(found, expected, atol=1e-6)


def z_dict(z: torch.Tensor) -> dict[str, Any]:
    return {"samples": z}


def test_encode_is_diffusers_mean(pair, run_node):
    reference, vae = pair
    frames = torch.rand(9, 48, 64, 3, generator=torch.Generator().manual_seed(2))
    video = (frames * 2 - 1).movedim(-1, 0)[None]
    expected = reference.encode(video).latent_dist.mean
    (found,) = run_node(MimirVAEEncode, vae=vae, image=frames, tiling="off")
    assert torch.allclose(found["samples"], expected, atol=1e-5)
    with torch.inference_mode():
        core = host_nodes.VAEEncode().encode(vae, frames)[0]["samples"]
        tiled = host_nodes.VAEEncodeTiled().encode(vae, frames, 512, 64)[0]["samples"]
    assert torch.allclose(core, expected, atol=1e-5) and torch.allclose(tiled, expected, atol=1e-5)


def test_wrong_sizes_are_refused_with_the_nearest(pair, run_node):
    _, vae = pair
    with pytest.raises(ValueError, match="width is 60.*48 or 64"):
        run_node(MimirVAEEncode, vae=vae, image=torch.zeros(9, 48, 60, 3), tiling="off")
    with pytest.raises(ValueError, match="10 frames.*9 or 17"):
        run_node(MimirVAEEncode, vae=vae, image=torch.zeros(10, 48, 64, 3), tiling="off")
    every = "width is 60.*height is 50.*ImageCrop.*10 frames.*ImageFromBatch"
    with pytest.raises(ValueError, match=every):
        run_node(MimirVAEEncode, vae=vae, image=torch.zeros(10, 50, 60, 3), tiling="off")


def test_latents_of_another_model_are_refused_in_a_sentence(pair, run_node):
    _, vae = pair
    for shape in ((1, 4, 3, 8, 8), (1, 16, 8, 8)):
        with pytest.raises(ValueError, match="CogVideoX's have .batch, 16, frames, height, width"):
            run_node(MimirVAEDecode, vae=vae, latent=z_dict(torch.zeros(shape)), tiling="auto")


def test_a_broken_latent_is_not_blamed_on_the_vae(pair, run_node):
    _, vae = pair
    for value in (float("nan"), float("inf")):
        broken = latents(1)
        broken.view(-1)[0] = value
        with pytest.raises(ValueError, match="^VAE Decode got a latent with NaN or infinity.*LoRA.*sampler"):
            run_node(MimirVAEDecode, vae=vae, latent=z_dict(broken), tiling="auto")


def test_out_of_memory_falls_back_to_tiles_and_says_so(pair, monkeypatch):
    reference, vae = pair
    original = vae.first_stage_model.decode

    def fail_whole(z: torch.Tensor, tile: Any = None) -> torch.Tensor:
        if tile is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(z, tile)

    monkeypatch.setattr(vae.first_stage_model, "decode", fail_whole)
    with torch.inference_mode():
        result = MimirVAEDecode.EXECUTE_NORMALIZED(vae=vae, latent={"samples": latents()}, tiling="auto")
    assert "because memory ran out" in result.ui.value
    assert result.result[0].shape == (9, 48, 64, 3)


def test_state_has_published_names(pair):
    reference, vae = pair
    assert set(vae.get_sd()) == set(reference.state_dict())
