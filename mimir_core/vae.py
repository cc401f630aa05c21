"""CogVideoX's video autoencoder: diffusers' AutoencoderKLCogVideoX, whole or in tiles, and its frame counts.

Letters: B batch, F frames, H x W pixels, T latent frames, h x w latent size (h = H / 8). Pixels are in -1..1;
latents are raw: multiplying with the DiT's `DiffusionConfig.latent_scale` is up to the caller.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TIME, SPACE = 4, 8  # compression
CHUNK = 2  # latent frames that diffusers decodes at once (3 in the first chunk of an odd number)
Progress = Callable[[int, int], None]  # chunks done, chunks in all; may raise to stop

VAE_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "block_out_channels": (16, 32, 32, 64), "layers_per_block": 1, "norm_num_groups": 4,
        "latent_channels": 16, "sample_height": 64, "sample_width": 64,
    },
    "2b": {"scaling_factor": 1.15258426},
    "5b": {"scaling_factor": 0.7},
}  # fmt: skip


def build_vae(
    config: Mapping[str, Any],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """An AutoencoderKLCogVideoX from diffusers' config.json values (what is missing is as in CogVideoX)."""
    autoencoder = _autoencoder_class()
    with torch.device(device or "cpu"):
        vae: Any = autoencoder.from_config(dict(config))
    _save_memory(vae)
    return vae.to(dtype).eval() if dtype is not None else vae.eval()


def _save_memory(vae: Any) -> None:
    """The same numbers from less: decoding 49 x 480 x 720 in 16 bit takes 8.6 GB instead of 15.8.

    diffusers' spatial norms keep six tensors of their size at once, and the latents twice per norm until the
    next chunk of time, although a convolution over one frame has nothing to remember; and the caches of the
    chunk before stay until the whole chunk is done.
    """
    for module in vae.modules():
        if type(module).__name__ == "CogVideoXSpatialNorm3D":
            module.forward = MethodType(_spatial_norm, module)
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda *call: (call[-1][0], _used_once(call[-1][1])))


def _spatial_norm(norm: Any, x: Tensor, latents: Tensor, conv_cache: Any = None) -> tuple[Tensor, dict]:
    """GroupNorm of x (B, C, F, H, W), scaled and shifted by the latents (B, 16, T, h, w) at its size."""
    frames, size = x.shape[2], x.shape[3:]
    if frames > 1 and frames % 2:  # the first frame of a video is a latent frame of its own
        parts = [F.interpolate(latents[:, :, :1], (1, *size))]
        parts.append(F.interpolate(latents[:, :, 1:], (frames - 1, *size)))
        latents = torch.cat(parts, dim=2)
    else:
        latents = F.interpolate(latents, (frames, *size))
    out = norm.norm_layer(x)  # (B, C, F, H, W)
    if torch.is_grad_enabled():
        return out * norm.conv_y.conv(latents) + norm.conv_b.conv(latents), {}
    return out.mul_(norm.conv_y.conv(latents)).add_(norm.conv_b.conv(latents)), {}


class _Once(dict):
    """A cache of the chunk before, whose parts are dropped as they are used."""

    def get(self, key: Any, default: Any = None) -> Any:
        return self.pop(key, default)


def _used_once(cache: Any) -> Any:
    if not isinstance(cache, dict):
        return cache
    return _Once({name: _used_once(part) for name, part in cache.items()})


def _autoencoder_class() -> Any:
    """diffusers' class. Takes seconds to import, so only where a VAE is used.

    diffusers imports every xformers that is installed and fails with one that does not import. The VAE needs
    none, so such a one is declared absent first.
    """
    from diffusers.utils import import_utils

    try:
        import xformers.ops  # noqa: F401
    except Exception:  # noqa: BLE001  OSError, RuntimeError, AttributeError ...: mimir_core.attention reports it
        import_utils._xformers_available = False
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX


