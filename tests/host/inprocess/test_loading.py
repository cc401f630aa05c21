"""Every loader, through its node and the host's model folders: right files, wrong files, dtypes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from mimir_pack.mimir_core.config import FuserConfig
from mimir_pack.mimir_core.fuser import untrained_state
from mimir_pack.mimir_core.weights import save_fuser
from mimir_pack.nodes import load
from mimir_pack.nodes.host import files
from mimir_pack.nodes.host import model as host_model
from mimir_pack.tests.host.inprocess import references
from safetensors.torch import save_file

LOADERS = {
    "dit": (load.MimirLoadModel, files.DIFFUSION, {"dtype": "default"}, "model_name"),
    "t5": (load.MimirLoadT5, files.TEXT, {}, "t5_name"),
    "phi": (load.MimirLoadPhi, files.TEXT, {}, "phi_name"),
    "fuser": (load.MimirLoadFuser, files.FUSER, {}, "fuser_name"),
    "vae": (load.MimirLoadVAE, files.VAE, {}, "vae_name"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A models folder with right and wrong files, under every key."""
    root = tmp_path_factory.mktemp("models")
    right = root / "right"
    references.transformer().save_pretrained(right / "dit")
    references.vae().save_pretrained(right / "vae")
    references.save_t5(right / "t5")
    references.save_phi(right / "phi")
    config = FuserConfig(text_dim=references.TEXT_WIDTH, llm_dim=references.PHI_WIDTH)
    save_fuser(right / "fuser.safetensors", config, untrained_state(config))
    _write_wrong(root, right)
    before = dict(folder_paths.folder_names_and_paths)
    for key in (files.DIFFUSION, files.TEXT, files.FUSER, files.VAE):
        folder_paths.folder_names_and_paths[key] = ([str(root)], {".safetensors"})
        folder_paths.filename_list_cache.pop(key, None)
    yield root
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(before)


def _write_wrong(root: Path, right: Path) -> None:
    (root / "text.safetensors").write_text("this is not a model")
    whole = (right / "dit" / "diffusion_pytorch_model.safetensors").read_bytes()
    (root / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    shutil.copytree(right / "phi", root / "shards_without_index")
    (root / "shards_without_index" / "model.safetensors.index.json").unlink()
    unet = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    save_file(unet, root / "sd15.safetensors")
    shutil.copy(right / "t5" / "model.safetensors", root / "t5_alone.safetensors")
    shutil.copy(right / "vae" / "diffusion_pytorch_model.safetensors", root / "vae_alone.safetensors")
    shutil.copy(right / "dit" / "diffusion_pytorch_model.safetensors", root / "dit_alone.safetensors")


def run(kind: str, name: str, run_node: Any) -> Any:
    node, _, options, argument = LOADERS[kind]
    return run_node(node, **{argument: name, **options})


@pytest.mark.parametrize("kind", LOADERS)
def test_right_files_load_and_are_offered(models, run_node, kind):
    name = str(Path("right") / ("fuser.safetensors" if kind == "fuser" else kind))
    (found,) = run(kind, name, run_node)
    assert found is not None
    node, key, options, argument = LOADERS[kind]
    assert name in files.choices(key)
    assert node.fingerprint_inputs(**{argument: name, **options}) != "missing"


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("text.safetensors", "text file"),
        ("truncated.safetensors", "truncated|cut short|incomplete|CogVideoX|ends early|half"),
        ("shards_without_index", "without their index"),
        ("sd15.safetensors", "Stable Diffusion"),
        ("gone.safetensors", "not found"),
    ],
)
def test_wrong_files_get_one_sentence(models, run_node, kind, name, what):
    with pytest.raises(ValueError, match=what) as error:
        run(kind, name, run_node)
    message = str(error.value)
    assert name.removesuffix(".safetensors") in message and "\n" not in message
    assert len(message) < 420


@pytest.mark.parametrize("kind", ["t5", "phi"])
def test_a_missing_tokenizer_names_the_chosen_file(models, run_node, kind, monkeypatch, tmp_path):
    chosen = tmp_path / "chosen"
    shutil.copytree(files.resolve(LOADERS[kind][1], str(Path("right") / kind)), chosen)
    for file in chosen.glob("*token*"):
        file.unlink()
    monkeypatch.setattr(files, "resolve", lambda *_: chosen)
    with pytest.raises(ValueError, match=r"^chosen: .*no tokenizer.json.*files there\.$"):
        run(kind, "chosen", run_node)


