"""Run by test_host.py in a process of its own: a ComfyUI on the GPU gives our DiT a third of its memory.

    python tests/gpu/partial_load.py COMFYUI

Prints one line of JSON: what was loaded, and how far the two outputs are apart.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))

from launcher.comfyui import read_comfy  # noqa: E402
from launcher.inside import PACK, enter, name_the_pack  # noqa: E402


def main(comfyui: str) -> None:
    enter(read_comfy(Path(comfyui)), cpu=False)
    name_the_pack()
    torch: Any = importlib.import_module("torch")
    host: Any = importlib.import_module(f"{PACK}.nodes.host.model")
    weights = importlib.import_module(f"{PACK}.nodes.host.tiny").FOLDER / "transformer.safetensors"
    outputs, sizes = [], {}
    for name in ("whole", "partial"):
        patcher = host.load_dit(weights, disable_dynamic=True)
        room = patcher.model_size() // 3 if name == "partial" else 10 * patcher.model_size()
        with torch.inference_mode():
            patcher.partially_load(patcher.load_device, extra_memory=room)
            outputs.append(predict(torch, patcher))
        sizes[name] = patcher.model.model_loaded_weight_memory / patcher.model_size()
    found = {"loaded": sizes, "device": str(patcher.load_device), "equal": bool(torch.equal(*outputs))}
    print(json.dumps({**found, "apart": (outputs[0] - outputs[1]).abs().max().item()}))


def predict(torch: Any, patcher: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    network, device = patcher.model.diffusion_model, patcher.load_device
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    x = torch.randn(2, 16, 3, 8, 8, generator=generator).to(device, dtype)
    text = torch.randn(2, 64, 96, generator=generator).to(device, dtype)
    steps = torch.tensor([500.0, 500.0], device=device)
    return network(x, steps, context=text, transformer_options={}).float()


if __name__ == "__main__":
    main(sys.argv[1])
