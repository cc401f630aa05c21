"""The CogVideoX video transformer: text and video tokens in one unmasked attention, modulated by time.

Source: the architecture of diffusers' `CogVideoXTransformer3DModel` (Apache-2.0), written anew; the parameter
names are equal, so published checkpoints load without renaming. Differences:
- latents are (B, C, T, H, W), not (B, T, C, H, W);
- positions are computed from the latents' size and cached, the caller passes none; any text length;
- `ops` and `attention` are injected; no learned positions, no `ofs`: those belong to image-to-video models.

Letters: B batch, C latent channels, T latent frames, H x W latent size, n text tokens, N video tokens,
L = n + N, D width, h heads, d head width.
"""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, sdpa
from .config import DiTConfig
from .positions import Grid, Rotary, rotary_table, rotate, sincos_table, time_rates

Options = Mapping[str, Any] | None


class CogVideoXTransformer(nn.Module):
    def __init__(
        self,
        config: DiTConfig,
        ops: Any = nn,
        attention: Attention = sdpa,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype or torch.get_default_dtype()
        made = {"device": device, "dtype": dtype}
        width, time = config.width, config.time_embed_dim
        self.patch_embed = PatchEmbed(config, ops, **made)
        self.time_embedding = TimeEmbedding(width, time, ops, **made)
        self.transformer_blocks = nn.ModuleList(
            Block(config, ops, attention, **made) for _ in range(config.num_layers)
        )
        self.norm_final = ops.LayerNorm(width, eps=config.norm_eps, **made)
        self.norm_out = ModulatedOutput(width, time, config.norm_eps, ops, **made)
        self.proj_out = ops.Linear(width, config.out_channels * _patch_volume(config), **made)
        self._cached: tuple[Any, Tensor | Rotary] | None = None

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, options: Options = None) -> Tensor:
        """Predict the velocity of `latents`.

        latents (B, C, T, H, W), timestep (B,) in 0..999, text (B, n, text_embed_dim) -> like `latents`.
        T, H and W must be multiples of the patch sizes. `options` goes to the attention function untouched.
        """
        self._check(latents, text)
        grid = self.grid(latents)
        temb = self.time_embedding(timestep, latents.dtype)  # (B, time_embed_dim)
        video, text = self.patch_embed(latents, text)  # (B, N, D), (B, n, D)
        rope = None
        if self.config.use_rotary_positional_embeddings:
            rope = self._rotary(grid, operator.index(text.shape[1]), video.device)  # tables of L rows
        else:
            video = video + self._sincos(grid, video.device, video.dtype)  # (B, N, D)
        video = self.run_blocks(video, text, temb, rope, options)  # (B, N, D)
        video = self.norm_out(self.norm_final(video), temb)  # (B, N, D)
        return unpatchify(self.proj_out(video), grid, self.config)  # (B, C, T, H, W)

    def run_blocks(
        self, video: Tensor, text: Tensor, temb: Tensor, rope: Rotary | None, options: Options
    ) -> Tensor:
        """The block loop by itself, for a host that wraps or replaces single blocks. -> video (B, N, D)."""
        for block in self.transformer_blocks:
            video, text = block(video, text, temb, rope, options)
        return video

    def grid(self, latents: Tensor) -> Grid:
        """Tokens along time, height and width. `index`: plain numbers, also where sizes are traced."""
        frames, height, width = map(operator.index, latents.shape[2:])
        patch = self.config.patch_size
        return frames // (self.config.patch_size_t or 1), height // patch, width // patch

    def init_weights(self) -> None:
        """Initialise for training from scratch.

        | tensor | init |
        |---|---|
        | every Linear and the patch convolution | Xavier uniform, bias 0 |
        | time embedding | normal, std 0.02, bias 0 |
        | modulation (`norm*.linear`) | 0: each block starts as the identity |
        | `proj_out` | 0: the first prediction is 0 |
        | norms | weight 1, bias 0 |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                _init_linear(name, module)

    def _rotary(self, grid: Grid, text_length: int, device: torch.device) -> Rotary:
        if torch.compiler.is_compiling():
            cos, sin = self._rotary_constant(grid, text_length, device).unbind(0)
            return Rotary(cos, sin, None)
        key = ("rotary", grid, text_length, device)
        return self._remember(key, lambda: rotary_table(self.config, grid, text_length).to(device))

    # The two tables are constants of a compiled graph: neither computed again nor a reason to recompile.
    @torch.compiler.assume_constant_result
    def _rotary_constant(self, grid: Grid, text_length: int, device: torch.device) -> Tensor:
        """Cosines and signed sines: (2, L, 1, d). (A constant must be one tensor.)"""
        with torch.inference_mode(False):
            rope = rotary_table(self.config, grid, text_length)
            return torch.stack((rope.cos, rope.sin)).to(device)

    @torch.compiler.assume_constant_result
    def _sincos(self, grid: Grid, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = ("sincos", grid, device, dtype)
        return self._remember(key, lambda: sincos_table(self.config, grid).to(device, dtype))

    def _remember(self, key: Any, build: Any) -> Any:
        """The last table, rebuilt when `key` changes. Not an inference tensor: training may use it later."""
        if self._cached is None or self._cached[0] != key:
            with torch.inference_mode(False):
                self._cached = (key, build())
        return self._cached[1]

    def _check(self, latents: Tensor, text: Tensor) -> None:
        config, found = self.config, tuple(latents.shape)
        patches = (config.patch_size_t or 1, config.patch_size, config.patch_size)
        if latents.ndim != 5 or found[1] != config.in_channels:
            raise ValueError(f"latents have shape {found}, expected (B, {config.in_channels}, T, H, W)")
        if any(size % patch for size, patch in zip(found[2:], patches, strict=True)):
            raise ValueError(f"latent size (T, H, W) is {found[2:]}, expected multiples of {patches}")
        if text.ndim != 3 or text.shape[-1] != config.text_embed_dim:
            expected = f"(B, n, {config.text_embed_dim}): was the prompt encoded with another text encoder?"
            raise ValueError(f"text conditioning has shape {tuple(text.shape)}, expected {expected}")


class PatchEmbed(nn.Module):
    """Latents and text to tokens. 1.0 patchifies with a convolution, 1.5 with a Linear over (C, t, p, p)."""

    def __init__(self, config: DiTConfig, ops: Any, **made: Any) -> None:
        super().__init__()
        self.config = config
        channels, patch = config.in_channels, config.patch_size
        if config.patch_size_t is None:
            self.proj = ops.Conv2d(
                channels, config.width, patch, stride=patch, bias=config.patch_bias, **made
            )
        else:  # always with a bias: diffusers ignores patch_bias here, and the published files have one
            self.proj = ops.Linear(channels * _patch_volume(config), config.width, **made)
        self.text_proj = ops.Linear(config.text_embed_dim, config.width, **made)

    def forward(self, latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text = self.text_proj(text)  # (B, n, D)
        if self.config.patch_size_t is not None:
            return self.proj(patchify(latents, self.config)), text  # (B, N, D), (B, n, D)
        frames = latents.transpose(1, 2)  # (B, T, C, H, W)
        video = self.proj(frames.flatten(0, 1))  # (B T, D, H / p, W / p)
        video = video.flatten(2).transpose(1, 2)  # (B T, N / T, D)
        return video.reshape(latents.shape[0], -1, video.shape[-1]), text  # (B, N, D), (B, n, D)


class TimeEmbedding(nn.Module):
    """Sinusoid in float32, then Linear, SiLU, Linear, and the SiLU that every modulation starts with."""

    def __init__(self, width: int, time: int, ops: Any, **made: Any) -> None:
        super().__init__()
        self.width = width
        self._cached: Tensor | None = None
        self.linear_1 = ops.Linear(width, time, **made)
        self.linear_2 = ops.Linear(time, time, **made)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        angles = timestep.float()[:, None] * self._rates(timestep.device)  # (B, width / 2)
        wave = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)  # (B, width)
        return F.silu(self.linear_2(F.silu(self.linear_1(wave))))  # (B, time)

    @torch.compiler.assume_constant_result
    def _rates(self, device: torch.device) -> Tensor:
        if self._cached is None or self._cached.device != device:
            with torch.inference_mode(False):
                self._cached = time_rates(self.width // 2, device)
        return self._cached


class Block(nn.Module):
    """Attention and feed-forward over the joint sequence; each stream has its own shift, scale and gate."""

    def __init__(self, config: DiTConfig, ops: Any, attention: Attention, **made: Any) -> None:
        super().__init__()
        modulation = (config.width, config.time_embed_dim, config.norm_eps, ops)
        self.norm1 = ModulatedNorm(*modulation, **made)
        self.attn1 = JointAttention(config, ops, attention, **made)
        self.norm2 = ModulatedNorm(*modulation, **made)
        self.ff = FeedForward(config.width, ops, **made)

    def forward(
        self, video: Tensor, text: Tensor, temb: Tensor, rope: Rotary | None, options: Options = None
    ) -> tuple[Tensor, Tensor]:
        joint, gates = self.norm1(video, text, temb)
        video, text = gates.add(video, text, self.attn1(joint, rope, options))
        joint, gates = self.norm2(video, text, temb)
        return gates.add(video, text, self.ff(joint))


class Gates(NamedTuple):
    """How much of an update each stream takes; (B, 1, D) each."""

    video: Tensor
    text: Tensor

    def add(self, video: Tensor, text: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """update: (B, n + N, D), text first."""
        text_update, video_update = update.split((text.shape[1], video.shape[1]), dim=1)
        return torch.addcmul(video, self.video, video_update), torch.addcmul(text, self.text, text_update)


class ModulatedNorm(nn.Module):
    """LayerNorm of both streams with shift and scale from the timestep; one Linear makes all six vectors."""

    def __init__(self, width: int, time: int, eps: float, ops: Any, **made: Any) -> None:
        super().__init__()
        self.linear = ops.Linear(time, 6 * width, **made)
        self.norm = ops.LayerNorm(width, eps=eps, **made)

    def forward(self, video: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Gates]:
        shift, scale, gate, text_shift, text_scale, text_gate = self.linear(temb)[:, None].chunk(6, dim=-1)
        joint = modulate_and_join(self.norm(text), text_shift, text_scale, self.norm(video), shift, scale)
        return joint, Gates(gate, text_gate)


def modulate_and_join(
    text: Tensor, text_shift: Tensor, text_scale: Tensor, video: Tensor, shift: Tensor, scale: Tensor
) -> Tensor:
    """x (1 + scale) + shift of both streams, in one tensor (B, n + N, D), text first."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # the reference, which a compiler fuses
        text = torch.addcmul(text_shift, text, 1 + text_scale)
        return torch.cat((text, torch.addcmul(shift, video, 1 + scale)), dim=1)
    length = text.shape[1]
    joint = video.new_empty(video.shape[0], length + video.shape[1], video.shape[2])
    torch.addcmul(text_shift, text, 1 + text_scale, out=joint[:, :length])
    torch.addcmul(shift, video, 1 + scale, out=joint[:, length:])
    return joint


