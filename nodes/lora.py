"""Load Mimir LoRA: a LoRA for CogVideoX, whatever its layout, on a MODEL."""

from comfy_api.latest import io

from .host import files
from .host.lora import fingerprint, load_lora
from .host.report import say
from .types import schema, widget


class MimirLoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirLoadLora",
            "Load Mimir LoRA",
            "Changes the video model with a LoRA for CogVideoX from models/loras, in the layout of any "
            "trainer (diffusers, PEFT, finetrainers, kohya, VideoX-Fun, ComfyUI), and says which of its "
            "modules were matched. Several of these nodes in a row add up.",
            category="Mimir/loaders",
            inputs=[
                io.Model.Input("model", tooltip="The CogVideoX transformer, from Load Mimir DiT."),
                widget(
                    io.Combo,
                    "lora_name",
                    options=files.choices(files.LORA, folders=False),
                    tooltip=(
                        "A safetensors file. One that PEFT saved needs its adapter_config.json beside it, in "
                        "a folder of its own: its alpha is written there."
                    ),
                ),
                widget(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.001,
                    tooltip=(
                        "1 is as it was trained, 0 is without, below 0 is the opposite. A LoRA from "
                        "CogVideoX's own SAT code, like DimensionX, wants 1 / rank: 0.004 at rank 256."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("patched", display_name="MODEL", tooltip="The model with the LoRA."),
                io.String.Output(
                    "report",
                    display_name="STRING",
                    tooltip="How many modules were matched, rank and alpha, and every name that was not.",
                ),
            ],
            search_aliases=["lora loader", "cogvideox lora"],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, strength: float, **_: object) -> str:
        return f"{fingerprint(lora_name)} {strength}"

    @classmethod
    def execute(cls, model: io.Model.Type, lora_name: str, strength: float) -> io.NodeOutput:
        patched, summary, report = load_lora(model, files.resolve(files.LORA, lora_name), strength)
        return io.NodeOutput(patched, report, ui=say(summary))
