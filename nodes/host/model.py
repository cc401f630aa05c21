"""A CogVideoX transformer as the host's MODEL: its samplers, LoRA loader, offloading and previews all apply.

Tensors are (B, C, T, H, W) latents and (B, L, D) text tokens.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...mimir_core import memory, weights
from ...mimir_core.config import DiffusionConfig, DiTConfig
from ...mimir_core.diffusion import alphas_cumprod
from ...mimir_core.dit import CogVideoXTransformer
from ...mimir_core.scaled import dequantised, is_scaled
from .attention import PADDING, host_attention, log_choice
from .fp8 import Weights, as_they_are, keep_fine_parts
from .latent import MimirLatent
from .patcher import core_patcher

KEY = "mimir"
# The host's stand-in for a signal of exactly zero, whose sigma would be infinite.
ZERO_SNR = 4.8973451890853435e-08

# What a MODEL may be stored in: name in the combo -> (weight dtype, None for automatic; fp8 matrix products).
DTYPES: dict[str, tuple[torch.dtype | None, bool]] = {
    "default": (None, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "fp8_e4m3fn": (torch.float8_e4m3fn, False),
    "fp8_e4m3fn_fast": (torch.float8_e4m3fn, True),
    "fp8_e5m2": (torch.float8_e5m2, False),
}


def load_dit(
    path: Path, dtype: str = "default", disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """A CogVideoX transformer, from a safetensors file or a diffusers folder, as the host's MODEL.

    `dtype` is a key of DTYPES. ValueError, in one sentence, when the file is something else. The signature is
    also that of the host's reload factory (`cached_patcher_init`).
    """
    source = weights.read_transformer(path, plain=False, own=True)
    log_choice()
    config, found = _host_config(source.config, source.diffusion, dtype, source.state)
    source.state.clear()  # or changing the precision would hold both
    config.latent_format = MimirLatent(source.diffusion.latent_scale, source.header.get("preview"))
    model = MimirModel(config, source.config, source.diffusion)
    model.origin, model.note, model.path = source.origin, found.note, path
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else core_patcher()
    patcher = patcher_class(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    if config.unet_config["dtype"].itemsize == 1:
        keep_fine_parts(model.diffusion_model, found.state, cast=dtype != "default")
    _load_weights(model, found, assign=hasattr(patcher, "is_dynamic") and patcher.is_dynamic())
    patcher.cached_patcher_init = (load_dit, (path, dtype))
    if source.config.patch_size_t:
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, pad_frames(source.config.patch_size_t))
    return patcher


def _load_weights(model: Any, found: Weights, assign: bool) -> None:
    """Plain weights become the model's own, one after the other in its precision: none is there twice.

    Scaled ones, and those of a patcher that loads later (`assign`, 0.33), go through the host.
    """
    if found.kept or assign:
        model.load_model_weights(found.state, "", **({"assign": True} if assign else {}))
        return
    for name, parameter in model.diffusion_model.named_parameters():
        found.state[name] = found.state[name].to(parameter.dtype)
    model.diffusion_model.load_state_dict(found.state, assign=True)


class HostDiT(CogVideoXTransformer):
    """The transformer with the host's hooks: wrappers around the whole, patches of single blocks."""

    def __init__(
        self, dit: DiTConfig, dtype: Any = None, device: Any = None, operations: Any = None, **_: Any
    ) -> None:
        super().__init__(dit, ops=operations, attention=host_attention, device=device, dtype=dtype)
        self.dtype = dtype
        self.in_channels = dit.in_channels

    def forward(  # the host's order of arguments, which differs from the core's
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: Any = None,
        text_lengths: tuple[int, ...] = (),
        **_: Any,
    ) -> Tensor:
        """x (B, C, T, H, W), timestep (B,), context (B, L, D) -> velocity (B, C, T, H, W).

        text_lengths: how many of the L text tokens each item has; what stands before them is padding.
        """
        options = {} if transformer_options is None else transformer_options
        padding = tuple(context.shape[1] - length for length in text_lengths)
        if any(padding):
            options = {**options, PADDING: padding}
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        run = WrapperExecutor.new_class_executor(self._predict, self, wrappers)
        return run.execute(x, timestep, context, options)

    def _predict(
        self, x: Tensor, timestep: Tensor, context: Tensor, options: dict[str, Any], **_: Any
    ) -> Tensor:
        extra = -x.shape[2] % (self.config.patch_size_t or 1)
        if not extra:
            return super().forward(x, timestep, context, options=options)
        # A part of a video (context windows of 1.5): its first frame again in front completes the patches.
        return super().forward(_repeat_first(x, extra), timestep, context, options=options)[:, :, extra:]

    def run_blocks(self, video: Tensor, text: Tensor, temb: Tensor, rope: Any, options: Any) -> Tensor:
        """The core's loop, in which the host's patches may replace or follow a block."""
        replace = options.get("patches_replace", {}).get("dit", {})
        patches = options.get("patches", {}).get("double_block", [])
        options["total_blocks"], options["block_type"] = len(self.transformer_blocks), "double"
        for index, block in enumerate(self.transformer_blocks):
            options["block_index"] = index
            args = {"img": video, "txt": text, "vec": temb, "pe": rope, "transformer_options": options}
            patch = replace.get(("double_block", index))
            out = patch(args, {"original_block": _runner(block)}) if patch else _runner(block)(args)
            video, text = out["img"], out.get("txt", text)
            for after in patches:
                video = after({**args, "img": video, "txt": text, "block_index": index})["img"]
        return video


