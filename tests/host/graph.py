"""A prompt for the queue of a real host, and the latents it gives."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load

from launcher.client import Client, File

Ref = list[Any]  # [node id, index of its output]


class Graph:
    """Nodes are numbered in order: graphs that begin alike share what the host still holds of them."""

    def __init__(self, host: Client) -> None:
        self.host = host
        self.prompt: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, output: int = 0, **inputs: Any) -> Ref:
        """A node, and one of its outputs."""
        name = f"{kind}{len(self.prompt)}"
        self.prompt[name] = {"class_type": kind, "inputs": inputs}
        return [name, output]

    def known(self, kind: str, **inputs: Any) -> dict[str, Any]:
        """Those of `inputs` that this host's node has."""
        schema = self.host.object_info(kind)[kind]["input"]
        names = {**schema.get("required", {}), **schema.get("optional", {})}
        return {name: value for name, value in inputs.items() if name in names}

    def run(self, **latents: Ref) -> dict[str, torch.Tensor]:
        """Run the graph; LATENT outputs by name, as core's SaveLatent wrote them.

        `notes` then has what the nodes said, except those whose result the host still had; `seconds` how
        long each of the others took.
        """
        for name, samples in latents.items():
            inputs = {"samples": samples, "filename_prefix": f"graph/{name}"}
            self.prompt[name] = {"class_type": "SaveLatent", "inputs": inputs}
        done = self.host.run(self.prompt)
        outputs, self.seconds = done.outputs, done.seconds
        self.notes = {node: " ".join(shown["text"]) for node, shown in outputs.items() if "text" in shown}
        files = {name: File(**outputs[name]["latents"][0]) for name in latents}
        return {name: load(self.host.view(file))["latent_tensor"] for name, file in files.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