@pytest.mark.parametrize(
    ("kind", "name", "what"),
    [
        ("dit", "t5_alone.safetensors", "a T5 v1.1 text encoder"),
        ("dit", "vae_alone.safetensors", "a CogVideoX VAE"),
        ("t5", "dit_alone.safetensors", "a CogVideoX transformer"),
        ("t5", "right/phi", "a Phi-3 language model"),
        ("phi", "t5_alone.safetensors", "a T5 v1.1 text encoder"),
        ("vae", "dit_alone.safetensors", "a CogVideoX transformer"),
        ("fuser", "vae_alone.safetensors", "a CogVideoX VAE"),
    ],
)
def test_a_part_in_anothers_slot_is_named(models, run_node, kind, name, what):
    with pytest.raises(ValueError, match=what):
        run(kind, name, run_node)


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_says_what_it_has_loaded(models, kind):
    name = f"right/{'fuser.safetensors' if kind == 'fuser' else kind}"
    node, _, options, argument = LOADERS[kind]
    with torch.inference_mode():
        said = node.EXECUTE_NORMALIZED(**{argument: name, **options}).ui.value
    words = {
        "dit": "CogVideoX transformer of 2 layers",
        "t5": "T5 v1.1 encoder of 2 layers",
        "phi": "Phi-3 of 3 layers",
        "fuser": "Token Fuser",
        "vae": "CogVideoX VAE",
    }
    assert said.startswith(words[kind]) and ", fp32, " in said and said.endswith("B.")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("right/dit", "Node: Load Mimir DiT"),
        ("right/phi", "Node: Load Phi-3.5"),
        ("right/t5", "Node: Load T5"),
        ("t5_alone.safetensors", "Not usable: tokenizer missing: put tokenizer.json"),
        ("sd15.safetensors", "Not usable: it is a Stable Diffusion"),
        ("text.safetensors", "Not usable: text.safetensors is a text file"),
        ("shards_without_index", "Not usable: .*without their index"),
    ],
)
def test_file_info_tells_right_and_wrong_files(models, run_node, name, words):
    from mimir_pack.nodes.inspect_file import MimirInspectFile

    chosen = f"{files.DIFFUSION}/{name}"
    assert chosen in files.everything()
    (info,) = run_node(MimirInspectFile, file=chosen)
    assert info.startswith(f"{Path(name).name}: ") and re.search(words, info)
    assert MimirInspectFile.fingerprint_inputs(file=chosen) != "missing"


def test_untrained_fuser_needs_no_file(run_node):
    (fuser,) = run_node(load.MimirLoadFuser, fuser_name="untrained (identity)")
    assert not fuser.trained and fuser.config is None


def test_a_file_of_an_untrained_fuser_is_known_as_one(models, run_node):
    (fuser,) = run("fuser", "right/fuser.safetensors", run_node)
    assert not fuser.trained and fuser.config.llm_dim == references.PHI_WIDTH


@pytest.mark.parametrize("dtype", list(host_model.DTYPES))
def test_every_dtype_loads_and_predicts_alike(models, dtype):
    path = models / "right" / "dit"
    exact, found = (_predict(host_model.load_dit(path, name)) for name in ("float32", dtype))
    limit = {"default": 1e-6, "float32": 1e-6, "float16": 2e-2, "bfloat16": 5e-2}.get(dtype, 0.5)
    assert ((found - exact).norm() / exact.norm()).item() < limit


def test_scaled_fp8_transformer_is_read_with_its_scales(models, tmp_path):
    from mimir_pack.mimir_core.weights import read_transformer

    source = read_transformer(models / "right" / "dit")
    state, plain = {}, dict(source.state)
    for name, tensor in source.state.items():
        if ".attn1.to_" not in name or name.endswith("bias"):
            state[name] = tensor
            continue
        scale = tensor.abs().max() / 300
        state[name] = (tensor / scale).to(torch.float8_e4m3fn)
        state[name.replace(".weight", ".scale_weight")] = scale
        plain[name] = (state[name].float() * scale).to(torch.bfloat16).float()
    save_file(state, tmp_path / "scaled.safetensors")
    (tmp_path / "config.json").write_text((models / "right" / "dit" / "config.json").read_text())
    exact = host_model.load_dit(models / "right" / "dit", "float32")
    found = host_model.load_dit(tmp_path / "scaled.safetensors", "float32")
    loaded = dict(found.model.diffusion_model.state_dict())
    assert all(torch.allclose(loaded[name], tensor, atol=1e-2) for name, tensor in plain.items())
    assert ((_predict(found) - _predict(exact)).norm() / _predict(exact).norm()).item() < 0.3


def _predict(patcher: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, 3, 8, 8, generator=generator)
    text = torch.randn(1, references.TEXT_LENGTH, references.TEXT_WIDTH, generator=generator)
    with torch.inference_mode():
        return patcher.model.apply_model(x, torch.tensor([2.0]), c_crossattn=text, transformer_options={})


def test_core_lora_loader_and_reload(models):
    import comfy.sd

    patcher = host_model.load_dit(models / "right" / "dit")
    name = "diffusion_model.transformer_blocks.0.attn1.to_q"
    lora = {f"{name}.lora_A.weight": torch.randn(4, 64), f"{name}.lora_B.weight": torch.randn(64, 4)}
    patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)
    assert len(patched.patches) == 1
    factory, arguments = patcher.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).model is not patcher.model


def test_missing_tiny_weights_are_explained(run_node, monkeypatch, tmp_path):
    from mimir_pack.nodes.host import tiny

    monkeypatch.setattr(tiny, "FOLDER", tmp_path)
    assert tiny.fuser_names() == ["mimir", "untrained (identity)"]
    with pytest.raises(ValueError, match="weights are not in .*mimir_core.tiny.train"):
        run_node(load.MimirLoadTiny, fuser_preset="mimir")
