"""What a file is, told without loading it: real sizes in sparse files, refused ones with their reason."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mimir_core.config import DIT_PRESETS, FUSER_PRESETS, PHI_PRESETS, T5_PRESETS, FuserConfig, T5Config
from mimir_core.describe import describe
from mimir_core.dit import CogVideoXTransformer
from mimir_core.fuser import untrained_state
from mimir_core.phi import Phi3ForCausalLM
from mimir_core.recognise import t5_names, to_comfy
from mimir_core.tiny.world import __file__ as TINY
from mimir_core.vae import build_vae
from mimir_core.weights import save_fuser

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
Shapes = Mapping[str, tuple[int, ...]]


def write(file: Path, shapes: Shapes, dtype: str, other: Mapping[str, str] | None = None) -> Path:
    """A safetensors file with these tensors: its header is real, its data a hole that takes no disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        kind = (other or {}).get(name, dtype)
        start, end = end, end + SIZES[kind] * int(torch.Size(shape).numel())
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
    return file


def shapes_of(module: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def dit(preset: str, **changes: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(CogVideoXTransformer(DIT_PRESETS[preset])) | changes


def t5(config: T5Config) -> dict[str, tuple[int, ...]]:
    attention, feed = config.num_heads * config.d_kv, config.d_ff
    ends: dict[str, tuple[int, ...]] = {
        "relative_attention_bias.weight": (32, config.num_heads), "norm.weight": (config.d_model,),
        ".o.weight": (config.d_model, attention), ".wo.weight": (config.d_model, feed),
        "wi_0.weight": (feed, config.d_model), "wi_1.weight": (feed, config.d_model),
        ".q.weight": (attention, config.d_model), ".k.weight": (attention, config.d_model),
        ".v.weight": (attention, config.d_model),
    }  # fmt: skip
    shapes = {n: next(shape for end, shape in ends.items() if n.endswith(end)) for n in t5_names(config)}
    return {"shared.weight": (config.vocab_size, config.d_model), **shapes}


@pytest.mark.parametrize(
    ("preset", "dtype", "line"),
    [
        ("2b", "F16", "CogVideoX-2B, fp16, 3.4 GB"),
        ("5b", "BF16", "CogVideoX-5B, bf16, 11.1 GB"),
        ("1.5-5b", "BF16", "CogVideoX-1.5-5B, bf16, 11.1 GB"),
        ("5b", "F8_E4M3", "CogVideoX-5B, fp8_e4m3fn, 5.6 GB"),
    ],
)
@pytest.mark.parametrize("rename", [str, to_comfy], ids=["diffusers", "ComfyUI"])
def test_real_transformers(tmp_path, preset, dtype, line, rename):
    shapes = {f"model.diffusion_model.{rename(name)}": shape for name, shape in dit(preset).items()}
    file = write(tmp_path / "x.safetensors", shapes, dtype)
    start = time.perf_counter()
    found = describe(file)
    assert time.perf_counter() - start < 5  # seconds, on a busy machine: eleven gigabytes are not read
    assert (found.line, found.loader, found.problem) == (line, "Load Mimir DiT", None)
    assert ("ComfyUI's names behind 'model.diffusion_model.'" in found.layout) is (rename is to_comfy)
    assert found.memory["bfloat16"] == 2 * found.parameters == found.memory["float32"] / 2
    assert 0.5 <= found.memory["fp8_e4m3fn"] / found.memory["bfloat16"] < 0.51


def test_mixed_precision_is_counted(tmp_path):
    shapes = dit("5b")
    fine = {name: "BF16" for name, shape in shapes.items() if len(shape) == 1}
    found = describe(write(tmp_path / "x.safetensors", shapes, "F8_E4M3", fine))
    assert list(found.precisions) == ["fp8_e4m3fn", "bf16"] and found.precisions["bf16"].tensors == len(fine)
    assert sum(count.tensors for count in found.precisions.values()) == len(shapes)
    assert "fp8_e4m3fn (" in found.text and f"bf16 ({len(fine)} tensors" in found.text


def test_scaled_fp8_says_so(tmp_path):
    layer = "encoder.block.0.layer.0.SelfAttention.q"
    shapes = {**t5(T5_PRESETS["xxl"]), f"{layer}.scale_weight": (), "scaled_fp8": (2,)}
    found = describe(write(tmp_path / "x.safetensors", shapes, "F8_E4M3", {f"{layer}.scale_weight": "F32"}))
    assert found.line == "T5-XXL encoder, fp8_e4m3fn with scales, 4.8 GB" and found.loader == "Load T5"


def test_phi_of_several_files(tmp_path):
    with torch.device("meta"):
        shapes = shapes_of(Phi3ForCausalLM(PHI_PRESETS["phi-3.5-mini"]))
    halves = [dict(list(shapes.items())[::2]), dict(list(shapes.items())[1::2])]
    index = {}
    for number, half in enumerate(halves):
        write(tmp_path / f"model-{number}-of-2.safetensors", half, "BF16")
        index |= dict.fromkeys(half, f"model-{number}-of-2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = PHI_PRESETS["phi-3.5-mini"].to_dict()
    config["rope_scaling"] = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "phi3"}))
    missing = describe(tmp_path)
    assert missing.loader is None and (missing.problem or "").startswith(
        "tokenizer missing: put tokenizer.json"
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    found = describe(tmp_path)
    assert found.loader == "Load Phi-3.5" and found.problem is None
    assert found.line == missing.line == "Phi-3.5-mini, bf16, 7.6 GB" and "2 files" in found.layout
    assert f"{found.memory['fp8_e4m3fn'] / 1e9:.2f}" == "4.02"  # as in the README's table


def test_only_t5_of_another_size_needs_its_own_tokenizer(tmp_path):
    for name, needed in (("xxl", False), ("tiny", True)):
        file = write(tmp_path / f"{name}.safetensors", t5(T5_PRESETS[name]), "F16")
        assert (describe(file).problem or "").startswith("tokenizer missing" * needed)
        assert (describe(file).loader is None) is needed
    (tmp_path / "spiece.model").write_bytes(b"x")
    assert describe(tmp_path / "tiny.safetensors").loader == "Load T5"


def test_vae_and_its_folder_in_a_whole_model(tmp_path):
    shapes = shapes_of(build_vae({"_class_name": "AutoencoderKLCogVideoX"}, device="meta"))
    (tmp_path / "vae").mkdir()
    write(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", shapes, "BF16")
    (tmp_path / "model_index.json").write_text("{}")
    assert describe(tmp_path, "vae").line == "CogVideoX VAE, bf16, 0.4 GB"
    assert describe(tmp_path).problem is not None


def test_fuser_and_the_built_in_model(tmp_path):
    config: FuserConfig = FUSER_PRESETS["mimir"]
    small = FuserConfig(text_dim=16, llm_dim=8)
    save_fuser(tmp_path / "fuser.safetensors", small, untrained_state(small), torch.float16)
    assert describe(tmp_path / "fuser.safetensors").loader == "Load Token Fuser" and config.text_dim == 4096
    assert describe(Path(TINY).parent / "weights" / "transformer.safetensors").name == "Mimir Tiny's DiT"


@pytest.mark.parametrize(
    ("channels", "extra", "name"),
    [
        (
            32,
            {"patch_embed.pos_embedding": (1, 226, 3072)},
            "CogVideoX-5B-I2V, an image-to-video transformer",
        ),
        (33, {}, "CogVideoX-Fun inpainting (InP) transformer"),
        (48, {}, "CogVideoX transformer for inpainting masked video (VOID)"),
    ],
)
def test_other_tasks_are_described_though_refused(tmp_path, channels, extra, name):
    shapes = dit("5b", **{"patch_embed.proj.weight": (3072, channels, 2, 2), **extra})
    found = describe(write(tmp_path / "x.safetensors", shapes, "BF16"))
    assert found.name == name and found.loader is None and found.parameters > 5.5e9
    assert (
        "ComfyUI-CogVideoXWrapper" in (found.problem or "")
        and "\nNot usable: x.safetensors is " in found.text
    )


def lora(rank: int, width: int, names: tuple[str, ...]) -> Shapes:
    pairs = {"A": (rank, width), "B": (width, rank)}
    return {f"{name}.lora_{end}.weight": shape for name in names for end, shape in pairs.items()}


def test_loras_are_named_by_what_they_fit(tmp_path):
    names = tuple(f"transformer.transformer_blocks.{block}.attn1.to_q" for block in range(30))
    wide = describe(write(tmp_path / "5b.safetensors", lora(64, 3072, names), "BF16"))
    assert wide.name.startswith("LoRA for CogVideoX-5B or CogVideoX-1.5-5B") and "rank 64" in wide.name
    narrow = describe(write(tmp_path / "2b.safetensors", lora(16, 1920, names), "BF16"))
    assert narrow.name.startswith("LoRA for CogVideoX-2B") and narrow.loader == "Load Mimir LoRA"
    tiny = describe(write(tmp_path / "tiny.safetensors", lora(4, 128, names[:1]), "F32"))
    assert tiny.name.startswith("LoRA for Mimir Tiny's DiT, matched 1 of 1") and not tiny.problem
    flux = lora(16, 3072, ("transformer.single_transformer_blocks.0.attn.to_q",))
    found = describe(write(tmp_path / "flux.safetensors", flux, "BF16"))
    assert found.name == "LoRA" and found.loader is None and found.problem


def test_a_lora_of_no_published_size_is_described_without_a_model(tmp_path):
    names = ("transformer.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.47.attn1.to_q")
    for file, words in (
        (write(tmp_path / "wide.safetensors", lora(4, 512, names[:1]), "F32"), "width 512"),
        (write(tmp_path / "deep.safetensors", lora(4, 3072, names), "F32"), "48 blocks"),
    ):
        problem = describe(file).problem or ""
        assert f"transformer of {words}, which fits none that was published" in problem, problem
        assert "(width 1920, 30 blocks)" in problem and "this one has" not in problem


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF" + bytes(64), "GGUF"),
        (b"PK\x03\x04" + bytes(64), "pickle"),
        (b"", "empty"),
        (b"<!doctype html><html>", "web page"),
    ],
)
def test_what_is_no_safetensors_is_named(tmp_path, data, words):
    (tmp_path / "x.ckpt").write_bytes(data)
    found = describe(tmp_path / "x.ckpt")
    assert words in (found.problem or "") and found.size == len(data) and found.loader is None


def test_another_model_and_a_missing_one(tmp_path):
    save_file({"double_blocks.0.img_mod.lin.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    found = describe(tmp_path / "x.safetensors")
    assert found.name == "Flux or Hunyuan Video transformer" and "T5-XXL" in (found.problem or "")
    assert "does not exist" in (describe(tmp_path / "gone").problem or "")
