"""Training of a Token Fuser inside ComfyUI, and the file that it becomes."""

from typing import Any

from comfy_api.latest import io

from ..mimir_core.config import FUSER_PRESETS, LLM_TOKENS
from ..mimir_core.train.config import MODES, OPTIMISERS
from .host import training
from .host.features import fingerprint_features
from .host.names import RUNS, require_name, times_lost
from .host.report import say
from .types import MimirFuser, schema, widget

CATEGORY = "Mimir/train"


class MimirTrainFuser(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirTrainFuser",
            "Train Token Fuser",
            "Trains the part that joins both readings of the prompt, on cached features; with it a LoRA or "
            "the whole video model, if you wish. Interrupt it at any time: a checkpoint is kept, and the "
            "same settings go on from there. Other settings begin a run of their own beside it.",
            category=CATEGORY,
            inputs=[
                widget(
                    io.Model,
                    "model",
                    tooltip=("The DiT, straight from Load Mimir DiT or Load Mimir Tiny: its file is read."),
                ),
                widget(
                    io.String,
                    "features",
                    default="my_features",
                    tooltip=(
                        "From Cache Features or Built-in World Features. Or the name of earlier ones: then "
                        "no encoder has to be loaded."
                    ),
                ),
                widget(
                    io.String,
                    "name",
                    default="my_fuser",
                    tooltip="The run is kept under this name and a number in output/mimir/training.",
                ),
                widget(
                    io.Combo,
                    "train",
                    options=list(MODES),
                    default="fuser",
                    tooltip=(
                        "What learns. fuser: the fuser alone. fuser+lora: also a LoRA on the DiT. fuser+dit: "
                        "both whole, as in the paper. dit: the DiT without a fuser, to compare with."
                    ),
                ),
                widget(
                    io.Int,
                    "steps",
                    default=2000,
                    min=1,
                    max=10_000_000,
                    tooltip="How long. A finished run goes on when this is raised.",
                ),
                widget(
                    io.Int,
                    "batch",
                    default=8,
                    min=1,
                    max=4096,
                    tooltip="How many clips one step learns from.",
                ),
                widget(
                    io.Float,
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-6,
                    round=1e-7,
                    tooltip="Of the fuser and of a LoRA. Mimir Tiny with muon likes 0.06.",
                ),
                widget(
                    io.Int,
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,
                    tooltip="The same seed repeats the same run, on a CPU bit for bit.",
                ),
                widget(
                    io.Combo,
                    "preset",
                    options=list(FUSER_PRESETS),
                    default="mimir",
                    advanced=True,
                    tooltip="Which row of the paper's ablation a new fuser is; mimir is the whole method.",
                ),
                widget(
                    io.Combo,
                    "llm_tokens",
                    options=list(LLM_TOKENS),
                    default="query+answer",
                    advanced=True,
                    tooltip="What of Phi-3.5 a new fuser reads: the prompt's tokens, the answer's, or both.",
                ),
                widget(
                    io.Int,
                    "micro_batch",
                    default=1,
                    min=1,
                    max=4096,
                    advanced=True,
                    tooltip=("Clips at once; divides batch. 1 takes the least memory, more is faster."),
                ),
                widget(
                    io.Float,
                    "learning_rate_dit",
                    default=1e-5,
                    min=0.0,
                    max=1.0,
                    step=1e-6,
                    round=1e-7,
                    advanced=True,
                    tooltip="Of the DiT's own weights, where it trains whole.",
                ),
                widget(
                    io.Int,
                    "lora_rank",
                    default=64,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip="Size of the LoRA, where there is one; alpha is the same.",
                ),
                widget(
                    io.Combo,
                    "optimiser",
                    options=list(OPTIMISERS),
                    default="adamw",
                    advanced=True,
                    tooltip="adamw for real models; muon learns faster on toys and wants larger rates.",
                ),
                widget(
                    io.Int,
                    "warmup",
                    default=100,
                    min=0,
                    max=100_000,
                    advanced=True,
                    tooltip="Steps in which the learning rate rises from zero.",
                ),
                widget(
                    io.Float,
                    "dropout",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of captions that become the empty prompt, which cfg needs.",
                ),
                widget(
                    io.Float,
                    "doubt",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip=(
                        "Share of captions that T5 reads badly or not at all. Without it Phi-3.5 is not "
                        "listened to: T5 understands the training captions by itself."
                    ),
                ),
                widget(
                    io.Combo,
                    "precision",
                    options=list(training.PRECISIONS),
                    default="auto",
                    advanced=True,
                    tooltip="Of the computation. auto: bfloat16 for large models on cards that have it.",
                ),
                widget(
                    io.Boolean,
                    "checkpointing",
                    default=False,
                    advanced=True,
                    tooltip="Computes each block twice: less memory, a third more time.",
                ),
                widget(
                    io.Int,
                    "save_every",
                    default=250,
                    min=1,
                    max=1_000_000,
                    advanced=True,
                    tooltip="Steps between two checkpoints, of which the last two are kept.",
                ),
                widget(
                    MimirFuser,
                    "fuser",
                    optional=True,
                    tooltip="A trained fuser to go on from; without one a new fuser is made.",
                ),
            ],
            outputs=[
                MimirFuser.Output(
                    "trained_fuser",
                    display_name="MIMIR_FUSER",
                    tooltip="For Token Fuser and Save Token Fuser.",
                ),
                io.Model.Output(
                    "trained_model",
                    display_name="MODEL",
                    tooltip="The DiT for this fuser: with its LoRA, newly trained, or as it came.",
                ),
                io.LossMap.Output(
                    "loss",
                    display_name="LOSS_MAP",
                    tooltip="For core's Plot Loss Graph: the whole run, smoothed.",
                ),
                io.String.Output("report", display_name="report", tooltip="Loss, and where the files are."),
            ],
            is_output_node=True,
            is_experimental=True,
            search_aliases=["train mimir", "train lora", "fine-tune"],
        )

    @classmethod
    def validate_inputs(cls, features: str | None = None, name: str | None = None) -> bool:
        return require_name(features) and require_name(name)

    @classmethod
    def fingerprint_inputs(cls, features: str | None = None, name: str = "", **_: Any) -> str:
        return f"{fingerprint_features(features)} {times_lost(f'{RUNS}/{name}')}"

    @classmethod
    def execute(
        cls, model: Any, features: str, name: str, precision: str, fuser: Any = None, **settings: Any
    ) -> io.NodeOutput:
        done = training.train(model, features, name, fuser, precision, settings)
        return io.NodeOutput(done.fuser, done.model, done.losses, done.report, ui=say(done.report))


