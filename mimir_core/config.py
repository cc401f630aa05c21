"""Frozen configurations of every network, and the named sizes. One dataclass builds one model.

Field names are those of the published checkpoints' config.json (diffusers for the DiT, transformers for Phi-3
and T5), so that a config.json can be read with `from_dict` as it is. Keys that describe training or software
are ignored; keys that would change the network's function are refused when we do not implement them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

C = TypeVar("C")

# One instruction, and one stabilizer token, per attribute that the paper's figures test.
DEFAULT_INSTRUCTIONS = (
    "Name the objects and count them.",
    "Name the colours and materials.",
    "Say where the objects are, relative to each other.",
    "Say what moves, in which order, and how the light changes.",
)


@dataclass(frozen=True)
class DiTConfig:
    """CogVideoX transformer. Names and defaults are diffusers' (CogVideoXTransformer3DModel)."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int = 64
    in_channels: int = 16  # latent channels
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    max_text_seq_length: int = 226  # n: what T5 pads and truncates to
    patch_size: int = 2
    patch_size_t: int | None = None  # 2 in CogVideoX 1.5, whose patches also span two latent frames
    patch_bias: bool = True
    attention_bias: bool = True
    norm_eps: float = 1e-5
    use_rotary_positional_embeddings: bool = True  # False: 3D sin-cos table (2B)
    sample_width: int = 90  # latent size the model was trained at: the reference grid of the positions
    sample_height: int = 60
    sample_frames: int = 49  # pixel frames
    temporal_compression_ratio: int = 4
    spatial_interpolation_scale: float = 1.875  # sin-cos only
    temporal_interpolation_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.use_rotary_positional_embeddings and self.attention_head_dim % 16:
            raise ValueError(
                f"attention_head_dim is {self.attention_head_dim}, but rotary positions split it into pairs "
                "for time (1/4), height (3/8) and width (3/8): use a multiple of 16"
            )
        if not self.use_rotary_positional_embeddings and self.width % 16:
            raise ValueError(
                f"width is {self.width} ({self.num_attention_heads} heads x {self.attention_head_dim}), but "
                "the sin-cos table splits it into 1/4 time and 3/4 space: use a multiple of 16"
            )
        for name in ("sample_width", "sample_height"):
            size = getattr(self, name)
            if size % self.patch_size:
                raise ValueError(f"{name} is {size}, expected a multiple of patch_size {self.patch_size}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DiTConfig":
        """From diffusers' config.json or our own file header. ValueError on variants we do not build."""
        for name, (allowed, meaning) in _DIT_REFUSED.items():
            if name in values and values[name] not in allowed:
                raise ValueError(f"{name}={values[name]!r}: {meaning}; expected {allowed[0]!r}")
        return from_dict(cls, values)


# Settings of diffusers' class that no text-to-video checkpoint uses: name -> (accepted values, meaning).
_DIT_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_learned_positional_embeddings": (
        (False, None),
        "an image-to-video CogVideoX, Mimir needs a text-to-video one",
    ),
    "ofs_embed_dim": ((None, 0), "an image-to-video CogVideoX 1.5, Mimir needs a text-to-video one"),
    "activation_fn": (("gelu-approximate",), "this feed-forward activation is not implemented"),
    "timestep_activation_fn": (("silu",), "this time embedding activation is not implemented"),
    "norm_elementwise_affine": ((True,), "norms without weights are not implemented"),
    "flip_sin_to_cos": ((True,), "the other order of the time embedding is not implemented"),
    "freq_shift": ((0,), "a shifted time embedding is not implemented"),
}

