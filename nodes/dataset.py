"""What the trainer reads: videos to captioned clips, clips to features, or the built-in world."""

from typing import Any

from comfy_api.latest import io

from ..mimir_core.config import DEFAULT_INSTRUCTIONS
from ..mimir_core.data.config import DETECTORS
from .host import dataset, features
from .host.names import DATASETS, FEATURES, require_name, times_lost
from .host.report import say
from .types import schema, widget

CATEGORY = "Mimir/train"


class MimirPrepareDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirPrepareDataset",
            "Prepare Dataset",
            "Looks through a folder of videos: cuts them into shots, leaves out what is too short, too "
            "small, dark, flat or watermarked, and takes the captions from a .txt file beside each video. "
            "Nothing is copied or changed; the result is a list, with the reason for every clip that was "
            "left out. Run again, it does only what is new.",
            category=CATEGORY,
            inputs=[
                widget(
                    io.Combo,
                    "videos",
                    options=dataset.choices(),
                    tooltip=(
                        "A folder of ComfyUI/input that holds videos, or a link to one elsewhere. Captions: "
                        "a .txt or .json beside each video, or captions.csv in the folder."
                    ),
                ),
                widget(
                    io.String,
                    "name",
                    default="my_videos",
                    tooltip="The result is kept under this name in output/mimir/datasets.",
                ),
                widget(
                    io.Int,
                    "frames",
                    default=49,
                    min=9,
                    max=513,
                    step=8,
                    tooltip="Longest clip in frames: 49 for CogVideoX. Shorter shots are used with 33 or 17.",
                ),
                widget(
                    io.Int,
                    "width",
                    default=720,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip="Width to train at, in pixels. Smaller videos are left out: nothing is enlarged.",
                ),
                widget(
                    io.Int,
                    "height",
                    default=480,
                    min=64,
                    max=2048,
                    step=16,
                    tooltip=(
                        "Height to train at, in pixels. Videos from 0.8 to 1.6 of its shape are cropped."
                    ),
                ),
                widget(
                    io.Float,
                    "fps",
                    default=8.0,
                    min=1.0,
                    max=60.0,
                    step=0.5,
                    tooltip="Frames per second that the model sees: 8 for CogVideoX, 16 for 1.5.",
                ),
                widget(
                    io.Combo,
                    "shots",
                    options=list(DETECTORS),
                    default="adaptive",
                    tooltip=(
                        "How cuts are found, by PySceneDetect: relative to the neighbouring frames, or by a "
                        "fixed difference. none: every file is one shot."
                    ),
                ),
                widget(
                    io.Float,
                    "min_brightness",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Mean brightness, 0 to 1, below which a clip is too dark.",
                ),
                widget(
                    io.Float,
                    "min_aesthetic",
                    default=0.15,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="A plain measure of contrast, colour and sharpness, 0 to 1. 0 keeps everything.",
                ),
                widget(
                    io.Float,
                    "max_watermark",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Edges that stand still while the picture moves, 0 to 1. 1 keeps everything.",
                ),
            ],
            outputs=[
                io.String.Output("dataset", display_name="dataset", tooltip="Its name, for Cache Features."),
                io.String.Output(
                    "report", display_name="report", tooltip="How many clips each stage left out, and why."
                ),
            ],
            is_output_node=True,
            search_aliases=["load videos", "video dataset", "captions"],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool:
        return require_name(name)

    @classmethod
    def fingerprint_inputs(cls, videos: str, name: str = "", **_: Any) -> str:
        return f"{dataset.fingerprint(videos)} {times_lost(f'{DATASETS}/{name}')}"

    @classmethod
    def execute(cls, videos: str, name: str, **limits: Any) -> io.NodeOutput:
        made = dataset.prepare(videos, name, dataset.configured(**limits))
        shown = {**say(made.report).as_dict(), "images": made.pictures}
        return io.NodeOutput(made.name, made.report, ui=shown)


class MimirCacheFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirCacheFeatures",
            "Cache Features",
            "Reads every clip once with the VAE and every caption once with T5 and Phi-3.5, and keeps what "
            "they say. Training then needs none of the three. An answer of Phi-3.5 scatters, so each caption "
            "is answered several times. When it was interrupted, run it again: it goes on.",
            category=CATEGORY,
            inputs=[
                widget(io.Clip, "clip_t5", tooltip="T5, from Load T5, as for T5 Encode."),
                widget(io.Clip, "clip_phi", tooltip="Phi-3.5, from Load Phi-3.5."),
                widget(io.Vae, "vae", tooltip="The VAE of the CogVideoX that will be trained."),
                widget(
                    io.String,
                    "dataset",
                    default="my_videos",
                    tooltip="A prepared dataset: from Prepare Dataset, or the name of an earlier one.",
                ),
                widget(
                    io.String,
                    "name",
                    default="my_features",
                    tooltip="The result is kept under this name in output/mimir/features.",
                ),
                widget(
                    io.Int,
                    "answers",
                    default=3,
                    min=1,
                    max=16,
                    tooltip="How often Phi-3.5 answers each caption. 1 takes the likeliest answer only.",
                ),
                widget(
                    io.Int,
                    "answer_length",
                    default=64,
                    min=0,
                    max=512,
                    tooltip="How many tokens an answer may have, as in Phi-3.5 Encode.",
                ),
                widget(
                    io.Float,
                    "temperature",
                    default=0.7,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much answers to one caption differ. Not used for a single answer.",
                ),
                widget(
                    io.String,
                    "instructions",
                    multiline=True,
                    default="\n".join(DEFAULT_INSTRUCTIONS),
                    tooltip=(
                        "One instruction per line. Use the same ones in Phi-3.5 Encode with the fuser that "
                        "is trained on these."
                    ),
                ),
                widget(
                    io.Int,
                    "layer",
                    default=-1,
                    min=-64,
                    max=64,
                    advanced=True,
                    tooltip="The hidden state of Phi-3.5 that the fuser will read, as in Phi-3.5 Encode.",
                ),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Of the answers. The same seed gives the same features, bit for bit on a CPU.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "features", display_name="features", tooltip="Their name, for Train Token Fuser."
                ),
                io.String.Output("report", display_name="report", tooltip="How many clips there are."),
            ],
            is_output_node=True,
            search_aliases=["make training dataset", "encode dataset"],
        )

    @classmethod
    def validate_inputs(cls, dataset: str | None = None, name: str | None = None) -> bool:
        return require_name(dataset) and require_name(name)

    @classmethod
    def fingerprint_inputs(cls, dataset: str | None = None, name: str = "", **_: Any) -> str:
        return f"{features.fingerprint_clips(dataset)} {times_lost(f'{FEATURES}/{name}')}"

    @classmethod
    def execute(
        cls,
        clip_t5: Any,
        clip_phi: Any,
        vae: Any,
        dataset: str,
        name: str,
        instructions: str,
        **settings: Any,
    ) -> io.NodeOutput:
        lines = tuple(line.strip() for line in instructions.splitlines() if line.strip())
        encoders = (clip_t5, clip_phi, vae)
        report = features.cache_features(dataset, name, encoders, instructions=lines, **settings)
        return io.NodeOutput(name, report, ui=say(report))


class MimirWorldFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirWorldFeatures",
            "Built-in World Features",
            "Training material without any videos: captioned clips of Mimir Tiny's own world of circles, "
            "squares and triangles, read by its own encoders. With it Train Token Fuser can be tried within "
            "minutes, on any computer.",
            category=CATEGORY,
            inputs=[
                widget(
                    io.Int,
                    "clips",
                    default=256,
                    min=32,
                    max=16384,
                    step=32,
                    tooltip="How many clips are rendered; 256 take some ten seconds. Each has two captions.",
                ),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Another seed renders other scenes.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "features",
                    display_name="features",
                    tooltip="Their name, for Train Token Fuser with the MODEL of Load Mimir Tiny.",
                ),
                io.String.Output("report", display_name="report", tooltip="Some of the captions."),
            ],
            search_aliases=["toy dataset", "demo dataset"],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return str(times_lost(features.WORLD))

    @classmethod
    def execute(cls, clips: int, seed: int) -> io.NodeOutput:
        name, report = features.world_features(clips, seed)
        return io.NodeOutput(name, report, ui=say(report))
