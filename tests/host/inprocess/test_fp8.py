"""fp8 files: what is scaled stays fp8 in memory and counts with its scales; the numbers are the file's."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import comfy.ops
import comfy.quant_ops
import pytest
import torch
from mimir_pack.nodes import load
from mimir_pack.nodes.encode import MimirPhiEncode
from mimir_pack.nodes.host import files
from mimir_pack.nodes.host import model as host_model
from mimir_pack.nodes.host import phi as host_phi
from mimir_pack.tests.host.inprocess import references
from safetensors.torch import load_file, save_file

LINEAR = (".attn1.to_", ".ff.net.", "norm1.linear", "norm2.linear")
PROMPT = "a red circle moves left above the blue square"
PHI = {"instructions": "name the square", "answer_length": 4, "temperature": 0.0, "seed": 1, "layer": -1}


def predict(patcher: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 3, 8, 8, generator=generator)
    text = torch.randn(1, references.TEXT_LENGTH, references.TEXT_WIDTH, generator=generator)
    with torch.inference_mode():
        return patcher.model.apply_model(x, torch.tensor([2.0]), c_crossattn=text, transformer_options={})


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def dit() -> Any:
    return references.transformer()


@pytest.fixture(scope="module", params=references.SCALED)
def scaled(request: Any, dit: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(a scaled fp8 file, the prediction of a float32 model that holds the numbers it stands for)."""
    folder = tmp_path_factory.mktemp("scaled")
    dit.save_config(folder)
    numbers = references.save_scaled(dit.state_dict(), folder / "x.safetensors", request.param, LINEAR)
    exact = references.transformer()
    exact.load_state_dict(numbers)
    exact.save_pretrained(folder / "exact")
    return folder / "x.safetensors", predict(host_model.load_dit(folder / "exact", "float32"))


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast"])
def test_scaled_weights_stay_fp8_and_count_exactly(scaled, dit, dtype):
    path, expected = scaled
    with torch.inference_mode():  # as a node does
        patcher = host_model.load_dit(path, dtype)
        patcher.model_size()
    plain = sum(tensor.numel() * 4 for tensor in dit.state_dict().values())
    assert patcher.model_size() < 0.4 * plain  # float32 on a CPU: a quarter for what is fp8
    assert relative(predict(patcher), expected) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_chosen_dtype_gets_the_scaled_numbers_once(scaled, dtype):
    path, expected = scaled
    limit = {"float32": 1e-6, "bfloat16": 5e-2, "float16": 1e-2}[dtype]
    assert relative(predict(host_model.load_dit(path, dtype)), expected) < limit


def test_scaled_weights_survive_a_partial_load(scaled):
    path, expected = scaled
    patcher = host_model.load_dit(path)
    patcher.partially_load(patcher.load_device, extra_memory=patcher.model_size() // 3)
    assert patcher.model.model_lowvram
    assert relative(predict(patcher), expected) < 1e-5


def test_a_lora_fits_scaled_weights(scaled):
    import comfy.sd

    path, plain = scaled
    name, generator = "diffusion_model.transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(3)
    down, up = (torch.randn(shape, generator=generator) * 0.2 for shape in ((4, 64), (64, 4)))
    lora = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    found = []
    for model in (host_model.load_dit(path), host_model.load_dit(path, "float32")):
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)
        patched.patch_model()
        found.append(predict(patched))
        patched.unpatch_model()
    assert relative(found[1], plain) > 0.05 and relative(found[0], found[1]) < 0.05


@pytest.mark.parametrize("lacks", ["operations", "kernels"])
def test_a_host_that_cannot_says_what_it_costs(scaled, monkeypatch, caplog, lacks):
    path, expected = scaled
    if lacks == "operations":
        monkeypatch.delattr(comfy.ops, "mixed_precision_ops")
    else:
        monkeypatch.setattr(comfy.quant_ops, "_CK_AVAILABLE", False, raising=False)
    with caplog.at_level(logging.WARNING):
        patcher = host_model.load_dit(path)
    assert relative(predict(patcher), expected) < 5e-2
    assert "twice the memory" in caplog.text and "twice the memory" in patcher.model.note


