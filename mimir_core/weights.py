"""Model files in and out: safetensors only, recognised by their tensors, complete or refused.

`read_*` gives the configuration and the tensors, for a host that builds the network; `load_*` builds it.
What is read may lie in a single file, in a Hugging Face or diffusers folder with shards and index, or
(transformer, VAE, T5) in the root folder of a diffusers model.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .attention import Attention, sdpa
from .config import (
    DiffusionConfig,
    DiTConfig,
    FuserConfig,
    PhiConfig,
    T5Config,
    default_diffusion,
    to_dict,
)
from .dit import CogVideoXTransformer
from .fuser import TokenFuser
from .headers import Checkpoint, Wanted, fingerprint, open_checkpoint, refusal
from .phi import Phi3ForCausalLM
from .recognise import (
    FileKind,
    dit_variant,
    infer_dit,
    infer_t5,
    infer_vae,
    model_names,
    quantised,
    recognise,
    t5_names,
)
from .scaled import dequantised, is_scaled, unread
from .vae import build_vae

C = TypeVar("C")
R = TypeVar("R")

TRANSFORMER = Wanted(
    "a CogVideoX text-to-video transformer",
    "choose the transformer of CogVideoX-2B, CogVideoX-5B or CogVideoX1.5-5B, as its folder or as one file",
    "transformer",
)
# The same for a file that has another task, and is perhaps the one that somebody wants.
TEXT_TO_VIDEO = TRANSFORMER._replace(
    remedy="choose the one for text to video (CogVideoX_5b_bf16.safetensors, or the folder of CogVideoX-2B, "
    "CogVideoX-5B or CogVideoX1.5-5B), or another pack, such as ComfyUI-CogVideoXWrapper, for this file"
)
VAE = Wanted(
    "a CogVideoX VAE",
    "choose the VAE of a CogVideoX model, as one file (cogvideox_vae_bf16.safetensors) or its vae folder",
    "vae",
)
T5 = Wanted(
    "a T5 v1.1 encoder",
    "choose t5xxl as fp16, bf16 or fp8 (the one that SD3 and Flux use), or CogVideoX's text_encoder folder; "
    "one in GGUF goes through ComfyUI-GGUF's own loader to T5 Encode",
    "text_encoder",
)
PHI = Wanted(
    "Phi-3.5-mini-instruct",
    "choose its Hugging Face folder (safetensors, index, config.json, tokenizer), or one safetensors file "
    "with config.json and the tokenizer beside it",
)
FUSER = Wanted("a Mimir Token Fuser", "choose a fuser that this pack has trained, or 'untrained (identity)'")
READABLE = Wanted("one in fp8, fp16 or bf16", "get that version of it")
ANY = Wanted("a model", "choose a safetensors file or a model's folder")


@dataclass(frozen=True)
class Loaded(Generic[C]):
    path: Path
    config: C
    state: dict[str, Tensor]  # our model's names, dtype as on disk, on the CPU
    header: Mapping[str, Any]  # the file's metadata, our own entries decoded from JSON
    origin: dict[str, str]  # which weights these are: {"file": name, "fingerprint": hexadecimal}


@dataclass(frozen=True)
class LoadedTransformer(Loaded[DiTConfig]):
    diffusion: DiffusionConfig


@dataclass(frozen=True)
class Checked(Generic[C]):
    """A model's files whose headers have been found complete, and whose tensors have not been read."""

    checkpoint: Checkpoint
    config: C
    names: dict[str, str]  # {name in the file: name in our model}

    def read(self, own: bool = False) -> Loaded[C]:
        """The tensors too; `own` as in Checkpoint.load."""
        checkpoint = self.checkpoint
        state = checkpoint.load(self.names, own)
        return Loaded(checkpoint.path, self.config, state, checkpoint.header, _origin(checkpoint))


def inspect(path: str | Path) -> FileKind:
    """What lies at `path`. ValueError only when it cannot be read as safetensors."""
    return recognise(open_checkpoint(path, ANY))[0]


def read_transformer(path: str | Path, plain: bool = True, own: bool = False) -> LoadedTransformer:
    """A CogVideoX text-to-video transformer in diffusers' or ComfyUI's layout, any size.

    plain: scaled fp8 weights as bfloat16; else they stay as they are and their scales in `state`.
    """
    checked = check_transformer(path)
    found = checked.read(own)
    state = found.state
    if plain and is_scaled(state):
        state = dequantised(state, torch.bfloat16)
    diffusion = _diffusion(checked.checkpoint, found.config)
    return LoadedTransformer(found.path, found.config, state, found.header, found.origin, diffusion)


def read_vae(path: str | Path, own: bool = False) -> Loaded[dict[str, Any]]:
    """A CogVideoX VAE; its configuration is diffusers' config.json values."""
    return check_vae(path).read(own)


def read_t5(path: str | Path) -> Loaded[T5Config]:
    """A T5 v1.1 encoder. fp8 weights stay as they are, their scales stay in `state` (see `dequantised`)."""
    return check_t5(path).read()


