"""Token Fuser: the language model's understanding, added to T5's tokens."""

from typing import Any

from comfy_api.latest import io

from .host import fuser as fusion
from .host.report import say
from .types import MimirFuser, MimirTokens, schema, widget


class MimirTokenFuser(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirTokenFuser",
            "Token Fuser",
            "Adds what the language model understood to what T5 has read. The result is an ordinary "
            "condition for any sampler. "
            "With an untrained fuser, or at strength 0, it is T5's condition, bit for bit.",
            inputs=[
                widget(io.Conditioning, "conditioning", tooltip="From T5 Encode, with the same prompt."),
                widget(MimirTokens, "tokens", tooltip="From Phi-3.5 Encode, with the same prompt."),
                widget(MimirFuser, "fuser", tooltip="From Load Token Fuser or Load Mimir Tiny."),
                widget(
                    io.Combo,
                    "preset",
                    options=fusion.PRESETS,
                    default=fusion.AS_TRAINED,
                    tooltip=(
                        "'as trained' is what you want. The others are the rows of the paper's ablation, to "
                        "see what each part does: "
                        "each needs weights that were trained with it."
                    ),
                ),
                widget(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much is added. 0 is T5 alone, 1 as trained.",
                ),
                widget(
                    io.Float,
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "From which part of the sampling on the fused condition holds; before it, T5 alone."
                    ),
                ),
                widget(
                    io.Float,
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Up to which part of the sampling the fused condition holds; after it, T5 alone.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "fused",
                    display_name="CONDITIONING",
                    tooltip="For Mimir DiT Sampler, KSampler or any guider.",
                )
            ],
            search_aliases=["mimir fusion"],
        )

    @classmethod
    def validate_inputs(cls, start: float | None, end: float | None) -> bool:
        return fusion.require_range(start, end)  # raises: a returned sentence is shown once per argument

    @classmethod
    def execute(
        cls,
        conditioning: Any,
        tokens: Any,
        fuser: Any,
        preset: str,
        strength: float,
        start: float,
        end: float,
    ) -> io.NodeOutput:
        fused, report = fusion.fuse(fuser, conditioning, tokens, preset, strength, (start, end))
        return io.NodeOutput(fused, ui=say(report))
