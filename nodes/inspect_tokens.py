"""Inspect Tokens: what T5 read, what the language model added, token by token."""

import json
from typing import Any

from comfy_api.latest import io

from .host import fuser as fusion
from .host import inspect
from .host.report import say
from .types import INSPECT, MimirFuser, MimirTokens, schema, widget


class MimirInspectTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirInspectTokens",
            "Inspect Tokens",
            "Shows what T5 and Phi-3.5 read, piece by piece: what was cut or padded, the answer, norms, who "
            "makes how much of the fused sum, the instruction tokens, and how values are spread. Connect "
            "what Token Fuser gets.",
            category=INSPECT,
            is_output_node=True,
            inputs=[
                widget(io.Conditioning, "conditioning", tooltip="From T5 Encode, before Token Fuser."),
                widget(MimirTokens, "tokens", tooltip="From Phi-3.5 Encode, with the same prompt."),
                widget(MimirFuser, "fuser", tooltip="The one that Token Fuser gets, trained or not."),
                widget(
                    io.Combo,
                    "preset",
                    options=fusion.PRESETS,
                    default=fusion.AS_TRAINED,
                    tooltip="As in Token Fuser: 'as trained', or a row of the paper's ablation.",
                ),
                widget(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="As in Token Fuser: how much is added. 0 is T5 alone.",
                ),
            ],
            outputs=[
                io.Image.Output("image", display_name="IMAGE", tooltip="One picture of all of it."),
                io.String.Output("report", display_name="STRING", tooltip="All numbers and pieces, as JSON."),
            ],
            search_aliases=["token strip", "histogram", "figure 7"],
        )

    @classmethod
    def execute(
        cls, conditioning: Any, tokens: Any, fuser: Any, preset: str, strength: float
    ) -> io.NodeOutput:
        image, report, text = inspect.inspect_tokens(fuser, conditioning, tokens, preset, strength)
        shown = {**say(text).as_dict(), "mimir_inspect": [report]}
        return io.NodeOutput(image, json.dumps(report, ensure_ascii=False, allow_nan=False), ui=shown)
