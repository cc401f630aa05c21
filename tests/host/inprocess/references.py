"""Tiny random models in the published layouts, written by diffusers and transformers themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEXT_LENGTH, TEXT_WIDTH = 16, 24
PHI_WIDTH = 48

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 32,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": TEXT_LENGTH,
    "use_rotary_positional_embeddings": True,
}
DIT_5B = DIT
DIT_2B = {**DIT, "use_rotary_positional_embeddings": False}
DIT_15 = {**DIT, "patch_size_t": 2, "patch_bias": False}

VAE = {
    "block_out_channels": (16, 32, 32, 32),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "sample_height": 64,
    "sample_width": 64,
    "scaling_factor": 0.7,
}


def scheduler(shift: float) -> Any:
    """diffusers' DDIM scheduler of CogVideoX, with the published settings and this SNR shift."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        rescale_betas_zero_snr=True,
        snr_shift_scale=shift,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )


def transformer(**config: Any) -> Any:
    """diffusers' transformer with weights large enough that every layer matters."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(1)
    model = CogVideoXTransformer3DModel(**(config or DIT)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
        elif "norm_q" in name or "norm_k" in name:
            torch.nn.init.constant_(parameter, 1.5)
    return model


def vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(2)
    return AutoencoderKLCogVideoX(**VAE).eval().requires_grad_(False)


def t5(vocab_size: int | None = None, **changes: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3, **changes}
    config = T5Config(
        **sizes,
        vocab_size=vocab_size or len(WORDS),
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval().requires_grad_(False)


def phi(**changes: Any) -> Any:
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(4)
    config = Phi3Config(
        vocab_size=len(WORDS),
        hidden_size=PHI_WIDTH,
        **{"intermediate_size": 64, "num_hidden_layers": 3, **changes},
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = Phi3ForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = (
    SPECIAL
    + "a an the red blue circle square moves left right above below and of to name count say it is".split(" ")
)
CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer(append_eos: bool) -> Any:
    """A word-level tokenizer with T5's ending, or with Phi's chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    if append_eos:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=SPECIAL[4:], **names)
    if not append_eos:
        fast.chat_template = CHAT
    return fast


def save_t5(folder: Path, **changes: Any) -> Any:
    model = t5(**changes)
    model.save_pretrained(folder)
    tokenizer(append_eos=True).save_pretrained(folder)
    return model


def save_phi(folder: Path, **changes: Any) -> Any:
    model = phi(**changes)
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer(append_eos=False).save_pretrained(folder)
    return model


SCALED = ("old", "by header", "by layer")


def save_scaled(
    state: dict[str, torch.Tensor], file: Path, layout: str, only: tuple[str, ...] = (".to_",)
) -> dict[str, torch.Tensor]:
    """Writes `state` with some linear layers as scaled fp8, in one of the layouts SCALED. Returns the numbers
    that it stands for."""
    import json

    from safetensors.torch import save_file

    stored: dict[str, torch.Tensor] = {}
    numbers: dict[str, torch.Tensor] = {}
    form, layers = {"format": "float8_e4m3fn"}, []
    for name, tensor in state.items():
        numbers[name] = stored[name] = tensor.clone()
        if tensor.ndim != 2 or not any(part in name for part in only) or "bias" in name:
            continue
        base, scale = name.removesuffix(".weight"), tensor.abs().max() / 300
        layers.append(base)
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[base + (".scale_weight" if layout == "old" else ".weight_scale")] = scale
        if layout == "by layer":
            stored[f"{base}.comfy_quant"] = torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
        numbers[name] = stored[name].float() * scale
    if layout == "old":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    header = {"_quantization_metadata": json.dumps({"layers": dict.fromkeys(layers, form)})}
    save_file(stored, file, header if layout == "by header" else None)
    return numbers
