"""What a checkpoint is, told from its tensor names and shapes (never its file name), and its configuration.

Known layouts other than diffusers' and transformers' own are a prefix in front of all names, or a table.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .config import DIT_PRESETS, DiTConfig, T5Config
from .headers import Checkpoint

PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "text_encoders.t5xxl.transformer.",
    "t5xxl.transformer.",
    "text_encoder.",
    "first_stage_model.",
    "vae.",
)

# ComfyUI's own layout of CogVideoX -> diffusers'. The reverse direction is derived from it.
COMFY_NAMES = {
    "blocks.": "transformer_blocks.",
    ".q.": ".attn1.to_q.",
    ".k.": ".attn1.to_k.",
    ".v.": ".attn1.to_v.",
    ".norm_q.": ".attn1.norm_q.",
    ".norm_k.": ".attn1.norm_k.",
    ".attn_out.": ".attn1.to_out.0.",
    ".ff_proj.": ".ff.net.0.proj.",
    ".ff_out.": ".ff.net.2.",
    "time_embedding_linear_": "time_embedding.linear_",
    "ofs_embedding_linear_": "ofs_embedding.linear_",
}

# Scales of fp8 files; a loader that understands them finds them beside the weights.
QUANTISATION = (
    "scaled_fp8",
    ".scale_weight",
    ".scale_input",
    ".weight_scale",
    ".input_scale",
    ".comfy_quant",
)


@dataclass(frozen=True)
class FileKind:
    kind: str
    name: str  # in words, with an article
    marks: tuple[str, ...]  # tensors that only this kind has, all of them; * stands for any prefix


# The first kind whose marks are all there is the answer, so special cases stand before general ones.
KINDS = (
    FileKind("lora", "a LoRA", ("*.lora_A.weight",)),
    FileKind("lora", "a LoRA", ("*.lora_down.weight",)),
    FileKind("mimir-fuser", "a Mimir Token Fuser", ("llm_conv.weight",)),
    FileKind(
        "mimir-conditioning",
        "a saved condition (which Load Conditioning (Mimir) reads)",
        ("mimir_conditioning",),
    ),
    FileKind(
        "cogvideox-transformer",
        "a CogVideoX transformer",
        ("patch_embed.text_proj.weight", "transformer_blocks.0.attn1.norm_q.weight"),
    ),
    FileKind(
        "cogvideox-comfy",
        "a CogVideoX transformer in ComfyUI's layout",
        ("patch_embed.text_proj.weight", "blocks.0.norm1.linear.weight"),
    ),
    FileKind(
        "cogvideox-vae",
        "a CogVideoX VAE",
        ("decoder.conv_in.conv.weight", "decoder.mid_block.resnets.0.norm1.norm_layer.weight"),
    ),
    FileKind(
        "umt5",
        "a UMT5 text encoder (Wan's)",
        ("shared.weight", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
    ),
    FileKind(
        "t5-encoder",
        "a T5 v1.1 text encoder",
        (
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
        ),
    ),
    FileKind("t5-old", "a T5 of version 1.0", ("encoder.block.0.layer.1.DenseReluDense.wi.weight",)),
    FileKind(
        "phi3",
        "a Phi-3 language model",
        ("model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"),
    ),
    FileKind(
        "llm", "another language model (Llama, Qwen or Gemma)", ("model.layers.0.self_attn.q_proj.weight",)
    ),
    FileKind("sdxl", "a Stable Diffusion XL checkpoint", ("model.diffusion_model.label_emb.0.0.weight",)),
    FileKind("sd", "a Stable Diffusion checkpoint", ("model.diffusion_model.input_blocks.0.0.weight",)),
    FileKind("clip", "a CLIP text encoder", ("*text_model.encoder.layers.0.self_attn.q_proj.weight",)),
    FileKind(
        "cogvideox-sat",
        "a CogVideoX in its authors' SAT layout (get the diffusers version)",
        ("*transformer.layers.0.attention.query_key_value.weight",),
    ),
    FileKind("flux", "a Flux or Hunyuan Video transformer", ("double_blocks.0.img_mod.lin.weight",)),
    FileKind("hunyuan", "a Hunyuan Video transformer", ("double_blocks.0.img_attn_qkv.weight",)),
    FileKind("wan", "a Wan video transformer", ("blocks.0.cross_attn.q.weight", "patch_embedding.weight")),
    FileKind("ltx", "an LTX Video transformer", ("transformer_blocks.0.scale_shift_table",)),
    FileKind("mochi", "a Mochi transformer", ("blocks.0.mod_x.weight",)),
    FileKind("sd3", "a Stable Diffusion 3 transformer", ("joint_blocks.0.x_block.attn.qkv.weight",)),
    FileKind("video-vae", "another model's video VAE", ("decoder.conv_in.conv.weight",)),
    FileKind("video-vae", "another model's video VAE", ("decoder.middle.0.residual.0.gamma",)),
    FileKind("image-vae", "an image VAE", ("decoder.conv_in.weight", "encoder.conv_in.weight")),
)

UNKNOWN = FileKind("unknown", "no model that this pack knows", ())


def recognise(checkpoint: Checkpoint) -> tuple[FileKind, str]:
    """The kind, and the prefix that all its tensors have in this file."""
    names = checkpoint.tensors
    for kind in KINDS:
        for prefix in PREFIXES:
            if all(_has(names, prefix, mark) for mark in kind.marks):
                return kind, prefix
    return UNKNOWN, ""


def model_names(checkpoint: Checkpoint, kind: FileKind, prefix: str) -> dict[str, str]:
    """{name in the file: name in our model} of every tensor under `prefix`."""
    under = {name: name[len(prefix) :] for name in checkpoint.tensors if name.startswith(prefix)}
    if kind.kind == "cogvideox-comfy":
        return {name: from_comfy(short) for name, short in under.items()}
    return under


def from_comfy(name: str) -> str:
    """A tensor's name in ComfyUI's CogVideoX layout -> diffusers' name."""
    return _renamed(name, COMFY_NAMES)


