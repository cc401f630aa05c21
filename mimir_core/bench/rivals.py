"""One denoising step: the models that take turns, all on one set of random weights (no copies of them)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..attention import Attention, choose_attention, sdpa
from ..config import DiTConfig
from ..dit import CogVideoXTransformer
from ..positions import rotary_table
from .shapes import Shape

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
State = Mapping[str, Tensor]

OURS, DIFFUSERS = "ours", "diffusers"


@dataclass(frozen=True)
class Model:
    """A contestant. `predict`: latents (B, C, T, H, W), timestep (B,), text (B, n, E) -> velocity."""

    name: str
    predict: Predict
    attention: str = "sdpa"
    compiled: str = ""  # "", "model" or "blocks"
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """A contestant that cannot take part here, and why."""

    name: str
    reason: str
    attention: str = "sdpa"
    compiled: str = ""


# Makes the models of a host, or Missing ones. Weights by their names in diffusers, where they are to stay.
Builder = Callable[[Shape, State], Sequence[Model | Missing]]


class Inputs(NamedTuple):
    latents: Tensor
    timestep: Tensor
    text: Tensor


def random_state(config: DiTConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> State:
    """Random weights with the names of the published files."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return CogVideoXTransformer(config, device=device, dtype=dtype).state_dict()


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype, timestep: int = 500) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    config = shape.config
    latents = torch.randn(shape.batch, config.in_channels, *shape.latents, generator=generator)
    text = torch.randn(shape.batch, shape.text, config.text_embed_dim, generator=generator)
    steps = torch.full((shape.batch,), timestep, device=device)
    return Inputs(latents.to(device, dtype), steps, text.to(device, dtype))


def models(shape: Shape, state: State, compile_mode: str | None = None) -> Iterator[Model | Missing]:
    """diffusers' and ours, one for each attention; compiled ones if `compile_mode` names a mode."""
    device = state["proj_out.weight"].device
    yield guarded(DIFFUSERS, lambda: Model(DIFFUSERS, theirs(shape, state)))
    for name, attention in attentions(device):
        yield Model(OURS, ours(shape, state, attention), name)
    if compile_mode is not None:
        settings: dict[str, Any] = {"mode": compile_mode, "dynamic": False, "fullgraph": True}
        yield Model(OURS, torch.compile(ours(shape, state), **settings), compiled="model")
        yield Model(OURS, _with_compiled_blocks(ours(shape, state), settings), compiled="blocks")
        build = lambda: Model(DIFFUSERS, theirs(shape, state, settings), compiled="model")
        yield guarded(DIFFUSERS, build, compiled="model")


def guarded(name: str, build: Callable[[], Model], **described: str) -> Model | Missing:
    """What `build` makes, or the reason why it cannot."""
    try:
        return build()
    except Exception as error:  # noqa: BLE001  a rival that is not installed or has changed must not end the rest
        return Missing(name, reason(error), **described)


def reason(error: BaseException) -> str:
    """The first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def ours(
    shape: Shape, state: State, attention: Attention = sdpa, ops: Any = torch.nn
) -> CogVideoXTransformer:
    """Our model around the given weights."""
    with torch.device("meta"):
        model = CogVideoXTransformer(shape.config, ops=ops, attention=attention)
    model.load_state_dict(dict(state), strict=True, assign=True)
    return model.eval()


def diffusers_model(shape: Shape, state: State) -> Any:
    """diffusers' CogVideoXTransformer3DModel around the given weights."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

    settings = dataclasses.asdict(shape.config)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**settings)
    model.load_state_dict(dict(state), strict=True, assign=True)
    for name, _ in list(model.named_buffers()):  # computed where they are made: take them from a small model
        small = CogVideoXTransformer3DModel(**{**settings, "num_layers": 0})
        owner, _, attribute = name.rpartition(".")
        buffer = small.get_buffer(name).to(state["proj_out.weight"])
        setattr(model.get_submodule(owner), attribute, buffer)
    return model.eval()


def theirs(shape: Shape, state: State, compiling: Mapping[str, Any] | None = None) -> Predict:
    """diffusers' model behind our signature. Its rotary tables are made once, as in its pipeline."""
    model = diffusers_model(shape, state)
    angles = diffusers_angles(shape, model) if shape.config.use_rotary_positional_embeddings else None
    run = torch.compile(model, **compiling) if compiling is not None else model

    def predict(latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        out = run(latents.transpose(1, 2), text, timestep, image_rotary_emb=angles, return_dict=False)
        return out[0].transpose(1, 2)

    return predict


def diffusers_angles(shape: Shape, model: Any) -> tuple[Tensor, Tensor]:
    """Cosines and sines in diffusers' layout, (N, d) each."""
    frames, height, width = shape.latents
    patch = shape.config.patch_size
    grid = (frames // (shape.config.patch_size_t or 1), height // patch, width // patch)
    rope = rotary_table(shape.config, grid, 0)
    signs = torch.tensor([-1.0, 1.0]).repeat(shape.config.attention_head_dim // 2)
    return rope.cos[:, 0].to(model.device), (rope.sin[:, 0] * signs).to(model.device)


def attentions(device: torch.device) -> Iterator[tuple[str, Attention]]:
    """Every attention for `device`, by name: what PyTorch picks, each of its kernels, xformers."""
    yield "sdpa", sdpa
    if device.type != "cuda":
        return
    for name in ("flash", "cudnn", "efficient"):
        backend = getattr(SDPBackend, f"{name.upper()}_ATTENTION", None)
        if backend is not None:
            yield f"sdpa {name}", only(backend)
    chosen, _ = choose_attention(device)
    if chosen is not sdpa:
        yield "xformers", chosen


def only(backend: Any) -> Attention:
    """PyTorch's attention with one kernel."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, options: Any = None
    ) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, mask=mask)

    return attention


def _with_compiled_blocks(model: CogVideoXTransformer, settings: Mapping[str, Any]) -> CogVideoXTransformer:
    for block in model.transformer_blocks:
        block.compile(**settings)
    return model
