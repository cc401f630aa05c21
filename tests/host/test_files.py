"""Model files in queued graphs on the real host: scaled fp8, Phi-3.5 in fp8 on the CPU, Model File Info."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from launcher.client import Client
from launcher.server import Server
from mimir_core.scaled import dequantised, quantise
from mimir_core.tiny.parts import WEIGHTS
from mimir_core.weights import read_transformer, save_transformer

from .graph import Graph, Ref, relative

PROMPT = "a red circle moves left"
PHI = {"instructions": "", "answer_length": 4, "temperature": 0.0, "seed": 1, "layer": -1}


@pytest.fixture(scope="module")
def models(server: Server) -> Path:
    """Mimir Tiny's DiT in scaled fp8 and with the same numbers in float32, its Phi as a folder."""
    root = server.base / "models"
    source = read_transformer(WEIGHTS / "transformer.safetensors")
    state = {name: tensor.float() for name, tensor in source.state.items()}
    layers = tuple(
        name.removesuffix(".weight")
        for name, tensor in state.items()
        if name.startswith("transformer_blocks.") and tensor.ndim == 2
    )
    small = quantise(state, layers).state
    (root / "diffusion_models").mkdir(parents=True, exist_ok=True)
    exact = dequantised(small, state["proj_out.weight"].dtype)
    for name, stored in (("scaled", small), ("exact", exact)):
        file = root / "diffusion_models" / f"{name}.safetensors"
        save_transformer(file, source.config, source.diffusion, stored)
    shutil.copytree(WEIGHTS / "phi", root / "text_encoders" / "phi", dirs_exist_ok=True)
    return root


def video(host: Client, name: str) -> tuple[Graph, Ref]:
    graph = Graph(host)
    t5 = [graph.add("MimirLoadTiny", fuser_preset="untrained (identity)")[0], 1]
    model = graph.add("MimirLoadModel", model_name=name, dtype="default")
    positive = graph.add("MimirT5Encode", clip=t5, text=PROMPT)
    negative = graph.add("MimirT5Encode", clip=t5, text="")
    latent = graph.add("MimirEmptyLatent", width=64, height=64, frames=9, batch=1)
    return graph, graph.add(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=1, steps=3,
        cfg=2.0, sampler_name="euler", scheduler="simple", denoise=1.0,
    )  # fmt: skip


def test_scaled_fp8_samples_its_own_numbers(host, models):
    graph, latent = video(host, "scaled.safetensors")
    found = graph.run(found=latent)["found"]
    assert "Mimir Tiny's DiT, fp8_e4m3fn with scales" in " ".join(graph.notes.values())
    graph, latent = video(host, "exact.safetensors")
    assert relative(found, graph.run(found=latent)["found"]) < 1e-4


@pytest.mark.parametrize("options", [{}, {"dtype": "fp8_e4m3fn", "device": "cpu"}])
def test_phi_with_and_without_its_new_inputs(host, models, options):
    graph = Graph(host)
    phi = graph.add("MimirLoadPhi", phi_name="phi", **options)
    answer = graph.add("MimirPhiEncode", 1, clip=phi, text=PROMPT, **PHI)
    graph.add("PreviewAny", source=answer)
    graph.run()
    assert any(note.startswith("Phi-3 of 3 layers") for note in graph.notes.values())


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("diffusion_models/scaled.safetensors", ("Mimir Tiny's DiT", "Node: Load Mimir DiT", "with a scale")),
        ("text_encoders/phi", ("Phi-3 of 3 layers", "Node: Load Phi-3.5", "as fp8_e4m3fn")),
    ],
)
def test_model_file_info_runs_by_itself(host, models, file, words):
    graph = Graph(host)
    graph.add("MimirInspectFile", file=file)
    graph.run()
    (note,) = graph.notes.values()
    assert all(word in note for word in words)