DIT_PRESETS: dict[str, DiTConfig] = {
    "tiny": DiTConfig(
        num_layers=4, num_attention_heads=4, attention_head_dim=32, time_embed_dim=96, text_embed_dim=96,
        max_text_seq_length=64, sample_width=8, sample_height=8, sample_frames=9,
    ),
    "2b": DiTConfig(num_layers=30, num_attention_heads=30, use_rotary_positional_embeddings=False),
    "5b": DiTConfig(num_layers=42, num_attention_heads=48),
    "1.5-5b": DiTConfig(
        num_layers=42, num_attention_heads=48, patch_size_t=2, patch_bias=False,
        sample_width=300, sample_height=300, sample_frames=81,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule a DiT was trained with: scaled-linear betas, zero terminal SNR, v-prediction."""

    snr_shift_scale: float = 1.0  # 3.0 in CogVideoX-2B
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    latent_scale: float = 0.7  # what VAE latents were multiplied with before the DiT saw them

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DiffusionConfig":
        """From a scheduler_config.json of a CogVideoX model or from our own file header."""
        for name, expected in _SCHEDULE_EXPECTED.items():
            found = values.get(name, expected)
            if found != expected:
                raise ValueError(f"the noise schedule has {name}={found!r}; CogVideoX needs {expected!r}")
        return from_dict(cls, values)


_SCHEDULE_EXPECTED = {
    "prediction_type": "v_prediction",
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def default_diffusion(config: DiTConfig) -> DiffusionConfig:
    """The schedule of the published model with these positions: 2B (sin-cos) or 5B and 1.5 (rotary)."""
    if config.use_rotary_positional_embeddings:
        return DiffusionConfig()
    return DiffusionConfig(snr_shift_scale=3.0, latent_scale=1.15258426)


@dataclass(frozen=True)
class PhiConfig:
    """Phi-3 decoder. Names are transformers' (Phi3Config), whose `rope_scaling` is flattened here."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    short_factor: tuple[float, ...] = ()  # longrope: one divisor per frequency, up to the original length
    long_factor: tuple[float, ...] = ()  # and beyond it; both empty means plain rotary positions
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (32000,)
    pad_token_id: int | None = 32000

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise ValueError(
                f"hidden_size is {self.hidden_size} for {self.num_attention_heads} heads: "
                "expected an even width per head"
            )
        pairs = self.head_dim // 2
        for name in ("short_factor", "long_factor"):
            found = len(getattr(self, name))
            if found not in (0, pairs):
                raise ValueError(f"{name} has {found} entries, expected {pairs} (half the head width)")
        if bool(self.short_factor) != bool(self.long_factor):
            raise ValueError("longrope needs both short_factor and long_factor, got only one of them")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PhiConfig":
        """From transformers' config.json (4.x `rope_scaling` or 5.x `rope_parameters`) or from `to_dict`."""
        rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
        _refuse_phi_variants(values, rope)
        heads = values.get("num_attention_heads")
        defaults = {"num_key_value_heads": heads, "eos_token_id": (32000,)}
        known = ("short_factor", "long_factor", "rope_theta", "original_max_position_embeddings")
        merged = {**values, **{name: rope[name] for name in known if rope.get(name) is not None}}
        merged.update({name: value for name, value in defaults.items() if merged.get(name) is None})
        if isinstance(merged["eos_token_id"], int):
            merged["eos_token_id"] = (merged["eos_token_id"],)
        return from_dict(cls, merged)

    def to_dict(self) -> dict[str, Any]:
        """As transformers 4.x writes it, so that Phi3Config reads it too."""
        names = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_act": "silu"}
        values = {**to_dict(self), **names}
        short, long = values.pop("short_factor"), values.pop("long_factor")
        scaling = {"type": "longrope", "short_factor": short, "long_factor": long}
        return {**values, "rope_scaling": scaling if short else None}


def _refuse_phi_variants(values: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "longrope", "su"):
        raise ValueError(f"the language model's rope type is {kind!r}; Phi-3.5 has 'longrope'")
    partial = rope.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor is {partial} (Phi-4?); Phi-3.5-mini-instruct has 1.0")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act is {values['hidden_act']!r}; Phi-3.5 has 'silu'")


PHI_PRESETS: dict[str, PhiConfig] = {
    "tiny": PhiConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, original_max_position_embeddings=1024,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=(2,), pad_token_id=0,
    ),
    # The 2 x 48 longrope factors come from the model's own config.json.
    "phi-3.5-mini": PhiConfig(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=131072,
        eos_token_id=(32000, 32001, 32007),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class T5Config:
    """T5 v1.1 encoder (gated GELU, no tied biases). Names are transformers' (T5Config)."""

    d_model: int
    num_layers: int
    num_heads: int
    d_kv: int
    d_ff: int
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "T5Config":
        found = values.get("feed_forward_proj", "gated-gelu")
        if found != "gated-gelu":
            raise ValueError(f"feed_forward_proj is {found!r}; T5 v1.1 has 'gated-gelu'")
        return from_dict(cls, values)


T5_PRESETS: dict[str, T5Config] = {
    "tiny": T5Config(d_model=96, num_layers=2, num_heads=4, d_kv=24, d_ff=192, vocab_size=1024),
    "xxl": T5Config(d_model=4096, num_layers=24, num_heads=64, d_kv=64, d_ff=10240),
}


LLM_TOKENS = ("query+answer", "query", "answer")


@dataclass(frozen=True)
class FuserConfig:
    """Token Fuser. The switches are the rows of the paper's ablation (Table 3)."""

    text_dim: int = 4096  # T5
    llm_dim: int = 3072  # Phi-3.5
    use_llm: bool = True  # add the language model's tokens at all
    norm: bool = True  # s * RMSNorm(h) before the projection
    zero_conv: bool = True  # the projection, and the encoder's own residual, start at zero
    stabilizer: bool = True  # append e_s = e_i + e_l
    num_instructions: int = 4
    scale_init: float = 0.1  # of s; never 0, or neither s nor a zero Z_beta would get a gradient
    stabilizer_std: float = 0.02  # of e_l
    norm_eps: float = 1e-6
    llm_layer: int = -1  # which hidden state it reads; -1 is the last one, after the final norm
    llm_tokens: str = "query+answer"  # or "query", or "answer": which positions e_beta is made of

    def __post_init__(self) -> None:
        if self.scale_init == 0:
            raise ValueError("scale_init is 0: before a zero convolution nothing would ever train; use 0.1")
        if self.llm_tokens not in LLM_TOKENS:
            raise ValueError(f"llm_tokens is {self.llm_tokens!r}, expected one of {', '.join(LLM_TOKENS)}")
        if self.stabilizer and self.num_instructions < 1:
            raise ValueError(f"num_instructions is {self.num_instructions}, the stabilizer needs at least 1")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FuserConfig":
        return from_dict(cls, values)


FUSER_PRESETS: dict[str, FuserConfig] = {
    "mimir": FuserConfig(),
    "baseline": FuserConfig(use_llm=False, norm=False, zero_conv=False, stabilizer=False),
    "decoder_only": FuserConfig(norm=False, zero_conv=False, stabilizer=False),
    "norm": FuserConfig(zero_conv=False, stabilizer=False),
    "norm_ss": FuserConfig(zero_conv=False),
    "zero_conv": FuserConfig(norm=False, stabilizer=False),
    "zero_conv_ss": FuserConfig(norm=False),
    "norm_zero_conv": FuserConfig(stabilizer=False),  # not a row of the paper
}


def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
    """Build dataclass `cls` from the keys it knows; foreign keys are ignored, JSON lists become tuples."""
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    known = {name: values[name] for name in names if name in values}
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
    try:
        return cls(**known)
    except TypeError as error:
        raise ValueError(f"not a complete {cls.__name__}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """JSON-ready values of a configuration; `from_dict` of its class restores it."""
    values = asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