def read_phi(path: str | Path, own: bool = False) -> Loaded[PhiConfig]:
    """Phi-3.5. Its config.json must lie beside it (or in its header): rope factors are not in the weights."""
    return check_phi(path).read(own)


def read_fuser(path: str | Path) -> Loaded[FuserConfig]:
    """A Token Fuser; its configuration must be in the file's header."""
    return check_fuser(path).read()


# check_*: the same files as read_*, and the same refusals, from their headers alone.


def check_transformer(path: str | Path) -> Checked[DiTConfig]:
    checkpoint, names = _open(path, TRANSFORMER, "cogvideox-transformer", "cogvideox-comfy")
    shapes = _shapes(checkpoint, names)
    other = _inferred(dit_variant, shapes, checkpoint, TRANSFORMER)
    if other is not None:
        raise refusal(checkpoint.path, other, TEXT_TO_VIDEO)
    values = _settings(checkpoint, "_class_name", "CogVideoXTransformer3DModel")
    config = (
        _configured(DiTConfig, values, checkpoint)
        if values
        else _inferred(infer_dit, shapes, checkpoint, TRANSFORMER)
    )
    with torch.device("meta"):
        expected = CogVideoXTransformer(config).state_dict()
    return _complete(Checked(checkpoint, config, names), _shapes_of(expected), TRANSFORMER)


def check_vae(path: str | Path) -> Checked[dict[str, Any]]:
    checkpoint, names = _open(path, VAE, "cogvideox-vae")
    values = _settings(checkpoint, "_class_name", "AutoencoderKLCogVideoX")
    config = dict(values) if values else _inferred(infer_vae, _shapes(checkpoint, names), checkpoint, VAE)
    expected = build_vae(config, device="meta").state_dict()
    return _complete(Checked(checkpoint, config, names), _shapes_of(expected), VAE)


def check_t5(path: str | Path) -> Checked[T5Config]:
    checkpoint, names = _open(path, T5, "t5-encoder")
    names = {
        name: ours for name, ours in names.items() if not ours.startswith(("decoder.", "lm_head", "spiece"))
    }
    shapes = _shapes(checkpoint, names)
    values = _settings(checkpoint, "model_type", "t5")
    config = (
        _configured(T5Config, values, checkpoint) if values else _inferred(infer_t5, shapes, checkpoint, T5)
    )
    expected = {name: shapes.get(name, ()) for name in t5_names(config)}
    embeddings = {"shared.weight", "encoder.embed_tokens.weight"} & set(shapes)
    expected.update({name: (config.vocab_size, config.d_model) for name in embeddings})
    return _complete(Checked(checkpoint, config, names), expected, T5)


def check_phi(path: str | Path) -> Checked[PhiConfig]:
    checkpoint, names = _open(path, PHI, "phi3")
    values = _settings(checkpoint, "model_type", "phi3")
    if not values:
        raise refusal(checkpoint.path, "a Phi-3 language model without its config.json", PHI)
    config = _configured(PhiConfig, values, checkpoint)
    with torch.device("meta"):
        expected = _shapes_of(Phi3ForCausalLM(config).state_dict())
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        names = {name: ours for name, ours in names.items() if ours != "lm_head.weight"}
    return _complete(Checked(checkpoint, config, names), expected, PHI)


def check_fuser(path: str | Path) -> Checked[FuserConfig]:
    checkpoint, names = _open(path, FUSER, "mimir-fuser")
    values = checkpoint.header.get("config")
    if not isinstance(values, dict):
        raise refusal(checkpoint.path, "a Token Fuser without its configuration in the header", FUSER)
    config = _configured(FuserConfig, values, checkpoint)
    with torch.device("meta"):
        expected = TokenFuser(config).state_dict()
    return _complete(Checked(checkpoint, config, names), _shapes_of(expected), FUSER)


def load_transformer(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: Attention = sdpa,
) -> tuple[CogVideoXTransformer, DiffusionConfig]:
    """The network, ready to run, and the schedule it was trained with.

    dtype None: as on disk, and bfloat16 for fp8, in which torch.nn cannot compute.
    """
    found = read_transformer(path)
    on_disk = found.state["transformer_blocks.0.attn1.to_q.weight"].dtype
    dtype = dtype or (on_disk if on_disk.itemsize > 1 else torch.bfloat16)
    model = CogVideoXTransformer(found.config, attention=attention, device="meta", dtype=dtype)
    return _filled(model, found.state, device, dtype), found.diffusion


