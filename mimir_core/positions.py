"""Where a token is: the 3D sin-cos table of CogVideoX-2B and the 3D rotary table of 5B and 1.5.

Source: the formulas of diffusers (`get_3d_sincos_pos_embed`, `get_3d_rotary_pos_embed`,
`get_resize_crop_region_for_grid`; Apache-2.0), written anew. Differences:
- text tokens are part of the rotary table, with rotation 0, so that a joint sequence is turned in one go
  (leaving them out takes a copy, which costs more than turning them);
- a text of any length, and a 1.5 grid of any size.

A grid is (T, H, W) in tokens; N = T * H * W; D head width. Tables are float32 on the CPU.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import DiTConfig

Grid = tuple[int, int, int]
COMPLEX_DEVICES = {"cpu", "cuda"}


class Rotary(NamedTuple):
    """What `rotate` turns a joint sequence of L tokens with; row l turns every head of token l.

    The same angles in two forms. Real: cosines and signed sines, (L, 1, D) each, which a compiler fuses with
    the norm before them. Complex: `turn` (L, 1, D / 2), a single pass over memory where nothing is compiled;
    None on devices whose complex arithmetic cannot be relied on.
    """

    cos: Tensor
    sin: Tensor
    turn: Tensor | None

    def to(self, device: torch.device) -> "Rotary":
        cos, sin = self.cos.to(device), self.sin.to(device)
        turn = self.turn.to(device) if self.turn is not None and device.type in COMPLEX_DEVICES else None
        return Rotary(cos, sin, turn)


def rotate(x: Tensor, rope: Rotary) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its angle, in float32. x: (B, L, H, D) -> same shape and dtype."""
    if rope.turn is None or torch.compiler.is_compiling():  # inductor cannot fuse complex numbers
        return rotate_real(x, rope)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, L, H, D / 2)
    return torch.view_as_real(pairs * rope.turn).flatten(-2).to(x.dtype)


def rotate_real(x: Tensor, rope: Rotary) -> Tensor:
    """The reference of `rotate`, without complex numbers."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * rope.cos, swapped.to(rope.sin.dtype), rope.sin).to(x.dtype)


def rotary_table(config: DiTConfig, grid: Grid, text_length: int) -> Rotary:
    """The table of a joint sequence, text first: L = text_length + N."""
    d = config.attention_head_dim
    parts = (d // 4, d // 8 * 3, d // 8 * 3)
    axes = [_angles(axis, size) for axis, size in zip(_rotary_positions(config, grid), parts, strict=True)]
    angles = _outer_concatenation(axes)  # (N, D / 2)
    angles = torch.cat((angles.new_zeros(text_length, angles.shape[1]), angles))  # (L, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return Rotary(_interleave(cos, cos), _interleave(-sin, sin), torch.complex(cos, sin)[:, None])


def time_rates(count: int, device: torch.device) -> Tensor:
    """Frequencies of the time embedding, 10000^(-i / count): (count,) float32."""
    steps = torch.arange(count, device=device, dtype=torch.float32)
    return torch.exp(steps * (-math.log(10000.0) / count))


def sincos_table(config: DiTConfig, grid: Grid) -> Tensor:
    """What 2B adds to its video tokens: (N, width), a quarter of it for time, 3/8 for x and 3/8 for y."""
    frames, height, width = grid
    time = torch.arange(frames, dtype=torch.float64) / config.temporal_interpolation_scale
    y = torch.arange(height, dtype=torch.float64) / config.spatial_interpolation_scale
    x = torch.arange(width, dtype=torch.float64) / config.spatial_interpolation_scale
    t, y, x = torch.meshgrid(time, y, x, indexing="ij")
    size = config.width
    waves = [_sincos(t, size // 4), _sincos(x, size // 8 * 3), _sincos(y, size // 8 * 3)]
    return torch.cat(waves, dim=-1).float()


def _rotary_positions(config: DiTConfig, grid: Grid) -> list[Tensor]:
    """Positions along time, height, width. 1.0 stretches its native grid over a crop; 1.5 counts from 0."""
    if config.patch_size_t is not None:
        return [torch.arange(size, dtype=torch.float32) for size in grid]
    frames, height, width = grid
    (top, left), (bottom, right) = crop_region(
        height, width, config.sample_height // config.patch_size, config.sample_width // config.patch_size
    )
    time = torch.arange(frames, dtype=torch.float32)
    return [time, _spread(top, bottom, height), _spread(left, right, width)]


def crop_region(
    height: int, width: int, base_height: int, base_width: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where a grid lies in the native one: ((top, left), (bottom, right)), centred, aspect kept."""
    if height / width > base_height / base_width:
        new_height, new_width = base_height, round(base_height / height * width)
    else:
        new_height, new_width = round(base_width / width * height), base_width
    top, left = round((base_height - new_height) / 2), round((base_width - new_width) / 2)
    return (top, left), (top + new_height, left + new_width)


def _spread(start: int, stop: int, count: int) -> Tensor:
    """`count` positions; the last is stop * (count - 1) / count even if start is not 0, as in diffusers."""
    return torch.linspace(start, stop * (count - 1) / count, count, dtype=torch.float32)


def _angles(positions: Tensor, size: int) -> Tensor:
    """(M,) positions -> (M, size / 2) angles, RoFormer's frequencies 10000^(-2i / size)."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return torch.outer(positions, frequencies)


def _outer_concatenation(axes: list[Tensor]) -> Tensor:
    """[(T, a), (H, b), (W, c)] -> (T * H * W, a + b + c)."""
    t, h, w = axes
    frames, height, width = len(t), len(h), len(w)
    t = t[:, None, None].expand(-1, height, width, -1)
    h = h[None, :, None].expand(frames, -1, width, -1)
    w = w[None, None].expand(frames, height, -1, -1)
    return torch.cat((t, h, w), dim=-1).flatten(0, 2)


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    return torch.stack((even, odd), dim=-1).flatten(-2)[:, None]  # (L, 1, D)


def _sincos(positions: Tensor, size: int) -> Tensor:
    """Any shape of M positions -> (M, size): sines, then cosines, of frequencies 10000^(-2i / size)."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(size // 2, dtype=torch.float64) / (size / 2))
    angles = torch.outer(positions.flatten(), frequencies)
    return torch.cat((angles.sin(), angles.cos()), dim=1)
