"""Loaders: one per part of Mimir. What a file is, is read from its keys and shapes, never from its name."""

from typing import Any

from comfy_api.latest import io, ui

from ..mimir_core.describe import describe
from .host import files
from .host.fuser import UNTRAINED, load_fuser, untrained_fuser
from .host.model import DTYPES, load_dit
from .host.phi import DEVICES as PHI_DEVICES
from .host.phi import DTYPES as PHI_DTYPES
from .host.phi import load_phi
from .host.report import say
from .host.t5 import load_t5
from .host.tiny import FOLDER, MIMIR, fuser_names, load_tiny
from .host.vae import load_vae
from .types import MimirFuser, schema, widget

LOADERS = "Mimir/loaders"


class MimirLoadTiny(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirLoadTiny",
            "Load Mimir Tiny (built-in)",
            "A complete, really trained Mimir at toy size, shipped with this pack: it shows what every node "
            "does within seconds, on any "
            "computer. It knows one small world: coloured circles, squares and triangles that move, appear "
            "and disappear, day and "
            "night. Use 64 x 64 with 9 frames and cfg 2.",
            category=LOADERS,
            inputs=[
                widget(
                    io.Combo,
                    "fuser_preset",
                    options=fuser_names(),
                    default=MIMIR,
                    tooltip=(
                        "The Token Fuser to load: 'mimir' is the trained one, 'untrained (identity)' shows "
                        "T5 alone."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="MODEL", tooltip="The tiny DiT, for Mimir DiT Sampler or KSampler."
                ),
                io.Clip.Output("clip_t5", display_name="CLIP (T5)", tooltip="For T5 Encode."),
                io.Clip.Output("clip_phi", display_name="CLIP (Phi)", tooltip="For Phi-3.5 Encode."),
                MimirFuser.Output("fuser", display_name="MIMIR_FUSER", tooltip="For Token Fuser."),
                io.Vae.Output("vae", display_name="VAE", tooltip="For VAE Decode."),
            ],
            search_aliases=["demo model", "built-in model"],
        )

    @classmethod
    def fingerprint_inputs(cls, fuser_preset: str) -> str:
        return fuser_preset + files.stamp(FOLDER)

    @classmethod
    def execute(cls, fuser_preset: str) -> io.NodeOutput:
        return io.NodeOutput(*load_tiny(fuser_preset))


class MimirLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirLoadModel",
            "Load Mimir DiT",
            "The video model: a CogVideoX transformer (2B, 5B or 1.5), from models/diffusion_models, as one "
            "safetensors file "
            "or as a diffusers folder.",
            category=LOADERS,
            inputs=[
                widget(
                    io.Combo,
                    "model_name",
                    options=files.choices(files.DIFFUSION),
                    tooltip="A CogVideoX text-to-video transformer: a file, or a folder with config.json.",
                ),
                widget(
                    io.Combo,
                    "dtype",
                    options=list(DTYPES),
                    default="default",
                    advanced=True,
                    tooltip=(
                        "default: what suits your device. fp8 halves the memory of the weights and costs a "
                        "little quality; "
                        "float32 is exact and slow."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model",
                    display_name="MODEL",
                    tooltip="For Mimir DiT Sampler, core's KSampler or a LoRA loader.",
                )
            ],
            search_aliases=["cogvideox loader", "unet loader"],
        )

    @classmethod
    def fingerprint_inputs(cls, model_name: str, dtype: str) -> str:
        return files.fingerprint(files.DIFFUSION, model_name) + dtype

    @classmethod
    def execute(cls, model_name: str, dtype: str) -> io.NodeOutput:
        patcher = load_dit(files.resolve(files.DIFFUSION, model_name), dtype)
        return io.NodeOutput(patcher, ui=_loaded(files.DIFFUSION, model_name, patcher.model))


class MimirLoadT5(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirLoadT5",
            "Load T5",
            "The encoder that reads the prompt word by word: T5 v1.1 XXL, from models/text_encoders. The "
            "file that ComfyUI users "
            "have for SD3, Flux or Mochi is the right one (fp16, fp8 and scaled fp8).",
            category=LOADERS,
            inputs=[
                widget(
                    io.Combo,
                    "t5_name",
                    options=files.choices(files.TEXT),
                    tooltip="A T5 encoder: a safetensors file such as t5xxl_fp16, or a Hugging Face folder.",
                ),
            ],
            outputs=[
                io.Clip.Output(
                    "clip", display_name="CLIP (T5)", tooltip="For T5 Encode, or core's CLIP Text Encode."
                )
            ],
            search_aliases=["clip loader", "t5xxl"],
        )

    @classmethod
    def fingerprint_inputs(cls, t5_name: str) -> str:
        return files.fingerprint(files.TEXT, t5_name)

    @classmethod
    def execute(cls, t5_name: str) -> io.NodeOutput:
        clip = load_t5(files.resolve(files.TEXT, t5_name))
        return io.NodeOutput(clip, ui=_loaded(files.TEXT, t5_name, clip.cond_stage_model))


class MimirLoadPhi(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirLoadPhi",
            "Load Phi-3.5",
            "The language model that understands the prompt as a whole: Phi-3.5-mini-instruct, from "
            "models/text_encoders, as "
            "the Hugging Face folder (its safetensors files, config.json and tokenizer files), or as one "
            "file with config.json and the tokenizer files beside it.",
            category=LOADERS,
            inputs=[
                widget(
                    io.Combo,
                    "phi_name",
                    options=files.choices(files.TEXT),
                    tooltip=(
                        "The folder of Phi-3.5-mini-instruct, or a safetensors file with the tokenizer "
                        "files beside it."
                    ),
                ),
                widget(
                    io.Combo,
                    "dtype",
                    options=list(PHI_DTYPES),
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How the weights are stored; default: as on disk. fp8_e4m3fn halves the memory: the "
                        "matrices of the layers become scaled fp8, all else stays as it is."
                    ),
                ),
                widget(
                    io.Combo,
                    "device",
                    options=PHI_DEVICES,
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip="cpu: it never goes to the graphics card, which then has more room for the DiT.",
                ),
            ],
            outputs=[io.Clip.Output("clip", display_name="CLIP (Phi)", tooltip="For Phi-3.5 Encode only.")],
            search_aliases=["phi3", "llm loader"],
        )

    @classmethod
    def fingerprint_inputs(cls, phi_name: str, dtype: str = "default", device: str = "default") -> str:
        return f"{files.fingerprint(files.TEXT, phi_name)} {dtype} {device}"

    @classmethod
    def execute(cls, phi_name: str, dtype: str = "default", device: str = "default") -> io.NodeOutput:
        clip = load_phi(files.resolve(files.TEXT, phi_name), dtype, device)
        return io.NodeOutput(clip, ui=_loaded(files.TEXT, phi_name, clip.cond_stage_model))


