"""Token Map: where the tokens of both branches lie, over prompts and over answers."""

import json
from typing import Any

from comfy_api.latest import io

from .host import inspect
from .host.report import say
from .types import INSPECT, MimirFuser, schema, widget

EXAMPLES = (
    "a red circle moves left above a blue square",
    "two green triangles at night",
    "a yellow square appears",
    "a blue circle moves up",
)


class MimirTokenMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirTokenMap",
            "Token Map (t-SNE, PCA)",
            "Two maps of tokens: those of T5, of Phi-3.5 and of the fused condition over a list of prompts, "
            "and those of one prompt over many sampled answers, with the scatter as a number.",
            category=INSPECT,
            is_output_node=True,
            inputs=[
                widget(
                    io.String,
                    "prompts",
                    multiline=True,
                    default="\n".join(EXAMPLES),
                    tooltip="One prompt per line. The second map is made of the first one.",
                ),
                widget(io.Clip, "t5", tooltip="T5, as for T5 Encode."),
                widget(io.Clip, "phi", tooltip="Phi-3.5, from Load Phi-3.5 or Load Mimir Tiny."),
                widget(MimirFuser, "fuser", tooltip="From Load Token Fuser or Load Mimir Tiny."),
                *_settings(),
            ],
            outputs=[
                io.Image.Output("image", display_name="IMAGE", tooltip="Both maps, a row per method."),
                io.String.Output("report", display_name="STRING", tooltip="The numbers, as JSON."),
            ],
            search_aliases=["tsne", "scatter", "embedding map", "figure 7"],
        )

    @classmethod
    def execute(cls, t5: Any, phi: Any, fuser: Any, **settings: Any) -> io.NodeOutput:
        image, numbers, text = inspect.token_map(t5, phi, fuser, **settings)
        shown = json.dumps(numbers, ensure_ascii=False, allow_nan=False)
        return io.NodeOutput(image, shown, ui=say(text))


def _settings() -> list[Any]:
    return [
        widget(
            io.Combo,
            "method",
            options=inspect.METHODS,
            default=inspect.METHODS[0],
            tooltip="PCA needs nothing; t-SNE needs the package scikit-learn.",
        ),
        widget(
            io.Int,
            "runs",
            default=12,
            min=2,
            max=200,
            tooltip="How many answers to the first prompt are sampled, each with a seed of its own.",
        ),
        widget(
            io.Int,
            "answer_length",
            default=32,
            min=0,
            max=512,
            tooltip="How many tokens each answer may have; 0 for none.",
        ),
        widget(
            io.Float,
            "temperature",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="With 0 every run gives the same answer, and nothing scatters.",
        ),
        widget(
            io.Int,
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            tooltip="Of the first run, and of t-SNE. The same seed gives the same maps.",
        ),
    ]
