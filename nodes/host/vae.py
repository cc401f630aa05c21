"""AutoencoderKLCogVideoX as the host's VAE, for core's VAE Decode, VAE Decode (Tiled) and VAE Encode too.

Images on the host's side are (B, F, H, W, 3) in 0..1; latents are (B, 16, T, h, w), raw: MODEL scales them.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import torch
from torch import Tensor, nn

from ...mimir_core import memory, weights
from ...mimir_core import vae as core
from .latent import CHANNELS
from .report import progress, require_finite

Tiling = Literal["auto", "off", "on"]
TILINGS: tuple[Tiling, ...] = ("auto", "off", "on")
SMALLEST_TILE = 64  # pixels
LAST_TILE = 128  # smaller ones are not tried when memory runs out: they take long and show
SMALLER = "use fewer frames or a smaller size, close what else uses the card, or start ComfyUI with --cpu-vae"


def load_vae(path: Path) -> "CogVideoXVAE":
    """A CogVideoX VAE from a safetensors file or a diffusers folder. ValueError when it is something else."""
    source = weights.read_vae(path, own=True)
    network = core.build_vae(source.config, device="meta")
    network.load_state_dict(source.state, assign=True)
    source.state.clear()  # or changing the precision would hold both
    vae = CogVideoXVAE(network.requires_grad_(False))
    vae.origin = source.origin
    return vae


class FirstStage(nn.Module):
    """The network behind the methods that the host calls; it remembers how the last call was tiled."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.last_tile: tuple[int, int] | None = None

    def decode(self, latents: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """(B, 16, T, h, w) -> (B, 3, F, H, W) in -1..1."""
        self.last_tile = tile
        return core.decode(self.network, latents, tile, progress())

    def encode(self, video: Tensor, tile: tuple[int, int] | None = None) -> Tensor:
        """(B, 3, F, H, W) in -1..1 -> (B, 16, T, h, w)."""
        self.last_tile = tile
        return core.encode(self.network, video, tile=tile, progress=progress())


class CogVideoXVAE(comfy.sd.VAE):
    """The host's VAE around `network`, an AutoencoderKLCogVideoX, which cuts and blends its tiles itself."""

    def __init__(self, network: nn.Module) -> None:
        with _without_warning("No VAE weights detected"):
            super().__init__(sd={})  # every attribute that this host's VAE has, at its default
        self.first_stage_model = FirstStage(network).eval()
        self.origin: dict[str, str] | None = None  # which weights: {"file", "fingerprint"}
        self.latent_dim, self.latent_channels = 3, CHANNELS
        self.upscale_ratio = (core.pixel_frames, core.SPACE, core.SPACE)
        self.downscale_ratio = (core.latent_frames, core.SPACE, core.SPACE)
        self.upscale_index_formula = self.downscale_index_formula = (core.TIME, core.SPACE, core.SPACE)
        self.memory_used_decode = lambda shape, dtype: self._needs(memory.vae_decode, shape, dtype)
        self.memory_used_encode = lambda shape, dtype: self._needs(memory.vae_encode, shape, dtype)
        self.working_dtypes = _dtypes(network)
        self.device, self.output_device = management.vae_device(), management.intermediate_device()
        self.vae_dtype = management.vae_dtype(self.device, self.working_dtypes)
        self.first_stage_model.to(self.vae_dtype)
        self.disable_offload = True  # plain layers: the whole network is on the device, or none of it
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )
        self.size, self.whole = None, False
        self.model_size()

    @property
    def tile(self) -> tuple[int, int]:
        """(height, width) of a tile in pixels, diffusers' choice: half the size of the training videos."""
        network: Any = self.first_stage_model.network
        return network.tile_sample_min_height, network.tile_sample_min_width

    def fits(self, needed: float) -> bool:
        """Whether the device, empty, could hold the weights and `needed` bytes besides."""
        room = memory.USABLE * management.get_total_memory(self.device) - management.extra_reserved_memory()
        return self.model_size() + needed <= room

    def decode_tiled_3d(
        self, samples: Tensor, tile_t: int = 0, tile_x: int = 32, tile_y: int = 32, overlap: Any = None
    ) -> Tensor:
        """The host's tiled path with the network's own tiles, which never cut time: time is causal."""
        tile = (max(tile_y * core.SPACE, SMALLEST_TILE), max(tile_x * core.SPACE, SMALLEST_TILE))
        network = self.first_stage_model

        def run(tile: tuple[int, int]) -> list[Tensor]:
            return [network.decode(part.to(self.device, self.vae_dtype), tile) for part in samples.split(1)]

        parts = self._in_tiles("VAE Decode", tile, run)
        return self.process_output(torch.cat([part.to(self.output_device, torch.float32) for part in parts]))

    def encode_tiled_3d(
        self, samples: Tensor, tile_t: int = 0, tile_x: int = 512, tile_y: int = 512, overlap: Any = None
    ) -> Tensor:
        """The same for encoding, with tiles in pixels."""
        tile = (max(tile_y, SMALLEST_TILE), max(tile_x, SMALLEST_TILE))

        def run(tile: tuple[int, int]) -> list[Tensor]:
            videos = (self.process_input(part).to(self.device, self.vae_dtype) for part in samples.split(1))
            return [self.first_stage_model.encode(video, tile) for video in videos]

        parts = self._in_tiles("VAE Encode", tile, run)
        return torch.cat([part.to(self.output_device, torch.float32) for part in parts])

    @contextmanager
    def only_whole(self, whole: bool) -> Iterator[None]:
        """Inside the block, if `whole`, the host's way out into tiles is closed."""
        self.whole = whole
        try:
            yield
        finally:
            self.whole = False

    def _in_tiles(
        self, stage: str, tile: tuple[int, int], run: Callable[[tuple[int, int]], list[Tensor]]
    ) -> list[Tensor]:
        """What `run` makes in tiles, smaller ones as long as memory runs out. ValueError with what to do."""
        if self.whole:
            raise ValueError(f"{stage}: memory ran out, and tiling is off. Set tiling to auto, or {SMALLER}.")
        while True:
            try:
                return run(tile)
            except Exception as error:
                if not _ran_out(error):
                    raise
            management.soft_empty_cache()  # what the error held is free only here
            if max(tile) <= LAST_TILE:
                message = (
                    f"{stage}: memory ran out, not even in tiles of {tile[1]} x {tile[0]} pixels it fits. "
                )
                raise ValueError(f"{message}{SMALLER.capitalize()}.")
            tile = (max(tile[0] // 2, SMALLEST_TILE), max(tile[1] // 2, SMALLEST_TILE))

    def get_sd(self) -> dict[str, Tensor]:
        """For core's VAE Save: the published key names."""
        return self.first_stage_model.network.state_dict()

    def needs(self, shape: tuple[int, ...], tile: tuple[int, int] | None, encoding: bool = False) -> int:
        """Bytes besides the weights for one latent or video of a batch (B, C, frames, height, width)."""
        return self._needs(memory.vae_encode if encoding else memory.vae_decode, shape, self.vae_dtype, tile)

    def _needs(
        self,
        count: Callable[..., int],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        tile: tuple[int, int] | None = None,
    ) -> int:
        network: Any = self.first_stage_model.network
        return count(network.config, shape[2:], management.dtype_size(dtype), tile, lays_out=True)


def _ran_out(error: Exception) -> bool:
    """Whether a device had no memory left; 0.33 knows more forms of it."""
    known = getattr(management, "is_oom", None)
    return bool(known(error)) if known else isinstance(error, management.OOM_EXCEPTION)


def _dtypes(network: nn.Module) -> list[torch.dtype]:
    """What the host may choose from. A toy is exact at no cost; the real one was published in 16 bit."""
    toy = sum(parameter.numel() for parameter in network.parameters()) < 20_000_000
    return [torch.float32] if toy else [torch.bfloat16, torch.float16, torch.float32]


def decode(vae: comfy.sd.VAE, latents: Tensor, tiling: Tiling) -> tuple[Tensor, str]:
    """Latents (B, C, T, h, w) -> frames (B F, H, W, 3), and a sentence on how."""
    if not isinstance(vae, CogVideoXVAE):
        frames = vae.decode_tiled(latents, 32, 32, 8) if tiling == "on" else vae.decode(latents)
        return frames.flatten(0, -4), "Decoded by another VAE than Mimir's."
    if latents.ndim != 5 or latents.shape[1] != CHANNELS:
        raise ValueError(
            f"VAE Decode got the shape {tuple(latents.shape)}, but CogVideoX's have (batch, {CHANNELS}, "
            "frames, height, width). Connect the latent of Mimir DiT Sampler, or the VAE that made this one."
        )
    _require_finite_latent(latents)
    needed = vae.memory_used_decode(latents.shape, vae.vae_dtype)
    tile = vae.tile if tiling == "on" or (tiling == "auto" and not vae.fits(needed)) else None
    with vae.only_whole(tiling == "off"):
        frames = vae.decode(latents, vae_options={"tile": tile})  # the host falls back to decode_tiled_3d
    require_finite(frames, "VAE Decode", "Start ComfyUI with --fp32-vae, or choose the VAE of this model.")
    return frames.flatten(0, -4), _report("Decoded", vae.first_stage_model.last_tile, tile)


def _require_finite_latent(latents: Tensor) -> None:
    """ValueError when not the VAE but what ran before it went wrong."""
    if not bool(latents.isfinite().all()):
        raise ValueError(
            "VAE Decode got a latent with NaN or infinity, so it was not the VAE: look at the model, its "
            "dtype, a LoRA and the settings of the sampler that made it."
        )


def encode(vae: comfy.sd.VAE, frames: Tensor, tiling: Tiling) -> tuple[Tensor, str]:
    """Frames (F, H, W, 3) of one video -> latents (1, C, T, h, w), and a sentence on how."""
    _check_video(frames)
    pixels = frames[..., :3]
    if not isinstance(vae, CogVideoXVAE):
        return vae.encode(pixels), "Encoded by another VAE than Mimir's."
    shape = (1, 3, *frames.shape[:3])
    needed = vae.memory_used_encode(shape, vae.vae_dtype)
    if tiling == "on" or (tiling == "auto" and not vae.fits(needed)):
        height, width = vae.tile
        management.load_models_gpu([vae.patcher], memory_required=vae.needs(shape, vae.tile, encoding=True))
        latents = vae.encode_tiled_3d(pixels.movedim(-1, 0)[None], tile_x=width, tile_y=height)
        return latents, _report("Encoded", vae.first_stage_model.last_tile, vae.tile)
    with vae.only_whole(tiling == "off"):
        latents = vae.encode(pixels)
    return latents, _report("Encoded", vae.first_stage_model.last_tile, None)


def _check_video(frames: Tensor) -> None:
    """ValueError with everything that is wrong with the video, and what to do about it."""
    count, height, width = frames.shape[:3]
    sides = (_problem(core.check_size, width, 16), _problem(core.check_size, 16, height))
    size, length = "; ".join(filter(None, sides)), _problem(core.check_frames, count)
    found = [f"{size}. Scale or crop the images (nodes ImageScale, ImageCrop)."] if size else []
    found += [f"{length}. Take that many of them (node ImageFromBatch)."] if length else []
    if found:
        raise ValueError("VAE Encode: " + " ".join(found))


def _problem(check: Callable[..., None], *values: int) -> str:
    """What `check` raises for these values, or an empty string."""
    try:
        check(*values)
    except ValueError as error:
        return str(error)
    return ""


def _report(done: str, used: tuple[int, int] | None, wanted: tuple[int, int] | None) -> str:
    if used is None:
        return f"{done} whole."
    reason = "" if used == wanted else ", because memory ran out"
    return f"{done} in tiles of {used[1]} x {used[0]} pixels{reason}."


@contextmanager
def _without_warning(text: str) -> Iterator[None]:
    """Keeps one expected warning of the host's root logger out of the log."""

    def other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logging.getLogger().addFilter(other)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(other)