class ModulatedOutput(nn.Module):
    def __init__(self, width: int, time: int, eps: float, ops: Any, **made: Any) -> None:
        super().__init__()
        self.linear = ops.Linear(time, 2 * width, **made)
        self.norm = ops.LayerNorm(width, eps=eps, **made)

    def forward(self, video: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(temb)[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(video), 1 + scale)


class JointAttention(nn.Module):
    """Unmasked attention over text and video; queries and keys are normalised, then get their positions."""

    def __init__(self, config: DiTConfig, ops: Any, attention: Attention, **made: Any) -> None:
        super().__init__()
        self.heads, self.attention = config.num_attention_heads, attention
        self.to_q = ops.Linear(config.width, config.width, bias=config.attention_bias, **made)
        self.to_k = ops.Linear(config.width, config.width, bias=config.attention_bias, **made)
        self.to_v = ops.Linear(config.width, config.width, bias=config.attention_bias, **made)
        self.norm_q = ops.LayerNorm(config.attention_head_dim, eps=1e-6, **made)
        self.norm_k = ops.LayerNorm(config.attention_head_dim, eps=1e-6, **made)
        self.to_out = nn.ModuleList([ops.Linear(config.width, config.width, **made)])

    def forward(self, x: Tensor, rope: Rotary | None, options: Options = None) -> Tensor:
        q = self.norm_q(self.to_q(x).unflatten(-1, (self.heads, -1)))  # (B, L, h, d)
        k = self.norm_k(self.to_k(x).unflatten(-1, (self.heads, -1)))  # (B, L, h, d)
        v = self.to_v(x).unflatten(-1, (self.heads, -1))  # (B, L, h, d)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, h, L, d), views
        return self.to_out[0](
            self.attention(q, k, v, options=options).transpose(1, 2).flatten(2)
        )  # (B, L, D)


class FeedForward(nn.Module):
    def __init__(self, width: int, ops: Any, **made: Any) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(width, 4 * width, ops, **made), nn.Identity()])
        self.net.append(ops.Linear(4 * width, width, **made))  # net.2, as in the published files

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class GELU(nn.Module):
    def __init__(self, width: int, inner: int, ops: Any, **made: Any) -> None:
        super().__init__()
        self.proj = ops.Linear(width, inner, **made)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.proj(x)  # (B, L, inner)
        if torch.is_grad_enabled():
            return F.gelu(hidden, approximate="tanh")
        return torch.ops.aten.gelu_(hidden, approximate="tanh")  # in place: the largest tensor exists once


