"""Two readings of one prompt: T5's, which the DiT was trained on, and the language model's."""

from typing import Any

from comfy_api.latest import io

from ..mimir_core.config import DEFAULT_INSTRUCTIONS
from .host import phi, t5
from .host.report import say
from .types import MimirTokens, schema, widget

MAX_ANSWER = 512


class MimirT5Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirT5Encode",
            "T5 Encode",
            "Reads the prompt word by word. The result is a complete condition of its own: give it to the "
            "sampler, or to Token "
            "Fuser first. T5 reads about 170 words; the node says what it had to cut.",
            inputs=[
                widget(
                    io.Clip,
                    "clip",
                    tooltip=(
                        "T5-XXL from Load T5, Load Mimir Tiny, core's Load CLIP (any type) or a GGUF loader: "
                        "all give the same condition."
                    ),
                ),
                widget(
                    io.String,
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The prompt, in plain words. Brackets and weights have no meaning here.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    "conditioning",
                    display_name="CONDITIONING",
                    tooltip="T5's tokens, for Token Fuser or the sampler.",
                )
            ],
            search_aliases=["clip text encode", "prompt"],
        )

    @classmethod
    def execute(cls, clip: Any, text: str) -> io.NodeOutput:
        conditioning, report = t5.encode(clip, text)
        return io.NodeOutput(conditioning, ui=say(report))


class MimirPhiEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirPhiEncode",
            "Phi-3.5 Encode",
            "Lets the language model read the prompt, answer it, and think about it under each instruction. "
            "Token Fuser adds these "
            "thoughts to what T5 has read.",
            inputs=[
                widget(io.Clip, "clip", tooltip="Phi-3.5, from Load Phi-3.5 or Load Mimir Tiny."),
                widget(
                    io.String,
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The same prompt that T5 Encode gets. Any length.",
                ),
                widget(
                    io.String,
                    "instructions",
                    multiline=True,
                    default="\n".join(DEFAULT_INSTRUCTIONS),
                    tooltip=(
                        "What to pay attention to, one instruction per line. A trained fuser expects as "
                        "many as it was trained with: four."
                    ),
                ),
                widget(
                    io.Int,
                    "answer_length",
                    default=64,
                    min=0,
                    max=MAX_ANSWER,
                    tooltip=(
                        "How many tokens the answer may have; 0 for none. It ends earlier where the model "
                        "ends it."
                    ),
                ),
                widget(
                    io.Float,
                    "temperature",
                    default=0.7,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="0 always gives the likeliest answer; higher values vary it with the seed.",
                ),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip=(
                        "The same seed gives the same answer. Prompt tokens and instruction tokens do not "
                        "depend on it."
                    ),
                ),
                widget(
                    io.Int,
                    "layer",
                    default=-1,
                    min=-64,
                    max=64,
                    advanced=True,
                    tooltip=(
                        "Which hidden state is handed on: -1 is the last one (after the final norm), -2 the "
                        "one before, 0 the word embedding. "
                        "A trained fuser expects the layer that it was trained with."
                    ),
                ),
            ],
            outputs=[
                MimirTokens.Output("tokens", display_name="MIMIR_TOKENS", tooltip="For Token Fuser."),
                io.String.Output(
                    "answer", display_name="answer", tooltip="What the language model answered, in words."
                ),
            ],
            search_aliases=["llm", "phi3 encode"],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        text: str,
        instructions: str,
        answer_length: int,
        temperature: float,
        seed: int,
        layer: int,
    ) -> io.NodeOutput:
        lines = tuple(line.strip() for line in instructions.splitlines() if line.strip())
        tokens = phi.encode(clip, text, lines, answer_length, temperature, seed, layer)
        return io.NodeOutput(tokens, tokens.answer_text, ui=say(phi.report(tokens, text)))