def _runner(block: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A block in the form that the host's block replacements call."""

    def run(args: dict[str, Any]) -> dict[str, Any]:
        video, text = block(args["img"], args["txt"], args["vec"], args["pe"], args["transformer_options"])
        return {"img": video, "txt": text}

    return run


class MimirSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """Zero-terminal-SNR v-prediction on the schedule that the model was trained with, SNR shift included."""

    def __init__(self, model_config: Any = None, zsnr: Any = None) -> None:
        super().__init__(model_config, zsnr=False)
        signal = alphas_cumprod(model_config.sampling_settings["diffusion"]).double().clone()  # (1000,)
        signal[-1] = ZERO_SNR
        self.set_sigmas(((1 - signal) / signal) ** 0.5)


class MimirModel(comfy.model_base.BaseModel):
    """CogVideoX in the host's wrapping."""

    def __init__(
        self, model_config: Any, dit: DiTConfig, diffusion: DiffusionConfig, device: Any = None
    ) -> None:
        super().__init__(
            model_config, comfy.model_base.ModelType.V_PREDICTION, device=device, unet_model=HostDiT
        )
        self.dit, self.diffusion = dit, diffusion
        self.origin: dict[str, str] | None = None  # which weights: {"file", "fingerprint"}
        self.note = ""  # for the person who loads it
        self.path: Path | None = None  # of the file or folder, for the trainer
        self.model_sampling = MimirSampling(model_config)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """Text tokens as they are: joint attention must not see them repeated to a common length."""
        out = super().extra_conds(**kwargs)
        tokens = kwargs.get("cross_attn")
        if tokens is not None:
            self._check_tokens(tokens)
            out["c_crossattn"] = TextTokens(tokens)
            out["text_lengths"] = TextLengths((tokens.shape[1],))
        return out

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.shape[-1] != self.dit.text_embed_dim:
            raise ValueError(
                f"The CONDITIONING is {tokens.shape[-1]} wide, but this Mimir DiT reads text tokens that are "
                f"{self.dit.text_embed_dim} wide. Encode the prompt with the T5 that belongs to this model."
            )


class TextTokens(comfy.conds.CONDRegular):
    """Text tokens (B, L, D) that share a batch with texts of another length: the shorter are padded in front.

    TextLengths says which tokens are padding; attention leaves them out, so that they change nothing.
    """

    def can_concat(self, other: Any) -> bool:
        mine, theirs = self.cond, other.cond
        return mine.shape[::2] == theirs.shape[::2] and mine.device == theirs.device

    def concat(self, others: Any) -> Tensor:
        texts = [self.cond, *(other.cond for other in others)]
        longest = max(text.shape[1] for text in texts)
        return torch.cat([F.pad(text, (0, 0, longest - text.shape[1], 0)) for text in texts])


class TextLengths(comfy.conds.CONDRegular):
    """The number of text tokens of each batch item, a tuple of whole numbers."""

    def process_cond(self, batch_size: int, **kwargs: Any) -> "TextLengths":
        return self._copy_with(self.cond * batch_size)

    def can_concat(self, other: Any) -> bool:
        return True

    def concat(self, others: Any) -> tuple[int, ...]:
        return tuple(length for part in (self, *others) for length in part.cond)

    def size(self) -> list[int]:
        return [len(self.cond)]


def pad_frames(multiple: int) -> Callable[..., Tensor]:
    """An OUTER_SAMPLE wrapper for CogVideoX 1.5, whose patches span `multiple` latent frames.

    Frames of noise go in front until the count is a multiple, and are dropped at the end, as in diffusers.
    """

    def outer_sample(
        executor: Any,
        noise: Tensor,
        latent: Tensor,
        sampler: Any,
        sigmas: Tensor,
        mask: Tensor | None = None,
        callback: Any = None,
        quiet: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        extra = -noise.shape[2] % multiple
        if extra:
            noise, latent = _front_noise(noise, extra, seed), _repeat_first(latent, extra)
            callback = _without_front(callback, extra)
            if mask is not None and mask.ndim == 5 and mask.shape[2] > 1:
                mask = _repeat_first(mask, extra)
            if kwargs.get("latent_shapes"):
                kwargs["latent_shapes"] = [latent.shape]
        out = executor(noise, latent, sampler, sigmas, mask, callback, quiet, seed, **kwargs)
        return out[:, :, extra:]

    return outer_sample


def _front_noise(noise: Tensor, extra: int, seed: int | None) -> Tensor:
    generator = torch.Generator().manual_seed((seed or 0) % 2**63)
    shape = (*noise.shape[:2], extra, *noise.shape[3:])
    front = torch.randn(shape, generator=generator, dtype=torch.float32).to(noise)
    return torch.cat((front, noise), dim=2)


def _repeat_first(x: Tensor, extra: int) -> Tensor:
    return torch.cat((x[:, :, :1].expand(-1, -1, extra, -1, -1), x), dim=2)


def _without_front(callback: Any, extra: int) -> Any:
    if callback is None:
        return None
    return lambda step, x0, x, total: callback(step, x0[:, :, extra:], x[:, :, extra:], total)


class _Config(comfy.supported_models_base.BASE):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]


def _host_config(
    dit: DiTConfig, diffusion: DiffusionConfig, dtype: str, state: Mapping[str, Tensor]
) -> tuple[_Config, Weights]:
    """The host's description of a model: what to build, how to sample, which dtypes; and weights for it."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype is '{dtype}', expected one of {', '.join(DTYPES)}")
    config = _Config({"image_model": KEY, "dit": dit})
    config.sampling_settings = {"diffusion": diffusion, "timesteps": diffusion.num_train_timesteps}
    config.memory_usage_factor = memory.host_factor(dit)
    wanted, fast = DTYPES[dtype]
    found = _weights(config, state, wanted, fast)
    if found.kept:
        config.custom_operations, wanted = found.operations, _automatic(config, state, None)
        if hasattr(type(config), "layer_quant_config"):  # 0.3.75 writes it into files that it saves
            config.layer_quant_config = found.layers
    wanted = wanted or _automatic(config, found.state, comfy.utils.weight_dtype(found.state))
    config.set_inference_dtype(wanted, _cast(config, wanted))
    config.optimizations["fp8"] = fast
    return config, found


def _weights(config: _Config, state: Mapping[str, Tensor], wanted: torch.dtype | None, fast: bool) -> Weights:
    """Scaled fp8 stays as it is unless another dtype is `wanted`, which it then becomes exactly once."""
    wide = wanted if wanted is not None and wanted.itemsize > 1 else None
    if is_scaled(state) and (wide or wanted == torch.float8_e5m2):
        return Weights(dequantised(state, wide or torch.bfloat16), None, {})
    stored = _automatic(config, state, None)
    return as_they_are(state, _cast(config, stored) or stored, torch.bfloat16, fast)


def _automatic(config: _Config, state: Mapping[str, Tensor], on_disk: torch.dtype | None) -> torch.dtype:
    """What the host stores a model in that has these weights."""
    return management.unet_dtype(
        model_params=sum(tensor.numel() for tensor in state.values()),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=on_disk,
    )


def _cast(config: _Config, stored: torch.dtype) -> torch.dtype | None:
    """What the host computes in with weights of dtype `stored`; None: in that dtype."""
    return management.unet_manual_cast(
        stored, management.get_torch_device(), config.supported_inference_dtypes
    )
