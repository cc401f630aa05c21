"""The denoising loop: noise and a condition in, a latent video out."""

from typing import Any

from comfy_api.latest import io

from .host import sampling
from .host.report import say
from .types import schema, widget


class MimirSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirSampler",
            "Mimir DiT Sampler",
            "Turns noise into a latent video that follows the prompt. Without dynamic cfg it gives exactly "
            "what core's KSampler "
            "gives at the same settings; CogVideoX's own settings are 50 steps, cfg 6, euler, simple.",
            inputs=[
                widget(
                    io.Model,
                    "model",
                    tooltip="The DiT, from Load Mimir DiT or Load Mimir Tiny (LoRA nodes may sit between).",
                ),
                widget(
                    io.Conditioning,
                    "positive",
                    tooltip="What to show: from Token Fuser, or straight from T5 Encode.",
                ),
                widget(
                    io.Conditioning,
                    "negative",
                    tooltip=(
                        "What to avoid: an encoded negative prompt, empty text for none. Send it through a "
                        "Token Fuser of its own, as in training. It may have another number of tokens than "
                        "the positive one: both still run in one batch."
                    ),
                ),
                widget(
                    io.Latent,
                    "latent",
                    tooltip=(
                        "The canvas from Empty Mimir Latent Video, or a latent to vary (with denoise below "
                        "1)."
                    ),
                ),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed and settings give the same video.",
                ),
                widget(
                    io.Int,
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="More steps cost more time; 25 to 50 is usual.",
                ),
                widget(
                    io.Float,
                    "cfg",
                    default=6.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip=(
                        "How strictly the prompt is followed. CogVideoX: 6. Mimir Tiny: 2. 1 turns "
                        "guidance (and the negative prompt) off."
                    ),
                ),
                widget(
                    io.Combo,
                    "dynamic_cfg",
                    options=[sampling.OFF, *sampling.DYNAMIC],
                    default=sampling.OFF,
                    tooltip=(
                        "How cfg changes over the steps. 'cosine ramp (SAT)' rises from 1 to 1 + cfg as in "
                        "CogVideoX's original code; "
                        "'diffusers curve' is the one diffusers computes, which swings between the same "
                        "limits."
                    ),
                ),
                widget(
                    io.Combo,
                    "sampler_name",
                    options=sampling.SAMPLERS,
                    default="euler",
                    tooltip="euler is CogVideoX's DDIM; dpmpp_2m_sde adds noise on the way.",
                ),
                widget(
                    io.Combo,
                    "scheduler",
                    options=sampling.SCHEDULERS,
                    default="simple",
                    tooltip=(
                        "simple gives the timesteps CogVideoX was made for. karras and exponential waste "
                        "steps on pure noise."
                    ),
                ),
                widget(
                    io.Float,
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "1 starts from pure noise; lower values keep that much less of the latent that "
                        "comes in."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "samples", display_name="LATENT", tooltip="The latent video, for VAE Decode."
                )
            ],
            search_aliases=["cogvideox sampler", "ksampler video"],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: Any,
        seed: int,
        steps: int,
        cfg: float,
        dynamic_cfg: str,
        sampler_name: str,
        scheduler: str,
        denoise: float,
    ) -> io.NodeOutput:
        note = sampling.strange_base(model, positive)
        shown = say(note) if note else None  # before the long wait
        samples = sampling.sample(
            model,
            seed,
            steps,
            cfg,
            dynamic_cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent,
            denoise,
        )
        return io.NodeOutput(samples, ui=shown)
