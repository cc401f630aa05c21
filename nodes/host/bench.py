"""The host's contestants for mimir_core.bench: its own CogVideoX, and our DiT with the host's attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.ops
import torch
from torch import Tensor

from ...mimir_core.bench.rivals import Missing, Model, guarded, ours
from ...mimir_core.bench.shapes import Shape
from ...mimir_core.config import DiTConfig
from ...mimir_core.recognise import to_comfy
from . import attention

NATIVE = "ComfyUI's CogVideoX"
OPS = comfy.ops.disable_weight_init


def models(shape: Shape, state: Mapping[str, Tensor]) -> Sequence[Model | Missing]:
    """`mimir_core.bench.rivals.Builder` of this host."""
    chosen = attention.host.optimized_attention.__name__.removeprefix("attention_")
    in_host = ours(shape, state, attention.host_attention, OPS)
    build = lambda: Model(NATIVE, native(shape, state), f"host: {chosen}", note=native_note(shape))
    return [
        Model("ours", in_host, f"host: {chosen}"),
        guarded(NATIVE, build, attention=f"host: {chosen}"),
    ]


def native(shape: Shape, state: Mapping[str, Tensor]) -> Any:
    """The host's own model around the given weights, with rotary positions put right where possible."""
    try:
        from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel
    except ImportError as error:
        raise ImportError("this ComfyUI has no CogVideoX of its own (0.33 has one)") from error
    dtype = state["proj_out.weight"].dtype
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**settings(shape.config), dtype=dtype, operations=OPS)
    model.load_state_dict({to_comfy(name): value for name, value in state.items()}, strict=True, assign=True)
    if shape.config.use_rotary_positional_embeddings:
        model.spatial_interpolation_scale = 1.0
    return model.eval()


def settings(config: DiTConfig) -> dict[str, Any]:
    """The host's arguments of the same names; it has no attention_bias and no norm_eps."""
    shared = (
        "num_attention_heads attention_head_dim in_channels out_channels time_embed_dim text_embed_dim "
        "num_layers sample_width sample_height sample_frames patch_size patch_size_t "
        "temporal_compression_ratio max_text_seq_length spatial_interpolation_scale "
        "temporal_interpolation_scale use_rotary_positional_embeddings patch_bias"
    ).split()
    return {name: getattr(config, name) for name in shared}


def native_note(shape: Shape) -> str:
    """What keeps its output from being comparable, if anything does."""
    config = shape.config
    if not config.use_rotary_positional_embeddings:
        return "other sin-cos positions"
    if config.patch_size_t is not None:
        return ""
    if shape.latents[1:] != (config.sample_height, config.sample_width):
        return "spatial_interpolation_scale set to 1.0; other positions at this size"
    return "spatial_interpolation_scale set to 1.0"
