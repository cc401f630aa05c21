"""The arithmetic of a DiT step, in floating-point operations; a multiply-add counts as two.

Letters: N = n + N_v tokens (text and video), d width, L layers, E width of the text, e of the time embedding,
P numbers in a patch (16 channels x 2 x 2 x 1, or x 2 in 1.5). A matrix product of (a, b) and (b, c) is 2abc.

For each layer and item of the batch:

    q, k, v and output   four products (N, d)(d, d)               4 x 2 N d^2  =  8 N d^2
    feed-forward         (N, d)(d, 4d) and (N, 4d)(4d, d)        2 x 2 N d 4d = 16 N d^2
    attention            Q K^T and P V, N^2 scores of d channels   2 x 2 N^2 d =  4 N^2 d
    modulation           two products (1, e)(e, 6d)               2 x 2 e 6d   = 24 e d

Once per item: patches 2 N_v P d, text 2 n E d, time 2 d e + 2 e^2, last modulation 2 e 2d, output 2 N_v d P.

CogVideoX-5B at 49 x 480 x 720 (N_v = 13 x 30 x 45 = 17,550, n = 226, d = 3072, L = 42): 332.2e12 for one
item, 664.4e12 for a step with guidance, half of it attention. Norms, rotary positions, GELU, gates: nothing.
"""

from typing import NamedTuple

from ..config import DiTConfig


class Flops(NamedTuple):
    """Of one step, whole batch."""

    linear: int  # the blocks' projections and feed-forwards
    attention: int
    rest: int  # modulation, patches, text, time, output

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.rest


def step_flops(config: DiTConfig, latents: tuple[int, int, int], text: int = 226, batch: int = 2) -> Flops:
    """latents: (T, H, W) of the latent video; text: tokens of text; batch: 2 with guidance."""
    frames, height, width = latents
    patch, span = config.patch_size, config.patch_size_t or 1
    video = frames // span * (height // patch) * (width // patch)
    n, d, e, layers = text + video, config.width, config.time_embed_dim, config.num_layers
    numbers = config.in_channels * patch * patch * span
    out = config.out_channels * patch * patch * span
    once = 2 * video * numbers * d + 2 * text * config.text_embed_dim * d + 2 * video * d * out
    once += 2 * d * e + 2 * e * e + 2 * e * 2 * d
    return Flops(
        linear=batch * layers * 24 * n * d * d,
        attention=batch * layers * 4 * n * n * d,
        rest=batch * (layers * 24 * e * d + once),
    )