class MimirLoadFuser(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirLoadFuser",
            "Load Token Fuser",
            "The part that joins both readings of the prompt: a trained Token Fuser from models/mimir. "
            "Nobody has published a "
            "trained full-size fuser; 'untrained (identity)' leaves T5's condition exactly as it is.",
            category=LOADERS,
            inputs=[
                widget(
                    io.Combo,
                    "fuser_name",
                    options=[UNTRAINED, *files.choices(files.FUSER, folders=False)],
                    default=UNTRAINED,
                    tooltip=(
                        "A fuser that was trained with this T5, this Phi and this DiT; or no effect at all."
                    ),
                ),
            ],
            outputs=[MimirFuser.Output("fuser", display_name="MIMIR_FUSER", tooltip="For Token Fuser.")],
        )

    @classmethod
    def fingerprint_inputs(cls, fuser_name: str) -> str:
        return fuser_name if fuser_name == UNTRAINED else files.fingerprint(files.FUSER, fuser_name)

    @classmethod
    def execute(cls, fuser_name: str) -> io.NodeOutput:
        if fuser_name == UNTRAINED:
            return io.NodeOutput(untrained_fuser())
        fuser = load_fuser(files.resolve(files.FUSER, fuser_name))
        return io.NodeOutput(fuser, ui=_loaded(files.FUSER, fuser_name, fuser))


class MimirLoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirLoadVAE",
            "Load CogVideoX VAE",
            "The part that turns latents into frames and back: CogVideoX's VAE, from models/vae, as one "
            "safetensors file or as "
            "a diffusers folder. 2B, 5B and 1.5 have one each.",
            category=LOADERS,
            inputs=[
                widget(
                    io.Combo,
                    "vae_name",
                    options=files.choices(files.VAE),
                    tooltip="The VAE of the CogVideoX that you loaded: a file, or a folder with config.json.",
                ),
            ],
            outputs=[
                io.Vae.Output(
                    "vae", display_name="VAE", tooltip="For VAE Decode and VAE Encode, ours or core's."
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, vae_name: str) -> str:
        return files.fingerprint(files.VAE, vae_name)

    @classmethod
    def execute(cls, vae_name: str) -> io.NodeOutput:
        vae = load_vae(files.resolve(files.VAE, vae_name))
        return io.NodeOutput(vae, ui=_loaded(files.VAE, vae_name, vae))


def _loaded(key: str, name: str, model: Any) -> ui.PreviewText:
    """Says on the node what was loaded, and what became of it where that is not as one would expect."""
    found = describe(files.resolve(key, name), files.PARTS.get(key, ""))
    return say(" ".join(filter(None, (f"{found.line}.", getattr(model, "note", "")))))
