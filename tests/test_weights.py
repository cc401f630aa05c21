"""Reading model files of diffusers and transformers themselves: whole, sharded, prefixed, and wrong ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mimir_core import recognise as R
from mimir_core import weights as W
from mimir_core.config import (
    DIT_PRESETS,
    FUSER_PRESETS,
    PHI_PRESETS,
    T5_PRESETS,
    DiffusionConfig,
    DiTConfig,
    FuserConfig,
    default_diffusion,
    to_dict,
)
from mimir_core.dit import CogVideoXTransformer
from mimir_core.fuser import TokenFuser, untrained_state
from mimir_core.vae import build_vae

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

DIT = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16, time_embed_dim=8, text_embed_dim=12
)
DIT_15 = DiTConfig(**{**to_dict(DIT), "patch_size_t": 2, "patch_bias": False})
VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1, "scaling_factor": 0.9}
READERS = {
    "transformer": W.read_transformer,
    "vae": W.read_vae,
    "t5": W.read_t5,
    "phi": W.read_phi,
    "fuser": W.read_fuser,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A diffusers model as from_pretrained would find it, plus Phi and a fuser; small and random."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    model = diffusers.CogVideoXTransformer3DModel(**to_dict(DIT))
    model.save_pretrained(root / "transformer", max_shard_size="20KB")
    diffusers.AutoencoderKLCogVideoX(**VAE).save_pretrained(root / "vae")
    t5 = {**to_dict(T5_PRESETS["tiny"]), "vocab_size": 40}
    transformers.T5EncoderModel(transformers.T5Config(**t5)).save_pretrained(root / "text_encoder")
    phi = {**PHI_PRESETS["tiny"].to_dict(), "vocab_size": 40, "tie_word_embeddings": False}
    phi["rope_scaling"] = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    language_model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**phi))
    language_model.save_pretrained(root / "phi", max_shard_size="300KB")
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=2.0,
    )
    scheduler.save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text("{}")
    fuser = FuserConfig(text_dim=12, llm_dim=128)
    W.save_fuser(root / "fuser.safetensors", fuser, untrained_state(fuser), torch.float16)
    return root


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def single(folder: Path, file: Path, prefix: str = "", **extra: torch.Tensor) -> Path:
    """The tensors of a folder as one file without configuration, as people pass them on."""
    state = {prefix + name: tensor for name, tensor in whole(folder).items()}
    save_file({**state, **extra}, file)
    return file


def equal(found, expected) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


# --- transformer


def test_sharded_diffusers_transformer(root):
    assert len(list((root / "transformer").glob("*.safetensors"))) > 2
    for path in (root / "transformer", root, next((root / "transformer").glob("*.safetensors"))):
        found = W.read_transformer(path)
        assert found.config == DIT and equal(found.state, whole(root / "transformer"))
        assert found.diffusion == DiffusionConfig(snr_shift_scale=2.0, latent_scale=0.9)


@torch.no_grad()
def test_loaded_transformer_computes_what_was_saved(root):
    model, _ = W.load_transformer(root / "transformer")
    reference = CogVideoXTransformer(DIT).eval()
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(root / "transformer")
    reference.load_state_dict(theirs.state_dict())
    arguments = torch.randn(1, 16, 2, 4, 4), torch.tensor([500]), torch.randn(1, 3, 12)
    torch.testing.assert_close(model(*arguments), reference(*arguments))
    half, _ = W.load_transformer(root / "transformer", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16} == {half.dtype}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
def test_single_file_with_any_prefix(root, tmp_path, prefix):
    found = W.read_transformer(single(root / "transformer", tmp_path / "x.safetensors", prefix))
    assert found.config == DIT and equal(found.state, whole(root / "transformer"))
    assert found.diffusion == default_diffusion(DIT)


def test_comfy_layout(root, tmp_path):
    state = {R.to_comfy(name): tensor for name, tensor in whole(root / "transformer").items()}
    assert "blocks.1.attn_out.weight" in state and "time_embedding_linear_1.bias" in state
    save_file(state, tmp_path / "x.safetensors")
    assert equal(W.read_transformer(tmp_path / "x.safetensors").state, whole(root / "transformer"))


def test_renames_are_undone_by_their_reverse():
    with torch.device("meta"):
        names = list(CogVideoXTransformer(DIT).state_dict())
    assert [R.from_comfy(R.to_comfy(name)) for name in names] == names
    assert len({R.to_comfy(name) for name in names}) == len(names)


@pytest.mark.parametrize("name", ["2b", "5b", "1.5-5b"])
def test_published_sizes_are_inferred_from_their_shapes(name):
    with torch.device("meta"):
        theirs = diffusers.CogVideoXTransformer3DModel(**to_dict(DIT_PRESETS[name]))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert R.infer_dit(shapes) == DIT_PRESETS[name]
    assert R.dit_variant(shapes) is None


LEARNED = {"use_learned_positional_embeddings": True, "sample_height": 4, "sample_width": 4}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"in_channels": 32}, "image-to-video or CogVideoX-Fun control"),
        ({"in_channels": 33}, "CogVideoX-Fun inpainting"),
        ({"in_channels": 33, "patch_size_t": 2}, "CogVideoX-Fun inpainting"),
        ({"in_channels": 48, "patch_size_t": 2}, "inpainting masked video .VOID"),
        (
            {"in_channels": 32, "ofs_embed_dim": 8, "patch_size_t": 2},
            "CogVideoX1.5-5B-I2V, an image-to-video",
        ),
        ({"in_channels": 32, **LEARNED}, "CogVideoX-5B-I2V, an image-to-video"),
        (LEARNED, "learned positions"),
    ],
)
def test_other_cogvideox_variants_are_named_and_refused(tmp_path, change, words):
    model = diffusers.CogVideoXTransformer3DModel(**{**to_dict(DIT), **change})
    model.save_pretrained(tmp_path / "folder")
    for path in (tmp_path / "folder", single(tmp_path / "folder", tmp_path / "x.safetensors")):
        needed = "text-to-video transformer is needed.*CogVideoX_5b_bf16.*ComfyUI-CogVideoXWrapper"
        with pytest.raises(ValueError, match=f"{words}.*{needed}") as error:
            W.read_transformer(path)
        assert len(str(error.value)) < 420


def test_a_2b_of_fewer_layers_keeps_its_positions():
    with torch.device("meta"):
        theirs = diffusers.CogVideoXTransformer3DModel(**{**to_dict(DIT_PRESETS["2b"]), "num_layers": 24})
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    found = R.infer_dit(shapes)
    assert found.num_layers == 24 and not found.use_rotary_positional_embeddings


def test_own_file_describes_itself(tmp_path):
    torch.manual_seed(0)
    model, diffusion = CogVideoXTransformer(DIT_15), DiffusionConfig(snr_shift_scale=1.5, latent_scale=0.3)
    preview = {"factors": [[0.0, 0.1, 0.2]] * 16, "bias": [0.0, 0.0, 0.0]}
    file = tmp_path / "x.safetensors"
    W.save_transformer(file, DIT_15, diffusion, model.state_dict(), torch.float16, preview)
    found = W.read_transformer(file)
    assert (found.config, found.diffusion, found.header["preview"]) == (DIT_15, diffusion, preview)
    assert {tensor.dtype for tensor in found.state.values()} == {torch.float16}


def test_scaled_fp8_transformer_is_dequantised(tmp_path):
    state = {name: tensor.clone() for name, tensor in CogVideoXTransformer(DIT).state_dict().items()}
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    scale = state[name].abs().max() / 448
    state[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    expected, state[name] = state[name], (state[name] / scale).to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "x.safetensors")
    found = W.read_transformer(tmp_path / "x.safetensors").state[name]
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=1e-3)


# --- text encoders, VAE, fuser


def test_t5_folder_and_single_file(root, tmp_path):
    expected = {**to_dict(T5_PRESETS["tiny"]), "vocab_size": 40}
    files = [
        root / "text_encoder",
        single(root / "text_encoder", tmp_path / "a.safetensors"),
        single(root / "text_encoder", tmp_path / "b.safetensors", "text_encoders.t5xxl.transformer."),
    ]
    for path in files:
        found = W.read_t5(path)
        assert to_dict(found.config) == expected
        assert equal(found.state, whole(root / "text_encoder"))


def test_scaled_fp8_t5_as_comfyui_users_have_it(root, tmp_path):
    state = whole(root / "text_encoder")
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    expected, scale = state[name], state[name].abs().max() / 448
    state[name] = (expected / scale).to(torch.float8_e4m3fn)
    state[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    state["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    save_file(state, tmp_path / "x.safetensors")
    found = W.read_t5(tmp_path / "x.safetensors").state
    assert found[name].dtype == torch.float8_e4m3fn and "scaled_fp8" in found
    plain = W.dequantised(found, torch.float32)
    assert plain.keys() == whole(root / "text_encoder").keys()
    torch.testing.assert_close(plain[name], expected, rtol=0.1, atol=1e-3)


def test_xxl_is_recognised_from_its_shapes():
    with torch.device("meta"):
        theirs = transformers.T5EncoderModel(transformers.T5Config(**to_dict(T5_PRESETS["xxl"])))
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert R.infer_t5(shapes) == T5_PRESETS["xxl"]
    assert R.t5_names(T5_PRESETS["xxl"]) == shapes.keys() - {"shared.weight", "encoder.embed_tokens.weight"}


def test_phi_sharded_folder(root, tmp_path):
    assert len(list((root / "phi").glob("*.safetensors"))) > 2
    found = W.read_phi(root / "phi")
    assert found.config.long_factor == (2.0,) * 16 and equal(found.state, whole(root / "phi"))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    theirs = transformers.Phi3ForCausalLM.from_pretrained(root / "phi").eval()
    with torch.no_grad():
        ours = W.load_phi(root / "phi").state_dict()
        assert theirs(ids).logits.shape[-1] == 40
    assert equal(ours, theirs.state_dict())
    with pytest.raises(ValueError, match="without its config.json"):
        W.read_phi(single(root / "phi", tmp_path / "x.safetensors"))


def test_vae_folder_and_single_file(root, tmp_path):
    found = W.read_vae(root)
    assert found.config["scaling_factor"] == 0.9 and equal(found.state, whole(root / "vae"))
    file = single(root / "vae", tmp_path / "x.safetensors")
    latents = torch.randn(1, 16, 1, 2, 2)
    theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(root / "vae")
    with torch.no_grad():
        for path in (root / "vae", file):
            assert torch.equal(W.load_vae(path).decode(latents).sample, theirs.decode(latents).sample)


def test_own_vae_keeps_what_shapes_cannot_tell(tmp_path):
    config = {**VAE, "norm_num_groups": 4}
    W.save_vae(tmp_path / "x.safetensors", config, build_vae(config).state_dict())
    assert W.load_vae(tmp_path / "x.safetensors").config.norm_num_groups == 4


@pytest.mark.parametrize("name", [name for name in FUSER_PRESETS if name != "baseline"])
def test_fuser_round_trip(tmp_path, name):
    config = FuserConfig(**{**to_dict(FUSER_PRESETS[name]), "text_dim": 12, "llm_dim": 8})
    torch.manual_seed(0)
    fuser = TokenFuser(config)
    W.save_fuser(tmp_path / "x.safetensors", config, fuser.state_dict())
    found = W.load_fuser(tmp_path / "x.safetensors")
    assert found.config == config and equal(found.state_dict(), fuser.state_dict())
    assert W.inspect(tmp_path / "x.safetensors").kind == "mimir-fuser"


# --- what is not what it should be


def sd15(file: Path) -> Path:
    names = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight")
    clip = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    save_file({name: torch.zeros(4, 4) for name in (*names, clip)}, file)
    return file


def truncated(root: Path, file: Path) -> Path:
    single(root / "transformer", file)
    file.write_bytes(file.read_bytes()[:-100])
    return file


WRONG = {
    "truncated": (lambda root, file: truncated(root, file), "incomplete.*download it again"),
    "cut header": (lambda root, file: _written(file, truncated(root, file).read_bytes()[:200]), "incomplete"),
    "text": (lambda root, file: _written(file, b"hello, these are no weights\n"), "a text file"),
    "web page": (lambda root, file: _written(file, b"<!DOCTYPE html><html>404</html>"), "a web page"),
    "lfs": (
        lambda root, file: _written(file, b"version https://git-lfs.github.com/spec/v1\n"),
        "git-lfs pointer",
    ),
    "empty": (lambda root, file: _written(file, b""), "an empty file"),
    "pickle": (lambda root, file: (torch.save({"a": 1}, file), file)[1], "pickle.*safetensors version"),
    "gguf": (lambda root, file: _written(file, b"GGUF\x03\0\0\0\0\0\0\0"), "GGUF"),
    "noise": (lambda root, file: _written(file, b"\x10\0\0\0\0\0\0\0" + b"{]" * 8), "damaged"),
    "sd15": (lambda root, file: sd15(file), "a Stable Diffusion checkpoint"),
    "unknown": (
        lambda root, file: (save_file({"a": torch.zeros(1)}, file), file)[1],
        "no model that this pack",
    ),
    "missing": (lambda root, file: file, "does not exist"),
    "no index": (lambda root, file: _without_index(root, file), "without their index.*index.json as well"),
    "shard gone": (lambda root, file: _without_shard(root, file), "not there.*download the missing"),
    "no weights": (lambda root, file: (file.mkdir(), file)[1], "no safetensors file"),
    "only pickles": (
        lambda root, file: (file.mkdir(), _written(file / "model.bin", b"x"), file)[2],
        "pickles",
    ),
}


def _written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def _without_index(root: Path, folder: Path) -> Path:
    shutil.copytree(root / "transformer", folder)
    next(folder.glob("*.index.json")).unlink()
    return folder


def _without_shard(root: Path, folder: Path) -> Path:
    shutil.copytree(root / "phi", folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    return folder


@pytest.mark.parametrize("slot", READERS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_files_are_explained_in_one_sentence(root, tmp_path, slot, wrong):
    make, words = WRONG[wrong]
    with pytest.raises(ValueError, match=words) as caught:
        READERS[slot](make(root, tmp_path / "model.safetensors"))
    message = str(caught.value)
    assert "model.safetensors" in message and "is needed here: " in message
    assert message.endswith(".") and message.count(". ") == 0 and "\n" not in message


PARTS = {
    "transformer": ("transformer", "a CogVideoX transformer"),
    "vae": ("vae", "a CogVideoX VAE"),
    "t5": ("text_encoder", "a T5 v1.1 text encoder"),
    "phi": ("phi", "a Phi-3 language model"),
    "fuser": ("fuser.safetensors", "a Mimir Token Fuser"),
}


@pytest.mark.parametrize("slot", READERS)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_in_the_slot_of_another_is_named(root, slot, part):
    path, words = PARTS[part]
    if slot == part:
        READERS[slot](root / path)
        return
    with pytest.raises(ValueError, match=words) as caught:
        READERS[slot](root / path)
    assert "is needed here: " in str(caught.value) and Path(path).name in str(caught.value)


def test_missing_and_unknown_tensors_are_named(root, tmp_path):
    state = whole(root / "transformer")
    state.pop("norm_final.bias")
    state["new.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="lacks norm_final.bias, has unknown new.weight"):
        W.read_transformer(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("slot", "folder", "lost"),
    [
        ("transformer", "transformer", "patch_embed.proj.weight"),
        ("vae", "vae", "encoder.down_blocks.0.resnets.0.conv1.conv.weight"),
        ("t5", "text_encoder", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
    ],
)
def test_a_missing_tensor_that_tells_the_size_is_named(root, tmp_path, slot, folder, lost):
    state = whole(root / folder)
    save_file({name: tensor for name, tensor in state.items() if name != lost}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"parts are missing .{lost}.*complete one is needed"):
        READERS[slot](tmp_path / "x.safetensors")


def test_an_index_cannot_reach_outside_its_folder(root, tmp_path):
    folder = tmp_path / "phi"
    shutil.copytree(root / "phi", folder)
    index = next(folder.glob("*.index.json"))
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {name: "../../secret.safetensors" for name in names}}))
    with pytest.raises(ValueError, match="names secret.safetensors, which is not there"):
        W.read_phi(folder)
    other = {name: f"{count % 2}.safetensors" for count, name in enumerate(names)}
    index.write_text(json.dumps({"weight_map": other}))
    with pytest.raises(ValueError, match="names 0.safetensors, 1.safetensors, which are not there, but"):
        W.read_phi(folder)


@pytest.mark.parametrize("kind", R.KINDS, ids=lambda kind: kind.kind)
def test_every_kind_is_recognised_by_its_own_marks(tmp_path, kind):
    names = [mark.replace("*", "any.") for mark in kind.marks]
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "x.safetensors")
    assert W.inspect(tmp_path / "x.safetensors").kind == kind.kind