def load_vae(path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """diffusers' AutoencoderKLCogVideoX, ready to run."""
    found = read_vae(path)
    return _filled(build_vae(found.config, device="meta"), found.state, device, dtype)


def load_phi(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    attention: Attention = sdpa,
) -> Phi3ForCausalLM:
    found = read_phi(path)
    model = Phi3ForCausalLM(found.config, attention=attention, device="meta")
    return _filled(model, found.state, device, dtype)


def load_fuser(
    path: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> TokenFuser:
    found = read_fuser(path)
    return _filled(TokenFuser(found.config, device="meta"), found.state, device, dtype)


def save_transformer(
    path: str | Path,
    config: DiTConfig,
    diffusion: DiffusionConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    preview: Mapping[str, Any] | None = None,
) -> None:
    """preview: {"factors": (16, 3), "bias": (3,)} from latents to RGB, for live previews."""
    extra = {} if preview is None else {"preview": preview}
    save(path, state, dtype, config=to_dict(config), diffusion=to_dict(diffusion), **extra)


def save_vae(
    path: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    save(path, state, dtype, config=dict(config))


def save_fuser(
    path: str | Path, config: FuserConfig, state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    save(path, state, dtype, config=to_dict(config))


def save(
    path: str | Path, state: Mapping[str, Tensor], dtype: torch.dtype | None = None, **header: Any
) -> None:
    """One safetensors file with the values of `header` as JSON in its header."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}
    notes = {name: json.dumps(value, sort_keys=True) for name, value in header.items()}
    save_file(tensors, str(path), {"format": "pt", **notes})


def _open(path: str | Path, wanted: Wanted, *kinds: str) -> tuple[Checkpoint, dict[str, str]]:
    """The checkpoint and {name in the file: our name}, or the refusal of any other kind."""
    checkpoint = open_checkpoint(path, wanted)
    kind, prefix = recognise(checkpoint)
    if kind.kind not in kinds:
        raise refusal(checkpoint.path, kind.name, wanted)
    return checkpoint, model_names(checkpoint, kind, prefix)


def _origin(checkpoint: Checkpoint) -> dict[str, str]:
    return {"file": checkpoint.path.name, "fingerprint": fingerprint(*checkpoint.files)}


def _settings(checkpoint: Checkpoint, key: str, expected: str) -> dict[str, Any] | None:
    """The configuration in the header, else the config.json beside the file if it belongs to this kind."""
    found = checkpoint.header.get("config")
    if isinstance(found, dict):
        return found
    beside = checkpoint.settings
    return beside if beside is not None and beside.get(key) == expected else None


def _configured(cls: Any, values: Mapping[str, Any], checkpoint: Checkpoint) -> Any:
    try:
        return cls.from_dict(values)
    except ValueError as error:
        raise ValueError(f"The configuration of {checkpoint.path.name} does not fit: {error}.") from error


def _inferred(
    infer: Callable[[Mapping[str, tuple[int, ...]]], R],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    wanted: Wanted,
) -> R:
    """infer(shapes), or the refusal of a file that lacks a tensor which this takes."""
    try:
        return infer(shapes)
    except (KeyError, IndexError) as error:
        found = f"{wanted.name} of which parts are missing ({error.args[0]})"
        raise refusal(checkpoint.path, found, wanted._replace(name="a complete one")) from error


def _diffusion(checkpoint: Checkpoint, config: DiTConfig) -> DiffusionConfig:
    """From the header, else from the scheduler and VAE beside a diffusers transformer, else by its kind."""
    found = checkpoint.header.get("diffusion")
    if isinstance(found, dict):
        return _configured(DiffusionConfig, found, checkpoint)
    values = to_dict(default_diffusion(config))
    root = checkpoint.folder.parent
    if checkpoint.settings is not None and (root / "model_index.json").is_file():
        values.update(_json(root / "scheduler" / "scheduler_config.json"))
        scale = _json(root / "vae" / "config.json").get("scaling_factor")
        values["latent_scale"] = values["latent_scale"] if scale is None else scale
    return _configured(DiffusionConfig, values, checkpoint)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): download it again.") from error


def _complete(found: Checked[C], expected: Mapping[str, tuple[int, ...]], wanted: Wanted) -> Checked[C]:
    """`found`. ValueError unless exactly the expected tensors are there, shapes included."""
    checkpoint, names = found.checkpoint, found.names
    other = unread({ours: checkpoint.tensors[name] for name, ours in names.items()})
    if other is not None:
        raise refusal(checkpoint.path, f"{wanted.name} that is {other}", READABLE)
    shapes = _shapes(checkpoint, names)
    extra = [name for name in shapes if name not in expected and not quantised(name)]
    missing = [name for name in expected if name not in shapes]
    wrong = [name for name, shape in expected.items() if name in shapes and shape and shapes[name] != shape]
    problems = [
        _listed("lacks", missing),
        _listed("has unknown", extra),
        _listed("has other shapes for", wrong),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        raise ValueError(
            f"{checkpoint.path.name} is not a complete {wanted.name.partition(' ')[2] or wanted.name}: it "
            f"{', '.join(problems)}; {wanted.remedy}, and download it again if it should be one."
        )
    return found


def _listed(verb: str, names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return f"{verb} {', '.join(names[:3])}{more}" if names else ""


def _shapes(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    return {ours: checkpoint.tensors[name].shape for name, ours in names.items()}


def _shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _filled(
    model: Any, state: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype | None
) -> Any:
    """Put the tensors into a network built on the meta device."""
    placed = {name: tensor.to(device, dtype) for name, tensor in state.items()}
    nn.Module.load_state_dict(model, placed, strict=True, assign=True)
    return model.eval()