def to_comfy(name: str) -> str:
    """diffusers' name -> ComfyUI's."""
    return _renamed(name, {theirs: ours for ours, theirs in COMFY_NAMES.items()})


def quantised(name: str) -> bool:
    return name.endswith(QUANTISATION)


def infer_dit(shapes: Mapping[str, tuple[int, ...]]) -> DiTConfig:
    """The configuration of a CogVideoX transformer from its tensor shapes, diffusers' names.

    The names do not tell sin-cos positions from rotary ones. The 2B, fine-tuned or with layers taken out, is
    the only one of width 1920 and the only one with sin-cos; all else is rotary. A file that breaks this rule
    needs its config.json beside it.
    """
    width, text = shapes["patch_embed.text_proj.weight"]
    head = shapes["transformer_blocks.0.attn1.norm_q.weight"][0]
    layers, projection = _count(shapes, "transformer_blocks"), shapes["patch_embed.proj.weight"]
    temporal = len(projection) == 2  # 1.5: a Linear over 2 x 2 x 2 patches
    patch, patch_t = (2, 2) if temporal else (projection[-1], None)
    volume = patch**2 * (patch_t or 1)
    native = DIT_PRESETS["1.5-5b" if temporal else "5b"]
    return DiTConfig(
        num_layers=layers,
        num_attention_heads=width // head,
        attention_head_dim=head,
        in_channels=projection[1] // volume if temporal else projection[1],
        out_channels=shapes["proj_out.weight"][0] // volume,
        time_embed_dim=shapes["time_embedding.linear_1.weight"][0],
        text_embed_dim=text,
        patch_size=patch,
        patch_size_t=patch_t,
        patch_bias="patch_embed.proj.bias" in shapes and not temporal,
        attention_bias="transformer_blocks.0.attn1.to_q.bias" in shapes,
        use_rotary_positional_embeddings=width != DIT_PRESETS["2b"].width,
        sample_width=native.sample_width,
        sample_height=native.sample_height,
        sample_frames=native.sample_frames,
    )