class MimirSaveFuser(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirSaveFuser",
            "Save Token Fuser",
            "Writes a trained fuser to a safetensors file whose header says what it was trained on: base "
            "model, encoders, features, steps. Nothing is overwritten.",
            category=CATEGORY,
            inputs=[
                widget(MimirFuser, "fuser", tooltip="From Train Token Fuser, or any other one."),
                widget(
                    io.String,
                    "name",
                    default="my_fuser",
                    tooltip="Name of the file. If another fuser has it already, a number is added.",
                ),
                widget(
                    io.Combo,
                    "folder",
                    options=list(training.FOLDERS),
                    default=training.FOLDERS[0],
                    tooltip="models/mimir is where Load Token Fuser looks; press R to see it there.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where the file is.")],
            is_output_node=True,
            search_aliases=["export fuser"],
        )

    @classmethod
    def validate_inputs(cls, name: str | None = None) -> bool:
        return require_name(name)

    @classmethod
    def fingerprint_inputs(cls, name: str = "", folder: str = "", **_: Any) -> str:
        return str(times_lost(f"{folder}/{name}"))

    @classmethod
    def execute(cls, fuser: Any, name: str, folder: str) -> io.NodeOutput:
        path, report = training.save(fuser, name, folder)
        return io.NodeOutput(path, ui=say(report))
