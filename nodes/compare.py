"""Videos side by side: any IMAGEs, or one prompt with every way of fusing it."""

from typing import Any

from comfy_api.latest import io

from .host import compare, sampling
from .types import INSPECT, MimirFuser, MimirTokens, schema, widget


class MimirCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        images = [
            widget(
                io.Image,
                letter,
                optional=letter not in "ab",
                tooltip=f"Video {letter}: the frames of a VAE Decode, shown pixel by pixel, never resampled.",
            )
            for letter in compare.NAMES
        ]
        return schema(
            "MimirCompare",
            "Compare Prompts",
            "Two to eight videos as one, in a grid with labels, for Create Video or Preview Image. A shorter "
            "video holds its last frame, a smaller one is centred.",
            category=INSPECT,
            inputs=[
                *images,
                widget(
                    io.String,
                    "labels",
                    multiline=True,
                    default="",
                    tooltip=(
                        "One line for each connected video, in order; long ones wrap. Empty: a, b, c ... "
                        "Characters that the built-in font lacks are written as their code."
                    ),
                ),
                _columns(),
            ],
            outputs=[
                io.Image.Output(
                    "grid",
                    display_name="IMAGE",
                    tooltip="The frames of the grid, as many as the longest video's.",
                )
            ],
            search_aliases=["side by side", "grid", "ablation"],
        )

    @classmethod
    def execute(cls, labels: str, columns: int, **images: Any) -> io.NodeOutput:
        videos = [images.get(letter) for letter in compare.NAMES]
        return io.NodeOutput(compare.compare_images(videos, labels, columns))


class MimirCompareFusions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirCompareFusions",
            "Compare Fusions",
            "One prompt, the same seed and noise, with T5 only, with the language model's raw tokens, with "
            "each row of the paper's ablation and with full fusion, as one grid video. The encoders run "
            "once; each variant is a Token Fuser, a Mimir DiT Sampler and a VAE Decode of its own.",
            category=INSPECT,
            enable_expand=True,
            inputs=[*_connected(), *_settings()],
            outputs=[
                io.Image.Output(
                    "grid", display_name="IMAGE", tooltip="The grid, for Create Video or Preview Image."
                )
            ],
            search_aliases=["ablation", "baseline", "side by side"],
        )

    @classmethod
    def validate_inputs(cls, variants: str | None) -> bool:
        return variants is None or bool(compare.chosen_variants(variants))  # raises, with the names there are

    @classmethod
    def execute(cls, variants: str, columns: int, **inputs: Any) -> io.NodeOutput:
        links = {name: inputs.pop(name) for name in LINKED}
        grid, graph = compare.expand(variants, columns, links, inputs)
        return io.NodeOutput(grid, expand=graph)


LINKED = {
    "model": (io.Model, "The DiT, from Load Mimir DiT or Load Mimir Tiny."),
    "positive": (io.Conditioning, "What to show, from T5 Encode: before any Token Fuser."),
    "positive_tokens": (MimirTokens, "The same prompt from Phi-3.5 Encode."),
    "negative": (
        io.Conditioning,
        "What to avoid, from T5 Encode (empty text for none): before any Token Fuser.",
    ),
    "negative_tokens": (MimirTokens, "The negative prompt from Phi-3.5 Encode."),
    "fuser": (
        MimirFuser,
        "From Load Token Fuser or Load Mimir Tiny. An untrained one gives T5 only throughout.",
    ),
    "vae": (io.Vae, "From Load CogVideoX VAE or Load Mimir Tiny."),
    "latent": (io.Latent, "The canvas from Empty Mimir Latent Video, the same for every variant."),
}


def _connected() -> list[Any]:
    """Inputs that reach `execute` as links, not as values, for the graph that takes this node's place."""
    return [
        widget(kind, name, tooltip=tooltip, extra_dict={"rawLink": True})
        for name, (kind, tooltip) in LINKED.items()
    ]


def _settings() -> list[Any]:
    return [
        widget(
            io.String,
            "variants",
            multiline=True,
            default="\n".join(compare.STANDARD),
            tooltip=(
                f"One to eight, one per line: {', '.join(compare.VARIANTS)}. A preset shows its row of the "
                "paper's ablation only with weights that were trained as that row. With other weights, for "
                "example those of 'mimir', it shows what happens when the trained fuser loses a part: "
                "decoder_only then sends raw tokens through a projection that was trained on normalised ones."
            ),
        ),
        widget(
            io.Int,
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="The same seed, and so the same noise, for every variant.",
        ),
        widget(io.Int, "steps", default=50, min=1, max=1000, tooltip="Steps of each variant."),
        widget(
            io.Float,
            "cfg",
            default=6.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="How strictly the prompt is followed. CogVideoX: 6. Mimir Tiny: 2.",
        ),
        widget(
            io.Combo,
            "dynamic_cfg",
            options=[sampling.OFF, *sampling.DYNAMIC],
            default=sampling.OFF,
            advanced=True,
            tooltip="How cfg changes over the steps, as in Mimir DiT Sampler.",
        ),
        widget(
            io.Combo,
            "sampler_name",
            options=sampling.SAMPLERS,
            default="euler",
            tooltip="euler is CogVideoX's DDIM.",
        ),
        widget(
            io.Combo,
            "scheduler",
            options=sampling.SCHEDULERS,
            default="simple",
            tooltip="simple gives the timesteps CogVideoX was made for.",
        ),
        _columns(),
    ]


def _columns() -> Any:
    return widget(
        io.Int,
        "columns",
        default=0,
        min=0,
        max=8,
        tooltip="Videos in a row. 0 fits the grid to a wide screen.",
    )