def encode(
    vae: Any,
    video: Tensor,
    generator: torch.Generator | None = None,
    tile: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """video (B, 3, F, H, W) -> latents (B, C, T, h, w): the posterior's mean, or with `generator` a sample.

    F is 1 or 8 k + 1, H and W are multiples of 8. tile: (height, width) in pixels, see `decode`.
    """
    check_frames(video.shape[2])
    with _tiling(vae, tile), _reporting(vae.encoder, _chunks(vae, video.shape, 1, TIME * CHUNK), progress):
        posterior = vae.encode(video).latent_dist
    return posterior.mean if generator is None else posterior.sample(generator)


def decode(
    vae: Any, latents: Tensor, tile: tuple[int, int] | None = None, progress: Progress | None = None
) -> Tensor:
    """latents (B, C, T, h, w) -> video (B, 3, F, H, W), not clamped; F = pixel_frames(T).

    tile: (height, width) in pixels, rounded up to multiples of 32; tiles overlap by a quarter.
    """
    with _tiling(vae, tile), _reporting(vae.decoder, _chunks(vae, latents.shape, SPACE, CHUNK), progress):
        return vae.decode(latents).sample


def latent_frames(frames: int) -> int:
    """T of a video with `frames` frames."""
    return (frames - 1) // TIME + 1


def pixel_frames(latent: int) -> int:
    """F that T latent frames decode to: 4 T - 3, but 4 T when T is even (no frame is then special)."""
    return TIME * latent - (TIME - 1) * (latent % 2)


def nearest_frames(frames: int) -> tuple[int, int]:
    """The counts below and above that survive encoding and decoding: 1, 9, 17 ... 49 ... 81."""
    below = max(frames - 1, 0) // 8 * 8 + 1
    return below, below if below == frames else below + 8


def check_frames(frames: int) -> None:
    below, above = nearest_frames(frames)
    if frames not in (below, above):
        raise ValueError(
            f"{frames} frames: CogVideoX needs 8 times a whole number plus 1, use {below} or {above}"
        )


def check_size(width: int, height: int, multiple: int = 16) -> None:
    """ValueError with the nearest sizes unless both are multiples of 16 pixels (VAE 8, patches 2)."""
    for name, size in (("width", width), ("height", height)):
        below = max(size // multiple * multiple, multiple)
        if size != below:
            choice = f"use {below} or {below + multiple}" if size > multiple else f"use {multiple} or more"
            raise ValueError(f"{name} is {size}, expected a multiple of {multiple}: {choice}")


@contextmanager
def _tiling(vae: Any, tile: tuple[int, int] | None) -> Iterator[None]:
    """Tiles of this size inside the block only: the VAE may be shared.

    diffusers truncates overlaps to whole pixels and whole latents, which must agree, or frames come out too
    wide: with a quarter of a multiple of 4 latents both are exact.
    """
    names = [name for name in vars(vae) if name.startswith("tile_")] + ["use_tiling"]
    before = {name: getattr(vae, name) for name in names}
    vae.use_tiling = False
    if tile is not None:
        height, width = (-(-side // (4 * SPACE)) * 4 * SPACE for side in tile)
        vae.enable_tiling(height, width, 0.25, 0.25)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


@contextmanager
def _reporting(part: Any, total: int, progress: Progress | None) -> Iterator[None]:
    """Call `progress` after each chunk that the encoder or decoder has done."""
    if progress is None:
        yield
        return
    done = iter(range(1, total + 1))
    handle = part.register_forward_hook(lambda *_: progress(next(done, total), total))
    try:
        yield
    finally:
        handle.remove()


def _chunks(vae: Any, shape: tuple[int, ...], pixels: int, frames: int) -> int:
    """How often the encoder or decoder will run: tiles of the area times chunks of the time."""
    time, height, width = shape[2], shape[3] * pixels, shape[4] * pixels
    rows = columns = 1
    if vae.use_tiling and (height > vae.tile_sample_min_height or width > vae.tile_sample_min_width):
        rows = -(-height // int(vae.tile_sample_min_height * (1 - vae.tile_overlap_factor_height)))
        columns = -(-width // int(vae.tile_sample_min_width * (1 - vae.tile_overlap_factor_width)))
    return rows * columns * max(time // frames, 1)
