"""The VAE's wrapper: equal to diffusers, tiles, progress and the frame arithmetic."""

from typing import Any

import pytest
import torch

from mimir_core import vae as V

pytest.importorskip("diffusers")


CONFIG = {**V.VAE_PRESETS["tiny"], "_class_name": "AutoencoderKLCogVideoX"}


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return V.build_vae(CONFIG)


@pytest.fixture(scope="module")
def reference(vae):
    """The same weights in diffusers' class, without what build_vae does to save memory."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

    model: Any = AutoencoderKLCogVideoX.from_config(dict(CONFIG))
    model.eval()
    model.load_state_dict(vae.state_dict())
    return model


def clip(frames: int = 9, height: int = 16, width: int = 24):
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_whole_equals_diffusers(vae, reference, frames):
    video = clip(frames)
    latents = V.encode(vae, video)
    assert latents.shape == (1, 16, V.latent_frames(frames), 2, 3)
    assert torch.equal(latents, reference.encode(video).latent_dist.mode())
    decoded = V.decode(vae, latents)
    assert decoded.shape == video.shape and V.pixel_frames(latents.shape[2]) == frames
    assert torch.equal(decoded, reference.decode(latents).sample)


def test_gradients_are_diffusers(vae, reference):
    """Training the toy's VAE takes the other branch of the norms."""
    grads = []
    for model in (vae, reference):
        out = model(clip(9)).sample
        grads.append(
            torch.autograd.grad(out.square().mean(), [p for p in model.parameters() if p.requires_grad])
        )
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("latent", [1, 2, 3, 4, 5])
def test_pixel_frames_is_what_comes_out(vae, latent):
    assert V.decode(vae, torch.randn(1, 16, latent, 2, 2)).shape[2] == V.pixel_frames(latent)


@torch.no_grad()
def test_sampling_the_posterior_is_seeded(vae):
    first, second = (V.encode(vae, clip(1), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, V.encode(vae, clip(1)))


@torch.no_grad()
def test_tiles_equal_diffusers_tiles_and_leave_the_vae_as_it_was(vae, reference):
    latents = torch.randn(1, 16, 1, 11, 6, generator=torch.Generator().manual_seed(2))
    before = {name: value for name, value in vars(vae).items() if "til" in name}
    found = V.decode(vae, latents, tile=(50, 20))
    assert {name: value for name, value in vars(vae).items() if "til" in name} == before
    reference.enable_tiling(64, 32, 0.25, 0.25)
    expected = reference.decode(latents).sample
    reference.disable_tiling()
    assert torch.equal(found, expected)
    whole = V.decode(vae, latents)
    assert whole.shape == found.shape and not torch.equal(whole, found)


@torch.no_grad()
@pytest.mark.parametrize("tile, size", [(None, (6, 2)), ((32, 32), (6, 2)), ((32, 32), (4, 4))])
def test_progress_counts_to_the_end(vae, tile, size):
    seen = []
    latents = torch.randn(1, 16, 5, *size)
    V.decode(vae, latents, tile=tile, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {len(seen)}
    assert len(seen) == (4 if tile and size == (6, 2) else 2)
    seen.clear()
    V.encode(vae, clip(17, 16, 16), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


@torch.no_grad()
def test_progress_may_stop_the_work(vae):
    def stop(done, total):
        raise InterruptedError

    hooks = dict(vae.decoder._forward_hooks)
    with pytest.raises(InterruptedError):
        V.decode(vae, torch.randn(1, 16, 1, 2, 6), tile=(16, 16), progress=stop)
    assert not vae.use_tiling and vae.decoder._forward_hooks == hooks


def test_frame_arithmetic():
    assert [V.latent_frames(f) for f in (1, 9, 49, 81)] == [1, 3, 13, 21]
    assert [V.pixel_frames(t) for t in (1, 3, 13, 21, 2)] == [1, 9, 49, 81, 8]
    assert (
        V.nearest_frames(49) == (49, 49)
        and V.nearest_frames(50) == (49, 57)
        and V.nearest_frames(0) == (1, 9)
    )
    V.check_frames(17)
    with pytest.raises(ValueError, match="use 41 or 49"):
        V.check_frames(48)


def test_sizes():
    V.check_size(720, 480)
    with pytest.raises(ValueError, match="width is 725.*use 720 or 736"):
        V.check_size(725, 480)
    with pytest.raises(ValueError, match="height is 8.*use 16 or more"):
        V.check_size(16, 8)


@torch.no_grad()
def test_wrong_frame_count_is_refused_before_any_work(vae):
    with pytest.raises(ValueError, match="use 9 or 17"):
        V.encode(vae, clip(10))


def test_meta_device_and_dtype():
    vae = V.build_vae(V.VAE_PRESETS["5b"], device="meta", dtype=torch.bfloat16)
    assert vae.config.scaling_factor == 0.7
    parameter = vae.decoder.conv_in.conv.weight
    assert parameter.is_meta and parameter.dtype == torch.bfloat16 and parameter.shape[:2] == (512, 16)
