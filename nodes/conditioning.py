"""Text that is encoded once: a finished condition as a file, for later or for people without encoders."""

from typing import Any

from comfy_api.latest import io

from ..mimir_core.conditioning import EXACT, PRECISIONS
from .host import conditioning as saved
from .host.report import say
from .types import schema, widget


class MimirSaveConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirSaveConditioning",
            "Save Conditioning (Mimir)",
            "Writes a finished condition to a small file in ComfyUI/output/mimir, with a header that says "
            "how it was made: prompt, instructions, answer, strength, and a fingerprint of every encoder. "
            "Whoever loads it needs neither T5 nor Phi-3.5 nor the fuser.",
            inputs=[
                widget(
                    io.Conditioning,
                    "positive",
                    tooltip="From Token Fuser, T5 Encode or any conditioning node after them.",
                ),
                widget(
                    io.Conditioning,
                    "negative",
                    optional=True,
                    tooltip="The negative prompt's, for the same file. Without one, zeros are loaded.",
                ),
                widget(
                    io.String,
                    "filename_prefix",
                    default="conditioning",
                    tooltip=(
                        "Name of the file below ComfyUI/output/mimir; a number is added. %date:yyyy-MM-dd% "
                        "becomes the date. It must be a name that Windows can store too."
                    ),
                ),
                widget(
                    io.Combo,
                    "dtype",
                    options=list(PRECISIONS),
                    default=EXACT,
                    tooltip=(
                        "exact: loading gives these tokens bit for bit. bfloat16: tokens of half the size, "
                        "rounded."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(
                    "path", display_name="path", tooltip="Where the file is. To share it, send this file."
                )
            ],
            is_output_node=True,
            search_aliases=["export conditioning", "cache text encoder"],
        )

    @classmethod
    def execute(cls, positive: Any, filename_prefix: str, dtype: str, negative: Any = None) -> io.NodeOutput:
        written = saved.save(positive, negative, filename_prefix, dtype)
        shown = {**say(written.report).as_dict(), "conditioning": [written.place]}
        return io.NodeOutput(str(written.path), ui=shown)


class MimirLoadConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirLoadConditioning",
            "Load Conditioning (Mimir)",
            "Reads a condition that Save Conditioning (Mimir) has written, so that a graph runs without any "
            "text encoder. Put a file that you were given into ComfyUI/input. The node shows how the "
            "condition was made, and what differs from whatever you connect for comparison.",
            inputs=[
                widget(
                    io.Combo,
                    "file",
                    options=saved.choices(),
                    tooltip=(
                        "Files of ComfyUI/input, where a shared file belongs, and of ComfyUI/output/mimir, "
                        "marked [output], which you have saved yourself; the newest first."
                    ),
                ),
                widget(
                    io.Conditioning,
                    "compare",
                    optional=True,
                    tooltip=(
                        "A condition of this graph, to be compared with the file's positive one. Its "
                        "encoders run."
                    ),
                ),
                widget(
                    io.Conditioning,
                    "compare_negative",
                    optional=True,
                    tooltip="The same for the negative one.",
                ),
                widget(
                    io.String,
                    "prompt",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip=(
                        "A prompt to compare with the file's, in a graph without encoders. Empty: not "
                        "compared."
                    ),
                ),
                widget(
                    io.String,
                    "instructions",
                    multiline=True,
                    optional=True,
                    default="",
                    tooltip="Instructions to compare with the file's, one per line. Empty: not compared.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", display_name="positive", tooltip="For any sampler."),
                io.Conditioning.Output(
                    "negative",
                    display_name="negative",
                    tooltip="For any sampler. Zeros, CogVideoX's own empty prompt, if the file has none.",
                ),
                io.String.Output(
                    "header", display_name="header", tooltip="How the condition was made, and what differs."
                ),
            ],
            search_aliases=["import conditioning", "prompt without text encoder"],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool:
        return file is None or saved.resolve(file).is_file()  # raises what is wrong, once

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> str:
        return saved.fingerprint(file)

    @classmethod
    def execute(
        cls,
        file: str,
        compare: Any = None,
        compare_negative: Any = None,
        prompt: str = "",
        instructions: str = "",
    ) -> io.NodeOutput:
        positive, negative, text = saved.load(file, compare, compare_negative, prompt, instructions)
        return io.NodeOutput(positive, negative, text, ui=say(text))
