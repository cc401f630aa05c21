"""Model File Info: what a file is before it is loaded."""

from comfy_api.latest import io

from ..mimir_core.describe import describe
from .host import files
from .host.report import say
from .types import schema, widget


class MimirInspectFile(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirInspectFile",
            "Model File Info",
            "Says what a model file is without loading it: which model, its precision, its size on disk, the "
            "memory its weights will need, and which node takes it; or why none does, and what to use "
            "instead.",
            category="Mimir/loaders",
            is_output_node=True,
            inputs=[
                widget(
                    io.Combo,
                    "file",
                    options=files.everything(),
                    tooltip="Any model file or folder in the folders that Mimir's loaders read.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "info", display_name="STRING", tooltip="What the file is, as shown on the node."
                )
            ],
            search_aliases=["inspect model", "what is this file", "safetensors info"],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return files.fingerprint(*files.split(file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        key, name = files.split(file)
        found = describe(files.resolve(key, name), files.PARTS.get(key, ""))
        return io.NodeOutput(found.text, ui=say(found.text))