def dit_variant(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """In words, what a CogVideoX transformer is that is not a text-to-video one; None when it is one."""
    projection = shapes["patch_embed.proj.weight"]
    channels = projection[1] if len(projection) == 4 else projection[1] // 8
    if any(name.startswith("local_facial_extractor.") for name in shapes):
        return "ConsisID, a transformer for videos of a given face"
    if any(name.startswith("ofs_embedding.") for name in shapes):
        return "CogVideoX1.5-5B-I2V, an image-to-video transformer"
    if channels == 32 and "patch_embed.pos_embedding" in shapes:
        return "CogVideoX-5B-I2V, an image-to-video transformer"
    if channels == 32 and "pos_embedding" in shapes:
        return "a CogVideoX-Fun control or pose transformer"
    if channels == 16 and {"patch_embed.pos_embedding", "pos_embedding"} & set(shapes):
        return "a CogVideoX transformer with learned positions"
    known = {
        16: None,
        32: "a CogVideoX image-to-video or CogVideoX-Fun control transformer",
        33: "a CogVideoX-Fun inpainting (InP) transformer",
        48: "a CogVideoX transformer for inpainting masked video (VOID)",
    }
    return known.get(channels, f"a CogVideoX transformer for {channels} latent channels instead of 16")


def infer_t5(shapes: Mapping[str, tuple[int, ...]]) -> T5Config:
    """The configuration of a T5 v1.1 encoder from its tensor shapes, transformers' names."""
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    inner, width = shapes[f"{attention}.q.weight"]
    embedding = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    return T5Config(
        d_model=width,
        num_layers=_count(shapes, "encoder.block"),
        num_heads=heads,
        d_kv=inner // heads,
        d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        vocab_size=embedding[0],
        relative_attention_num_buckets=buckets,
    )


def t5_names(config: T5Config) -> set[str]:
    """The tensors of a T5 v1.1 encoder, transformers' names, without the embedding."""
    attention = [f"0.SelfAttention.{part}" for part in "qkvo"] + ["0.layer_norm", "1.layer_norm"]
    feed_forward = [f"1.DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")]
    names = {"encoder.final_layer_norm.weight"}
    names.add("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    for layer in range(config.num_layers):
        names.update(f"encoder.block.{layer}.layer.{part}.weight" for part in attention + feed_forward)
    return names


def infer_vae(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """diffusers' configuration of a CogVideoX VAE from its tensor shapes.

    The number of norm groups cannot be seen: it is taken to be the published 32.
    """
    blocks = range(_count(shapes, "encoder.down_blocks"))
    return {
        "_class_name": "AutoencoderKLCogVideoX",
        "block_out_channels": tuple(
            shapes[f"encoder.down_blocks.{block}.resnets.0.conv1.conv.weight"][0] for block in blocks
        ),
        "down_block_types": ("CogVideoXDownBlock3D",) * len(blocks),
        "up_block_types": ("CogVideoXUpBlock3D",) * len(blocks),
        "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets"),
        "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
    }


def _count(names: Iterable[str], prefix: str) -> int:
    """How many modules `prefix.0`, `prefix.1` ... there are."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found = [int(match.group(1)) for match in map(pattern.match, names) if match]
    return max(found, default=-1) + 1


def _has(names: Mapping[str, Any], prefix: str, mark: str) -> bool:
    if mark.startswith("*"):
        return any(name.endswith(mark[1:]) for name in names)
    return prefix + mark in names


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """Rules that begin with a dot apply behind a block's number, all others at the start of the name."""
    for old, new in table.items():
        if old.startswith("."):
            name = re.sub(rf"(?<=\d){re.escape(old)}", new, name)
        elif name.startswith(old):
            name = new + name[len(old) :]
    return name
