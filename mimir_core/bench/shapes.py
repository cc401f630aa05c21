"""What is measured. Small shapes are for a CPU, where a step takes a second; real ones are for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..config import DIT_PRESETS, PHI_PRESETS, DiTConfig, PhiConfig
from ..vae import SPACE, latent_frames


@dataclass(frozen=True)
class Shape:
    """A DiT and the latents it gets: (T, H, W). batch 2: with guidance."""

    name: str
    config: DiTConfig
    latents: tuple[int, int, int]
    text: int = 226
    batch: int = 2
    vae: str = "tiny"  # of VAE_PRESETS, for whole videos

    @property
    def described(self) -> str:
        size = "x".join(map(str, self.latents))
        config = self.config
        return (
            f"{config.num_layers} layers of {config.num_attention_heads} heads x "
            f"{config.attention_head_dim}, latents {size}, {self.text} text tokens, batch {self.batch}"
        )


@dataclass(frozen=True)
class Prefill:
    """A language model that reads a prompt of `tokens` tokens, answers, and reads four instructions."""

    name: str
    config: PhiConfig
    tokens: int = 200
    answer: int = 0


_SMALL = {"num_layers": 4, "text_embed_dim": 512, "time_embed_dim": 256}
SMALL = (
    Shape(
        "small 2B",
        replace(
            DIT_PRESETS["2b"],
            num_attention_heads=6,
            sample_width=24,
            sample_height=16,
            sample_frames=17,
            **_SMALL,
        ),
        (5, 16, 24),
    ),
    Shape(
        "small 5B",
        replace(DIT_PRESETS["5b"], num_attention_heads=8, sample_width=36, sample_height=24, **_SMALL),
        (5, 24, 36),
    ),
    Shape(
        "small 1.5",
        replace(DIT_PRESETS["1.5-5b"], num_attention_heads=8, **_SMALL),
        (6, 24, 24),
    ),
)
_TINY = {"num_layers": 1, "num_attention_heads": 3, "attention_head_dim": 16, "text_embed_dim": 24}
TINY = tuple(
    replace(
        shape,
        name=shape.name.replace("small", "tiny"),
        config=replace(shape.config, time_embed_dim=20, sample_width=4, sample_height=4, **_TINY),
        latents=(3 if shape.config.patch_size_t is None else 4, 4, 4),
        text=shape.config.max_text_seq_length,
    )
    for shape in SMALL
)


def real(model: str, frames: int, height: int, width: int) -> Shape:
    """A published size at a size in pixels."""
    latents = (latent_frames(frames), height // SPACE, width // SPACE)
    return Shape(f"{model.upper()} {frames}x{height}x{width}", DIT_PRESETS[model], latents, vae=model)


REAL = tuple(
    real(model, *size) for size in ((49, 480, 720), (17, 480, 720), (49, 256, 384)) for model in ("5b", "2b")
)

_PHI = replace(
    PHI_PRESETS["tiny"], hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=8,
)  # fmt: skip
PREFILLS = {
    "tiny": (Prefill("tiny Phi", PHI_PRESETS["tiny"]),),
    "small": (Prefill("small Phi", _PHI), Prefill("small Phi", _PHI, answer=16)),
    "real": (
        Prefill("Phi-3.5-mini", PHI_PRESETS["phi-3.5-mini"]),
        Prefill("Phi-3.5-mini", PHI_PRESETS["phi-3.5-mini"], answer=64),
    ),
}
STEPS = {"tiny": TINY, "small": SMALL, "real": REAL}