def patchify(latents: Tensor, config: DiTConfig) -> Tensor:
    """(B, C, T, H, W) -> (B, N, C * t * p * p): the Linear patches of 1.5."""
    t, p = config.patch_size_t or 1, config.patch_size
    x = latents.unflatten(4, (-1, p)).unflatten(3, (-1, p)).unflatten(2, (-1, t))
    # (B, C, T/t, t, H/p, p, W/p, p) -> (B, T/t, H/p, W/p, C, t, p, p)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: Grid, config: DiTConfig) -> Tensor:
    """(B, N, C * t * p * p) -> (B, C, T, H, W)."""
    t, p = config.patch_size_t or 1, config.patch_size
    x = tokens.unflatten(1, grid).unflatten(-1, (-1, t, p, p))  # (B, T/t, H/p, W/p, C, t, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def _patch_volume(config: DiTConfig) -> int:
    return config.patch_size**2 * (config.patch_size_t or 1)


def _init_linear(name: str, module: nn.Linear | nn.Conv2d) -> None:
    if name.endswith(("norm1.linear", "norm2.linear", "norm_out.linear")) or name == "proj_out":
        nn.init.zeros_(module.weight)
    elif name.startswith("time_embedding"):
        nn.init.normal_(module.weight, std=0.02)
    else:
        nn.init.xavier_uniform_(module.weight.flatten(1))
    if module.bias is not None:
        nn.init.zeros_(module.bias)
