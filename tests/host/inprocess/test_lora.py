"""Load Mimir LoRA on the real host: what PEFT merges is what our patches give; core's own LoRAs load too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import pytest
import torch
from comfy_extras import nodes_train
from mimir_pack.nodes.host import files
from mimir_pack.nodes.host import model as host_model
from mimir_pack.nodes.host.lora import load_lora
from mimir_pack.nodes.lora import MimirLoadLora
from mimir_pack.tests.host.inprocess import references
from safetensors.torch import load_file, save_file

import nodes as host_nodes

CONFIGS = {"5b": references.DIT_5B, "2b": references.DIT_2B, "1.5": references.DIT_15}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm_out.linear"]
TARGETS += ["patch_embed.proj", "text_proj", "proj_out", "time_embedding.linear_1"]
OUR_FILE = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:.*invalid shape", "ignore:In CPU autocast")


def adapted(variant: str, seed: int = 2, strength: float = 1.0, **options: Any) -> Any:
    """A PEFT model around diffusers' with a random LoRA, its scale times `strength`."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "lora_bias": True, **options})
    model = get_peft_model(references.transformer(**CONFIGS[variant]), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", strength)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Base models, and LoRAs by seed, in the host's folder for LoRAs."""
    root = tmp_path_factory.mktemp("lora")
    for variant, config in CONFIGS.items():
        references.transformer(**config).save_pretrained(root / variant)
        adapted(variant).save_pretrained(root / "loras" / variant)
    adapted("5b", seed=3).save_pretrained(root / "loras" / "second")
    before = folder_paths.folder_names_and_paths["loras"]
    folder_paths.folder_names_and_paths["loras"] = ([str(root / "loras")], {".safetensors"})
    folder_paths.filename_list_cache.pop("loras", None)
    yield root
    folder_paths.folder_names_and_paths["loras"] = before
    folder_paths.filename_list_cache.pop("loras", None)


@pytest.fixture(scope="module")
def bases(folder: Path) -> dict[str, Any]:
    return {variant: host_model.load_dit(folder / variant) for variant in CONFIGS}


@pytest.fixture
def base(bases: dict[str, Any]) -> Any:
    return bases["5b"]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 16, 2, 8, 8, generator=generator)
    text = torch.randn(1, references.TEXT_LENGTH, references.TEXT_WIDTH, generator=generator)
    return latents, torch.tensor([500]), text


def ours(model: Any) -> torch.Tensor:
    """One step of our network with the patches of `model` in its weights."""
    latents, timestep, text = inputs()
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model], force_full_load=True)
        return model.model.diffusion_model(latents, timestep.float(), text).clone()


def theirs(model: Any) -> torch.Tensor:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    latents, timestep, text = inputs()
    config, rope = model.config, None
    if config.use_rotary_positional_embeddings:
        size = {"embed_dim": 32, "crops_coords": ((0, 0), (4, 4)), "grid_size": (4, 4), "temporal_size": 2}
        if config.patch_size_t:
            size = {
                **size,
                "temporal_size": 1,
                "crops_coords": None,
                "grid_type": "slice",
                "max_size": (4, 4),
            }
        rope = get_3d_rotary_pos_embed(**size)
    out = model(latents.transpose(1, 2), text, timestep, image_rotary_emb=rope, return_dict=False)[0]
    return out.transpose(1, 2)


def sampled(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    tokens = [torch.randn(1, 16, references.TEXT_WIDTH, generator=generator) for _ in range(2)]
    positive, negative = ([[text, {"pooled_output": None}]] for text in tokens)
    latent = {"samples": torch.zeros(1, 16, 2, 8, 8)}
    with torch.inference_mode():
        return host_nodes.common_ksampler(model, 7, 4, 6.0, "euler", "simple", positive, negative, latent)[0][
            "samples"
        ]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def apply(model: Any, folder: Path, name: str, strength: float = 1.0) -> Any:
    return load_lora(model, folder / "loras" / name / OUR_FILE, strength)[0]


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -1.0])
def test_ours_is_what_peft_merges(folder, bases, tmp_path, variant, strength):
    merged = adapted(variant, strength=strength).merge_and_unload()
    patched = apply(bases[variant], folder, variant, strength)
    assert relative(ours(patched), theirs(merged)) < 1e-4
    if variant == "5b":
        merged.save_pretrained(tmp_path)
        assert relative(sampled(patched), sampled(host_model.load_dit(tmp_path))) < 1e-4


