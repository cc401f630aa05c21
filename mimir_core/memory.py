"""How much memory each stage takes, in bytes: pure arithmetic on configurations, nothing is loaded.

A stage needs its weights, and what it computes with: the tensors that live at once at its busiest moment.
Each function says which moment that is and counts them; tests/test_memory.py compares the counts with a trace
of the networks at real sizes, tests/host/inprocess/test_plan.py with the peak of a process that runs them.

Letters as in dit.py and vae.py; `size` is the number of bytes of one value (2 for bfloat16, 4 for float32).
Kernels may take work space of their own, which is not counted, except where `lays_out` and `scores` say so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import DiTConfig, FuserConfig, PhiConfig, T5Config
from .phi import ROWS
from .vae import CHUNK, SPACE, TIME, latent_frames, pixel_frames

GB = 10**9
HOST_UNIT = (
    0.01 * 1024 * 1024
)  # bytes: ComfyUI's memory_usage_factor is activations per latent pixel over this
USABLE = 0.95  # of a card: a desktop and the driver take the rest
LARGE_CONVOLUTION = 2**30  # values: diffusers cuts larger inputs into pieces


def dit_tokens(config: DiTConfig, latent: Sequence[int], text: int) -> int:
    """L = text + video tokens of a latent (T, h, w); 1.5 pads T to a multiple of its temporal patch."""
    frames, height, width = latent
    time = config.patch_size_t or 1
    return text + -(-frames // time) * (height // config.patch_size) * (width // config.patch_size)


def dit_per_token(config: DiTConfig, size: int) -> int:
    """Bytes of one token at the busiest moment of a block. In tensors of the model's width:

    - feed-forward: the first block's input, this block's input, both streams after attention, the joined
      normed sequence, the hidden layer (4, GELU in place) and the update: 9;
    - turning the keys: first input, this block's input, the normed sequence, queries before and after, keys,
      values: 7, and in float32 the product and, for 16 bit, the copy that is turned; then the turned keys.
    """
    fed = 9 * size
    turned = 7 * size + (4 if size == 4 else 4 + 4 + size)
    return config.width * (max(fed, turned) if config.use_rotary_positional_embeddings else fed)


def dit(config: DiTConfig, latent: Sequence[int], batch: int, text: int, size: int, scores: int = 0) -> int:
    """One step of `batch` items (classifier-free guidance counts twice) on a latent (T, h, w).

    scores: what the attention kernel holds beyond queries, keys, values and output (see `chunked_scores`);
    such a kernel also copies the three. To that come rotary tables (cosines, sines and both as complex
    numbers, float32) and about ten float32 latents of the sampler.
    """
    tokens = dit_tokens(config, latent, text)
    block = batch * tokens * dit_per_token(config, size)
    if scores:
        block = max(block, batch * tokens * config.width * 10 * size + scores)
    rotary = tokens * config.attention_head_dim * 3 * 4 if config.use_rotary_positional_embeddings else 0
    frames, height, width = latent
    return block + rotary + 10 * 4 * batch * config.in_channels * frames * height * width


def host_factor(config: DiTConfig) -> float:
    """ComfyUI's memory_usage_factor: `dit_per_token` in 16 bit, per latent pixel, in the host's unit."""
    pixels = config.patch_size**2 * (config.patch_size_t or 1)
    return dit_per_token(config, 2) / 2 / pixels / HOST_UNIT


def chunked_scores(rows: int, tokens: int, size: int, free: float) -> int:
    """Scores of ComfyUI's 'sub quad' attention (a CPU's default): `rows` = batch x heads, all keys at once.

    It takes the most queries at once, 4096 at most, whose scores would fit four times into `free` bytes; the
    softmax makes a second copy.
    """
    chunks = (4096, 2048, 1024, 512, 256)
    queries = next((n for n in chunks if free / (rows * size * n * 4.0) >= tokens), 512)
    return 2 * rows * min(queries, tokens) * tokens * size


def t5(config: T5Config, tokens: int, stored: int) -> int:
    """The host's T5, which computes in float32 and turns one matrix of `stored` bytes at a time into it.

    Four tensors of the feed-forward's width, three of the model's, scores with their bias and softmax (4).
    """
    cast = 0 if stored == 4 else 4 * config.d_model * config.d_ff
    values = tokens * (3 * config.d_model + 4 * config.d_ff) + 4 * config.num_heads * tokens**2
    return cast + 4 * values


def phi(config: PhiConfig, tokens: int, size: int, stored: int) -> int:
    """Reading `tokens` (template, prompt, instruction, answer) and answering, computed with `size` bytes.

    Keys and values of every layer three times (what all sequences share, the answer's, an instruction's); the
    feed-forward's gate and up (2), activation and product, and four tensors of the model's width; the mask of
    at most ROWS queries; the largest matrix, cast where it is stored otherwise.
    """
    keys = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    values = tokens * (3 * keys + 4 * config.intermediate_size + 4 * config.hidden_size)
    mask = min(tokens, ROWS) * tokens * (size + 2)
    matrix = config.hidden_size * max(2 * config.intermediate_size, config.vocab_size)
    return values * size + mask + (0 if stored == size else matrix * size)


def fuser(config: FuserConfig, text: int, llm: int) -> int:
    """Float32: text, its residual, the branch, its padding, the sum, the result; the normed tokens twice."""
    return 4 * (6 * (text + config.num_instructions) * config.text_dim + 2 * llm * config.llm_dim)


@dataclass(frozen=True)
class _Coder:
    """What both halves of a VAE are counted from."""

    widths: tuple[int, ...]  # channels at full size first
    layers: int
    latent: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "_Coder":
        widths = tuple(config.get("block_out_channels", (128, 256, 256, 512)))
        return cls(widths, config.get("layers_per_block", 3), config.get("latent_channels", 16))


def vae_decode(
    config: Mapping[str, Any],
    latent: Sequence[int],
    size: int,
    tile: tuple[int, int] | None = None,
    lays_out: bool = False,
) -> int:
    """Decoding one latent (T, h, w), whole or in tiles (height, width) of pixels; see `build_vae`.

    The busiest moment is the first convolution at full size, from Cin to Cout channels: its block's input,
    the normed and activated input, that with two frames of the chunk before in front, the two frames to keep,
    and the output. In a short video it may be the last such convolution instead. To that come the two frames
    that all other convolutions have kept, and the frames that are done.
    lays_out: the kernel copies the input into a layout of its own, as PyTorch does on a CPU (measured) and
    cuDNN on a card (taken to be so, not measured).
    """
    coder, (frames, height, width) = _Coder.of(config), latent
    area, kept, blended = _areas(height * SPACE, width * SPACE, tile)
    wide, narrow = coder.widths[1], coder.widths[0]
    late = _decoder_caches(coder)
    early = late - 2 * (wide + 2 * (coder.layers + 1) * narrow)
    first, rest = pixel_frames(min(frames, CHUNK + frames % 2)), TIME * CHUNK if frames > 3 else 0
    moments = (
        _working(first, 2 * wide + narrow, wide, narrow, area, lays_out) + early,
        _working(first, wide + 3 * narrow, narrow, narrow, area, lays_out) + late,
        _working(rest, 2 * wide + narrow, wide, narrow, area, lays_out) + late,
    )
    done = 3 * pixel_frames(frames)
    return int(size * max(area * max(moments) + done * kept, done * blended))


def vae_encode(
    config: Mapping[str, Any],
    video: Sequence[int],
    size: int,
    tile: tuple[int, int] | None = None,
    lays_out: bool = False,
) -> int:
    """Encoding one video (F, H, W), as `vae_decode`: the busiest moment is a convolution of the first block.

    There the input of the first block and of its last layer, the activated input and the output have the same
    width; the video itself waits in the same precision.
    """
    coder, (frames, height, width) = _Coder.of(config), video
    area, _, _ = _areas(height, width, tile)
    channels = coder.widths[0]
    held = (4 if coder.layers > 1 else 3) * channels
    first, rest = min(frames, TIME * CHUNK + 1), TIME * CHUNK if frames > TIME * CHUNK + 1 else 0
    moments = (
        _working(first, held, channels, channels, area, lays_out) + 2 * (3 + 2 * coder.layers * channels),
        _working(rest, held, channels, channels, area, lays_out) + _encoder_caches(coder),
    )
    return int(size * (area * max(moments) + 3 * frames * height * width))


def latent_of(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """(T, h, w) of a video in pixels."""
    return latent_frames(frames), height // SPACE, width // SPACE


def _working(frames: int, held: int, read: int, written: int, area: float, lays_out: bool) -> float:
    """Values per pixel at a convolution of `read` to `written` channels while `held` channels wait."""
    if not frames:
        return 0.0
    joined = (frames + 2) * read
    values = frames * held + joined + 2 * read
    if joined * area > LARGE_CONVOLUTION:
        return values + joined + frames * written  # the pieces, and their outputs before they are joined
    return values + (joined if lays_out else 0)


def _areas(height: int, width: int, tile: tuple[int, int] | None) -> tuple[float, float, float]:
    """Pixels of the part that is worked on, of all parts that are kept, and of the blending at the end."""
    if tile is None or (height <= tile[0] and width <= tile[1]):
        return float(height * width), float(height * width), 2.0 * height * width
    sides = [-(-side // (4 * SPACE)) * 4 * SPACE for side in tile]
    spans = [_span(total, side) for total, side in zip((height, width), sides, strict=True)]
    kept = spans[0] * spans[1]
    part = min(sides[0], height) * min(sides[1], width)
    return float(part), float(kept), kept + 2.0 * height * width


def _span(total: int, side: int) -> int:
    """Pixels along one axis of all tiles together: they start three quarters of a tile apart."""
    return sum(min(side, total - start) for start in range(0, total, side * 3 // 4))


def _decoder_caches(coder: _Coder) -> float:
    """Values per pixel that the convolutions over time remember: two frames of each one's input."""
    widths = coder.widths[::-1]
    smallest = 4 ** (len(widths) - 1)
    total, before = (coder.latent + 4 * widths[0]) / smallest + widths[-1], widths[0]
    for level, channels in enumerate(widths):
        total += (before + (2 * coder.layers + 1) * channels) / (smallest / 4**level)
        before = channels
    return 2 * total


def _encoder_caches(coder: _Coder) -> float:
    widths = coder.widths
    total, before = 3 + 5 * widths[-1] / 4 ** (len(widths) - 1), widths[0]
    for level, channels in enumerate(widths):
        total += (before + (2 * coder.layers - 1) * channels) / 4**level
        before = channels
    return 2 * total
