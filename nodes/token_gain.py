"""The weight of one piece of the prompt, on either branch."""

from typing import Any

from comfy_api.latest import io

from .host import inspect
from .host.report import say
from .types import INSPECT, MimirTokens, schema, widget


class MimirT5Gain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirT5Gain",
            "Token Gain (T5)",
            "Makes one piece of the prompt weigh more or less in what T5 has read. Between T5 Encode and "
            "Token Fuser. Gain 1 changes nothing, not even a bit.",
            category=INSPECT,
            inputs=[
                widget(io.Conditioning, "conditioning", tooltip="From T5 Encode, which knows its pieces."),
                *_choice(),
            ],
            outputs=[
                io.Conditioning.Output(
                    "changed", display_name="CONDITIONING", tooltip="For Token Fuser and Inspect Tokens."
                )
            ],
            search_aliases=["prompt weight", "emphasis"],
        )

    @classmethod
    def execute(cls, conditioning: Any, piece: str, occurrence: int, gain: float) -> io.NodeOutput:
        changed, words = inspect.gain_t5(conditioning, piece, occurrence, gain)
        return io.NodeOutput(changed, ui=say(words))


class MimirPhiGain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirPhiGain",
            "Token Gain (Phi-3.5)",
            "Makes one piece of the prompt, or of the answer, weigh more or less in what Phi-3.5 adds. "
            "Between Phi-3.5 Encode and Token Fuser. Gain 1 changes nothing, not even a bit.",
            category=INSPECT,
            inputs=[
                widget(MimirTokens, "tokens", tooltip="From Phi-3.5 Encode."),
                widget(
                    io.Combo,
                    "part",
                    options=inspect.PARTS,
                    default=inspect.PARTS[0],
                    tooltip="Where to look: 'query' is the prompt, 'answer' what the model answered.",
                ),
                *_choice(),
            ],
            outputs=[
                MimirTokens.Output(
                    "changed", display_name="MIMIR_TOKENS", tooltip="For Token Fuser and Inspect Tokens."
                )
            ],
            search_aliases=["prompt weight", "emphasis"],
        )

    @classmethod
    def execute(cls, tokens: Any, part: str, piece: str, occurrence: int, gain: float) -> io.NodeOutput:
        changed, words = inspect.gain_phi(tokens, part, piece, occurrence, gain)
        return io.NodeOutput(changed, ui=say(words))


def _choice() -> list[Any]:
    return [
        widget(
            io.String,
            "piece",
            default="",
            tooltip="A piece as Inspect Tokens shows it, or several in a row: a word, a phrase.",
        ),
        widget(
            io.Int,
            "occurrence",
            default=1,
            min=0,
            max=512,
            tooltip="Which one, where the piece is there more than once: 1 is the first, 0 means all.",
        ),
        widget(
            io.Float,
            "gain",
            default=1.0,
            min=0.0,
            max=4.0,
            step=0.05,
            tooltip="What the piece is multiplied by. 0 takes it out, 1 leaves it, 2 doubles it.",
        ),
    ]