def test_the_lora_matters_and_leaves_with_its_patcher(folder, base):
    before, weight = ours(base), base.model.diffusion_model.proj_out.weight
    kept = weight.clone()
    patched = apply(base, folder, "5b")
    assert relative(ours(patched), before) > 0.1
    assert torch.equal(ours(base), before) and not base.patches
    assert torch.equal(base.model.diffusion_model.proj_out.weight, kept)
    assert apply(base, folder, "5b", 0.0) is base


def test_two_in_a_row_are_both_merged(folder, base):
    two = apply(apply(base, folder, "5b", 0.7), folder, "second", -0.4)
    other_way = apply(apply(base, folder, "second", -0.4), folder, "5b", 0.7)
    merged = adapted("5b", strength=0.7).merge_and_unload()
    second = adapted("5b", seed=3, strength=-0.4).merge_and_unload().state_dict()
    start = references.transformer(**references.DIT_5B).state_dict()
    both = {name: tensor + second[name] - start[name] for name, tensor in merged.state_dict().items()}
    merged.load_state_dict(both)
    assert relative(ours(two), theirs(merged)) < 1e-4
    assert relative(ours(two), ours(other_way)) < 1e-5


def test_partial_offload_gives_the_numbers_of_a_full_load(folder, base):
    patched = apply(base, folder, "5b", 0.8)
    expected = ours(patched)
    third = patched.model_size() // 3
    patched.detach()
    latents, timestep, text = inputs()
    with torch.inference_mode():
        patched.model_patches_to(patched.load_device)
        patched.patch_model(patched.load_device, lowvram_model_memory=third)
        try:
            assert patched.model.model_lowvram and patched.loaded_size() < patched.model_size() / 2
            found = patched.model.diffusion_model(latents, timestep.float(), text)
        finally:
            patched.detach()
    assert torch.equal(found, expected)


def test_other_forms_give_the_same_video_bit_for_bit(folder, base, tmp_path):
    tensors = load_file(folder / "loras" / "second" / OUR_FILE)
    names = {name: name.removeprefix("base_model.model.") for name in tensors if not name.endswith("bias")}
    files_of = {"diffusers": {}, "VideoX-Fun": {}}
    for name, short in names.items():
        module, _, side = short.removesuffix(".weight").rpartition(".")
        flat = module.replace(".", "_")
        kind = "lora_down" if side == "lora_A" else "lora_up"
        files_of["diffusers"][f"transformer.{short}"] = tensors[name]
        files_of["VideoX-Fun"][f"lora_unet__{flat}.{kind}.weight"] = tensors[name]
    found = []
    for form, state in files_of.items():
        save_file(state, tmp_path / f"{form}.safetensors")
        found.append(sampled(load_lora(base, tmp_path / f"{form}.safetensors", 1.0)[0]))
    assert torch.equal(*found)


def test_the_node_reports_and_refuses(folder, base, run_node):
    name = str(Path("5b") / OUR_FILE)
    assert files.choices(files.LORA, folders=False) == [
        str(Path(variant) / OUR_FILE) for variant in sorted([*CONFIGS, "second"])
    ]
    patched, report = run_node(MimirLoadLora, model=base, lora_name=name, strength=1.0)
    assert report == "matched 19 of 19 modules (rank 4, alpha 6, scale 1.5); unmatched: none"
    assert patched is not base
    assert load_lora(base, folder / "loras" / name, 0.0)[1].startswith("Strength 0, so it has no effect: ")
    idle = {
        name: tensor * ("lora_B" not in name) for name, tensor in load_file(folder / "loras" / name).items()
    }
    save_file(idle, folder / "loras" / "idle.safetensors")
    report = load_lora(base, folder / "loras" / "idle.safetensors", 1.0)[1]
    (folder / "loras" / "idle.safetensors").unlink()
    assert report.endswith("it has no effect, since what it adds is all zeros"), report
    before = MimirLoadLora.fingerprint_inputs(lora_name=name, strength=1.0)
    settings = folder / "loras" / "5b" / "adapter_config.json"
    settings.write_text(settings.read_text() + " ")
    assert MimirLoadLora.fingerprint_inputs(lora_name=name, strength=1.0) != before
    flux = {
        f"transformer.single_transformer_blocks.{i}.attn.to_q.lora_A.weight": torch.zeros(1, 8)
        for i in range(38)
    }
    save_file(flux, folder / "loras" / "flux.safetensors")
    with pytest.raises(ValueError, match="a LoRA for Flux .*: CogVideoX lacks 38 of its 38 modules"):
        run_node(MimirLoadLora, model=base, lora_name="flux.safetensors", strength=1.0)
    with pytest.raises(ValueError, match="a LoRA for Flux"):
        run_node(MimirLoadLora, model=base, lora_name="flux.safetensors", strength=0.0)
    (folder / "loras" / "flux.safetensors").unlink()


