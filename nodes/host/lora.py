"""LoRA files as patches of a MODEL: the host applies them when it loads weights, in part or whole.

They go again with the patcher that carries them.
"""

import logging
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.weight_adapter

from ...mimir_core.lora import PEFT_SETTINGS, Adapter, match_lora, without_effect
from ...mimir_core.recognise import from_comfy
from . import files

log = logging.getLogger(__name__)

PREFIX = "diffusion_model."


def load_lora(
    model: comfy.model_patcher.ModelPatcher, path: Path, strength: float
) -> tuple[comfy.model_patcher.ModelPatcher, str, str]:
    """(a clone of `model` with the LoRA, one line that says what was matched, the full report).

    The model that came in stays as it is; at strength 0 it is what goes out. ValueError, one sentence, when
    the file or the model is the wrong one.
    """
    names = _names(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.model.state_dict().items()}
    match = match_lora(path, {ours: shapes[theirs] for ours, theirs in names.items()})
    summary = match.summary
    if match.left:
        log.warning("Mimir: %s: only a part of this LoRA is applied.\n%s", path.name, match.report)
        summary = f"Only a part of this LoRA is applied: {summary}"
    if strength == 0:
        return model, f"Strength 0, so it has no effect: {summary}", match.report
    adapters = match.load()
    if without_effect(adapters) and not match.idle:
        summary += "; it has no effect, since what it adds is all zeros"
    patched = model.clone()
    for module, adapter in adapters.items():
        for patches in _patches(module, adapter, names):
            if len(patched.add_patches(patches, strength)) != len(patches):
                raise RuntimeError(f"{path.name}: the host did not take {', '.join(patches)}")
    return patched, summary, match.report


def fingerprint(name: str) -> str:
    """Changes when the file changes, or PEFT's settings beside it."""
    found = files.fingerprint(files.LORA, name)
    if found == "missing":
        return found
    return found + files.stamp(files.resolve(files.LORA, name).parent / PEFT_SETTINGS)


def _names(model: comfy.model_patcher.ModelPatcher) -> dict[str, str]:
    """{diffusers' name: the host's name} of all parameters; also for the host's native CogVideoX."""
    keys = {key[len(PREFIX) :]: key for key in model.model.state_dict() if key.startswith(PREFIX)}
    native = any(name.startswith("blocks.") for name in keys)
    names = {from_comfy(name) if native else name: key for name, key in keys.items()}
    if not {"transformer_blocks.0.attn1.to_q.weight", "patch_embed.text_proj.weight"} <= set(names):
        raise ValueError(
            "The MODEL is no CogVideoX transformer, but this node needs one: connect Load Mimir DiT, or use "
            "ComfyUI's Load LoRA for other models."
        )
    return names


def _patches(module: str, adapter: Adapter, names: dict[str, str]) -> list[dict[str, Any]]:
    """What the host adds to a weight and to a bias: one dictionary each, since two may hit one weight."""
    tensors = {f"{module}.{part}": tensor for part, tensor in adapter.tensors.items()}
    made: list[dict[str, Any]] = []
    for kind in comfy.weight_adapter.adapters:
        found = kind.load(module, tensors, adapter.alpha, None, set())
        if found is not None:
            made.append({names[f"{module}.weight"]: found})
    for part, kind in (("diff", "weight"), ("diff_b", "bias")):
        if part in adapter.tensors:
            made.append({names[f"{module}.{kind}"]: ("diff", (adapter.tensors[part],))})
    return made
