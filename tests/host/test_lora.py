"""Load Mimir LoRA in queued graphs on the real host: what changes, what is reported, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.client import Client
from launcher.console import Failure
from launcher.server import Server
from mimir_core.tiny.parts import WEIGHTS
from mimir_core.weights import read_transformer

from .graph import Graph, Ref


@pytest.fixture(scope="module")
def loras(server: Server) -> Path:
    """Random LoRAs for Mimir Tiny's DiT, one in diffusers' names and the same in core's, and one for Flux."""
    folder = server.base / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, 1)
    flux = {
        f"transformer.single_transformer_blocks.{i}.proj_mlp.lora_A.weight": torch.zeros(1) for i in range(38)
    }
    save_file(flux, folder / "flux.safetensors")
    return folder


def write(folder: Path, seed: int) -> None:
    state = read_transformer(WEIGHTS / "transformer.safetensors").state
    generator = torch.Generator().manual_seed(seed)
    diffusers, core = {}, {}
    for name, weight in state.items():
        if name.endswith(("to_q.weight", "net.2.weight")):
            module, (rows, columns) = name.removesuffix(".weight"), weight.shape
            down = torch.randn(2, columns, generator=generator) / 8
            up = torch.randn(rows, 2, generator=generator) / 8
            diffusers.update({f"transformer.{module}.lora_A.weight": down})
            diffusers.update({f"transformer.{module}.lora_B.weight": up})
            core.update({f"diffusion_model.{module}.lora_down.weight": down.clone()})
            core.update({f"diffusion_model.{module}.lora_up.weight": up.clone()})
    save_file(diffusers, folder / "diffusers.safetensors")
    save_file(core, folder / "core.safetensors")


class Video(Graph):
    def __init__(self, host: Client) -> None:
        super().__init__(host)
        loaded = self.add("MimirLoadTiny", fuser_preset="untrained (identity)")[0]
        self.model = [loaded, 0]
        self.positive = self.add("MimirT5Encode", clip=[loaded, 1], text="a red circle moves left")
        self.negative = self.add("MimirT5Encode", clip=[loaded, 1], text="")
        self.empty = self.add("MimirEmptyLatent", width=64, height=64, frames=9, batch=1)

    def lora(self, name: str, strength: float, model: Ref | None = None) -> Ref:
        return self.add("MimirLoadLora", model=model or self.model, lora_name=name, strength=strength)

    def sampled(self, model: Ref) -> Ref:
        inputs = {
            "seed": 7,
            "steps": 3,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        }
        conditions = {"positive": self.positive, "negative": self.negative, "latent_image": self.empty}
        return self.add("KSampler", model=model, **conditions, **inputs)


def test_strengths_reports_and_cores_loader(host, loras):
    graph = Video(host)
    lora = graph.lora("diffusers.safetensors", 0.5)
    core = graph.add(
        "LoraLoaderModelOnly", model=graph.model, lora_name="core.safetensors", strength_model=0.5
    )
    shown = graph.add("PreviewAny", source=[lora[0], 1])[0]
    found = graph.run(
        plain=graph.sampled(graph.model),
        off=graph.sampled(graph.lora("diffusers.safetensors", 0.0)),
        half=graph.sampled(lora),
        core=graph.sampled(core),
        twice=graph.sampled(graph.lora("diffusers.safetensors", 0.25, graph.lora("core.safetensors", 0.25))),
        back=graph.sampled(graph.lora("core.safetensors", -0.5, lora)),
    )
    assert torch.equal(found["off"], found["plain"]) and torch.equal(found["half"], found["core"])
    assert not torch.allclose(found["half"], found["plain"], rtol=0.05, atol=0.05)
    assert torch.allclose(found["twice"], found["half"], rtol=1e-3, atol=1e-3)
    assert torch.allclose(found["back"], found["plain"], rtol=1e-3, atol=1e-3)
    matched = " modules (rank 2, no alpha, so scale 1); unmatched: none"
    assert graph.notes[lora[0]].startswith("matched ") and graph.notes[lora[0]].endswith(matched)
    assert graph.notes[shown] == graph.notes[lora[0]]


def test_a_changed_file_is_read_again(host, loras):
    def video() -> torch.Tensor:
        graph = Video(host)
        return graph.run(video=graph.sampled(graph.lora("diffusers.safetensors", 1.0)))["video"]

    first = video()
    assert torch.equal(video(), first)
    write(loras, 2)
    assert not torch.equal(video(), first)


def test_another_models_lora_is_refused(host, loras):
    graph = Video(host)
    with pytest.raises(
        Failure, match="a LoRA for Flux or Hunyuan Video: CogVideoX lacks 38 of its 38 modules"
    ):
        graph.run(video=graph.sampled(graph.lora("flux.safetensors", 1.0)))
