"""Plan Memory: gigabytes per stage before anything is loaded."""

from typing import Any

from comfy_api.latest import io

from .host import plan
from .host.model import DTYPES as DIT_DTYPES
from .host.phi import DEVICES as PHI_DEVICES
from .host.phi import DTYPES as PHI_DTYPES
from .host.report import say
from .host.vae import TILINGS
from .latent import FRAMES, SIZE, require_size
from .types import schema, widget

PARTS = {
    "dit": ("CogVideoX-5B (not on disk)", "The DiT, a name of Load Mimir DiT."),
    "t5": ("T5-XXL fp16 (not on disk)", "T5, a name of Load T5."),
    "phi": ("Phi-3.5-mini (not on disk)", "The language model, a name of Load Phi-3.5."),
    "fuser": (plan.NONE, "The Token Fuser; none is as small as an untrained one."),
    "vae": ("CogVideoX VAE (not on disk)", "The VAE, a name of Load CogVideoX VAE."),
}


class MimirPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirPlan",
            "Plan Memory",
            "Says before anything is loaded how many gigabytes each stage will take with these files at this "
            "size, whether that fits your card, what happens where it does not, and what would help. Reads "
            "the files' headers only; what is not on disk yet can be planned with as well.",
            is_output_node=True,
            inputs=[
                *(_part(kind) for kind in PARTS),
                widget(
                    io.Combo,
                    "dit_dtype",
                    options=list(DIT_DTYPES),
                    default="default",
                    tooltip="As in Load Mimir DiT.",
                ),
                widget(
                    io.Combo,
                    "phi_dtype",
                    options=list(PHI_DTYPES),
                    default="default",
                    tooltip="As in Load Phi-3.5.",
                ),
                widget(
                    io.Combo,
                    "phi_device",
                    options=list(PHI_DEVICES),
                    default="default",
                    tooltip="As in Load Phi-3.5: cpu keeps it off the card.",
                ),
                _int("width", 720, SIZE.low, SIZE.high, SIZE.step, "Pixels, a multiple of 16."),
                _int("height", 480, SIZE.low, SIZE.high, SIZE.step, "Pixels, a multiple of 16."),
                _int("frames", 49, FRAMES.low, FRAMES.high, FRAMES.step, "8 times a whole number, plus 1."),
                _int("batch", 1, 1, 64, 1, "How many videos at once."),
                widget(
                    io.Boolean,
                    "cfg",
                    default=True,
                    tooltip="Guidance, that is a cfg other than 1: the DiT then works on two videos at once.",
                ),
                _int("answer_length", 64, 0, 512, 1, "As in Phi-3.5 Encode."),
                widget(
                    io.Combo,
                    "tiling",
                    options=list(TILINGS),
                    default="auto",
                    tooltip="As in VAE Decode (Mimir).",
                ),
                widget(
                    io.Combo,
                    "card",
                    options=plan.CARDS,
                    default=plan.AUTOMATIC,
                    tooltip="automatic: this computer's. A number plans for a card with that many gigabytes.",
                ),
            ],
            outputs=[io.String.Output("plan", display_name="STRING", tooltip="The plan, as on the node.")],
            search_aliases=["vram", "memory estimate", "out of memory"],
        )

    @classmethod
    def validate_inputs(cls, width: int | None, height: int | None, frames: int | None) -> bool:
        return require_size(width, height, frames)

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> float:
        return float("nan")  # what is free on the card changes

    @classmethod
    def execute(
        cls, dit: str, t5: str, phi: str, fuser: str, vae: str, card: str, **settings: Any
    ) -> io.NodeOutput:
        require_size(settings["width"], settings["height"], settings["frames"])
        names = {"dit": dit, "t5": t5, "phi": phi, "fuser": fuser, "vae": vae}
        text = plan.plan(names, plan.Settings(**settings), card)
        return io.NodeOutput(text, ui=say(text))


def _part(kind: str) -> object:
    default, tooltip = PARTS[kind]
    return widget(io.Combo, kind, options=plan.KINDS[kind].choices(), default=default, tooltip=tooltip)


def _int(name: str, default: int, low: int, high: int, step: int, tooltip: str) -> object:
    return widget(io.Int, name, default=default, min=low, max=high, step=step, tooltip=tooltip)