def test_weights_in_fp8_take_it_too(folder, base):
    small = host_model.load_dit(folder / "5b", "fp8_e4m3fn")
    patched = apply(small, folder, "5b")
    assert 0.002 < relative(ours(patched), ours(apply(base, folder, "5b"))) < 0.1
    assert relative(ours(patched), ours(small)) > 0.1


class Native(torch.nn.Module):
    """A MODEL whose modules have the names of the host's own CogVideoX."""

    def __init__(self, block: str = "blocks") -> None:
        super().__init__()
        network = torch.nn.Module()
        network.patch_embed = torch.nn.ModuleDict({"text_proj": torch.nn.Linear(24, 64)})
        network.add_module(block, torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(64, 64)})]))
        self.diffusion_model = network


def patcher(module: torch.nn.Module) -> Any:
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(module, load_device=device, offload_device=device)


def test_the_hosts_native_names_and_other_models(tmp_path):
    up, down = torch.randn(64, 2), torch.randn(2, 64)
    name = "transformer.transformer_blocks.0.attn1.to_q"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "x.safetensors")
    native = patcher(Native())
    weight = native.model.diffusion_model.blocks[0]["q"].weight
    before = weight.detach().clone()
    patched, _, _ = load_lora(native, tmp_path / "x.safetensors", 0.5)
    patched.patch_model()
    assert torch.allclose(
        native.model.diffusion_model.blocks[0]["q"].weight, before + 0.5 * up @ down, atol=1e-6
    )
    patched.unpatch_model()
    assert torch.equal(native.model.diffusion_model.blocks[0]["q"].weight, before)
    with pytest.raises(ValueError, match="The MODEL is no CogVideoX transformer.*Load Mimir DiT"):
        load_lora(patcher(Native("joint_blocks")), tmp_path / "x.safetensors", 1.0)


@pytest.mark.parametrize("algorithm", ["LoRA", "LoKr"])
def test_what_core_trains_loads_with_both_nodes(folder, base, run_node, algorithm):
    latents, _, text = inputs()
    trained = nodes_train.TrainLoraNode.GET_SCHEMA().inputs
    options = {
        widget.id: widget.default for widget in trained if getattr(widget, "default", None) is not None
    }
    options.update(steps=2, rank=2, learning_rate=0.05, training_dtype="fp32", lora_dtype="fp32")
    lists = {key: [value] for key, value in {**options, "algorithm": algorithm, "model": base}.items()}
    lists["latents"] = [{"samples": latents}, {"samples": -latents}]  # 0.3.75 cannot train on one
    lists["positive"] = [[[text, {}]], [[-text, {}]]]
    made = [output for output in run_node(nodes_train.TrainLoraNode, **lists) if isinstance(output, dict)]
    lora, losses = sorted(made, key=lambda output: "loss" in output)
    assert len(losses["loss"]) == 2
    nodes_train.SaveLoRA.execute(lora, f"loras/{algorithm}", 2)
    (saved,) = (Path(folder_paths.get_output_directory()) / "loras").glob(f"{algorithm}*")
    path = Path(shutil.copy(saved, folder / "loras" / "core.safetensors"))
    folder_paths.filename_list_cache.pop("loras", None)
    core = host_nodes.LoraLoaderModelOnly().load_lora_model_only(base, "core.safetensors", 1.0)[0]
    patched, report = run_node(MimirLoadLora, model=base, lora_name="core.safetensors", strength=1.0)
    path.unlink()
    assert "unmatched: none" in report
    assert torch.equal(ours(patched), ours(core)) and relative(ours(patched), ours(base)) > 1e-3