def test_a_plain_fp8_file_keeps_what_it_stores_finer(dit, tmp_path, monkeypatch):
    """As on a card: weights stay fp8. Biases and norms, which the file has in 16 bit, stay 16 bit."""
    state = dit.state_dict()
    stored = {name: tensor.to(torch.float8_e4m3fn if tensor.ndim > 1 else torch.bfloat16)
              for name, tensor in state.items()}  # fmt: skip
    dit.save_config(tmp_path)
    save_file(stored, tmp_path / "x.safetensors")
    exact = references.transformer()
    exact.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    exact.save_pretrained(tmp_path / "exact")
    expected = predict(host_model.load_dit(tmp_path / "exact", "float32"))
    assert relative(predict(host_model.load_dit(tmp_path / "x.safetensors")), expected) < 1e-6
    monkeypatch.setattr(host_model.management, "unet_dtype", lambda **_: torch.float8_e4m3fn)
    kept = host_model.load_dit(tmp_path / "x.safetensors")
    assert {p.dtype for p in kept.model.diffusion_model.parameters()} == {
        torch.float8_e4m3fn,
        torch.bfloat16,
    }
    assert relative(predict(kept), expected) < 1e-6


def test_other_quantisations_are_refused_by_name(dit, tmp_path):
    state = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    layer = "transformer_blocks.0.attn1.to_q"
    state[f"{layer}.weight"] = torch.zeros(64, 32, dtype=torch.uint8)
    state |= {f"{layer}.weight_scale": torch.ones(64, 4), f"{layer}.weight_scale_2": torch.ones(())}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors is .*nvfp4.*fp8, fp16 or bf16 is needed here"):
        host_model.load_dit(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a Hugging Face folder, a single file with config and tokenizer beside it) of one Phi."""
    folder, single = tmp_path_factory.mktemp("phi"), tmp_path_factory.mktemp("single")
    references.save_phi(folder)
    for file in folder.iterdir():
        if ".safetensors" not in file.name:
            shutil.copy(file, single)
    state = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    save_file(state, single / "any name.safetensors")
    return folder, single / "any name.safetensors"


def phi_tokens(clip: Any, run_node: Any) -> torch.Tensor:
    return run_node(MimirPhiEncode, clip=clip, text=PROMPT, **PHI)[0].query


def test_a_single_phi_file_is_its_folder(phi, run_node):
    exact, found = (phi_tokens(host_phi.load_phi(path), run_node) for path in phi)
    assert torch.equal(exact, found)


@pytest.mark.parametrize(
    ("dtype", "limit"), [("default", 0), ("float32", 0), ("bfloat16", 0.05), ("fp8_e4m3fn", 0.2)]
)
def test_phi_in_every_dtype(phi, run_node, monkeypatch, dtype, limit):
    monkeypatch.setattr(files, "resolve", lambda *_: phi[0])
    clips = [run_node(load.MimirLoadPhi, phi_name="x", **o)[0] for o in ({}, {"dtype": dtype})]
    exact, found = (phi_tokens(clip, run_node) for clip in clips)
    assert relative(found, exact) <= limit
    share = clips[1].patcher.model_size() / clips[0].patcher.model_size()
    expected = {"default": 1, "float32": 1, "bfloat16": 0.5, "fp8_e4m3fn": 0.3}  # blocks: a quarter
    assert share == pytest.approx(expected[dtype], abs=0.1)


def test_phi_on_the_cpu_never_leaves_it(phi, monkeypatch):
    monkeypatch.setattr(host_phi.management, "text_encoder_device", lambda: torch.device("meta"))
    clip = host_phi.load_phi(phi[1], device="cpu")
    assert clip.patcher.load_device == clip.patcher.offload_device == torch.device("cpu")
    factory, arguments = clip.patcher.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).load_device == torch.device("cpu")


@pytest.mark.parametrize("layout", references.SCALED)
def test_scaled_phi_files(phi, run_node, tmp_path, layout):
    shutil.copytree(phi[1].parent, tmp_path / "phi")
    only = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    file = tmp_path / "phi" / "any name.safetensors"
    numbers = references.save_scaled(load_file(file), file, layout, only)
    with torch.inference_mode():
        clip = host_phi.load_phi(file)
    assert clip.patcher.model_size() < 0.5 * sum(tensor.numel() * 4 for tensor in numbers.values())
    found = phi_tokens(clip, run_node)
    save_file(numbers, file)
    assert relative(found, phi_tokens(host_phi.load_phi(file), run_node)) < 1e-5
