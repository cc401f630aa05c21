"""Models from files, at full text length: the host's own with our conditions, 1.5 in windows, and compiled.

They are small and random, but what a file is, core finds out by itself. The host's CogVideoX (0.33) is right
for 1.5, so that it and ours must give one video.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.client import Client
from launcher.server import Server
from mimir_core.config import FuserConfig
from mimir_core.fuser import untrained_state
from mimir_core.recognise import COMFY_NAMES
from mimir_core.weights import save_fuser

from .graph import Graph, Ref, relative
from .inprocess import references

ONE_AND_A_HALF = {**references.DIT_15, "num_attention_heads": 1, "attention_head_dim": 64}
LTXV: dict[str, Any] = {
    "in_channels": 128, "out_channels": 128, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 32, "cross_attention_dim": 64, "caption_channels": references.TEXT_WIDTH,
}  # fmt: skip
LTXV_NAMES = {
    "proj_in.": "patchify_proj.",
    "time_embed.": "adaln_single.",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
NATIVE_NAMES = {theirs: native for native, theirs in COMFY_NAMES.items()}
NATIVE_SCALE, OUR_SCALE = 1.15258426, 0.7  # of latents: the host takes a narrow model for a 2B


@pytest.fixture(scope="module")
def files(server: Server) -> None:
    """Encoders, a fuser and three models in the server's folders, under names of their own."""
    models = server.base / "models"
    references.save_t5(models / "text_encoders" / "other_t5")
    references.save_phi(models / "text_encoders" / "other_phi")
    config = FuserConfig(text_dim=references.TEXT_WIDTH, llm_dim=references.PHI_WIDTH)
    torch.manual_seed(5)
    state = {name: torch.randn(tensor.shape) * 0.2 for name, tensor in untrained_state(config).items()}
    (models / "mimir").mkdir(exist_ok=True)
    save_fuser(models / "mimir" / "other_fuser.safetensors", config, state)
    ours = references.transformer(**ONE_AND_A_HALF)
    ours.save_pretrained(models / "diffusion_models" / "other_15")
    renamed(ours, NATIVE_NAMES, models / "diffusion_models" / "other_native.safetensors")
    renamed(ltxv(), LTXV_NAMES, models / "diffusion_models" / "other_ltxv.safetensors", LTXV)


def ltxv() -> Any:
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

    torch.manual_seed(6)
    model = LTXVideoTransformer3DModel(**LTXV)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def renamed(model: Any, names: dict[str, str], path: Path, config: dict[str, Any] | None = None) -> None:
    """A file of the host's own layout; its header holds `config` where the weights do not tell it."""
    import json

    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor.contiguous().clone()
    save_file(state, path, {"config": json.dumps({"transformer": config})} if config else None)


class Encoded(Graph):
    """T5 at full length and a fuser that changes what it reads: `alone` 226 tokens, `fused` 230."""

    def __init__(self, host: Client, text: str) -> None:
        super().__init__(host)
        t5 = self.add("MimirLoadT5", t5_name="other_t5")
        phi = self.add("MimirLoadPhi", phi_name="other_phi")
        fuser = self.add("MimirLoadFuser", fuser_name="other_fuser.safetensors")
        self.negative = self.add("MimirT5Encode", clip=t5, text="")
        self.alone = self.add("MimirT5Encode", clip=t5, text=text)
        tokens = self.add(
            "MimirPhiEncode", clip=phi, text=text, instructions="count it\nname it\nit\nsay", answer_length=0,
            temperature=0.0, seed=0, layer=-1,
        )  # fmt: skip
        self.fused = self.add(
            "MimirTokenFuser", conditioning=self.alone, tokens=tokens, fuser=fuser, preset="as trained",
            strength=1.0, start=0.0, end=1.0,
        )  # fmt: skip

    def sample(self, model: Ref, positive: Ref, latent: Ref, **changed: Any) -> Ref:
        settings = {
            "seed": 7, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        }  # fmt: skip
        return self.add(
            "KSampler", model=model, positive=positive, negative=self.negative, latent_image=latent,
            **{**settings, **changed},
        )  # fmt: skip

    def video(self, latent_frames: int) -> Ref:
        length = latent_frames * 4 - 3
        return self.add("EmptyHunyuanLatentVideo", width=64, height=64, length=length, batch_size=1)


@pytest.fixture
def encoded(host: Client, files: None, request: pytest.FixtureRequest) -> Encoded:
    return Encoded(host, f"a red circle moves left {request.node.name}")


def test_ltxv_reads_the_fused_condition(encoded: Encoded) -> None:
    model = encoded.add("UNETLoader", unet_name="other_ltxv.safetensors", weight_dtype="default")
    empty = encoded.add("EmptyLTXVLatentVideo", width=128, height=128, length=17, batch_size=1)
    found = encoded.run(
        fused=encoded.sample(model, encoded.fused, empty), alone=encoded.sample(model, encoded.alone, empty)
    )
    assert "the condition has 230" in encoded.notes[encoded.fused[0]]
    assert found["fused"].shape == (1, 128, 3, 4, 4) and torch.isfinite(found["fused"]).all()
    assert relative(found["fused"], found["alone"]) > 1e-3


def test_the_hosts_own_cogvideox_gives_our_video(encoded: Encoded, object_info: dict[str, Any]) -> None:
    if "VOIDSampler" not in object_info:
        pytest.skip("this host has no CogVideoX of its own")
    native = encoded.add("UNETLoader", unet_name="other_native.safetensors", weight_dtype="default")
    native = encoded.add("ModelSamplingDiscrete", model=native, sampling="v_prediction", zsnr=True)
    ours = encoded.add("MimirLoadModel", model_name="other_15", dtype="float32")
    video = encoded.video(4)
    found = encoded.run(
        native=encoded.sample(native, encoded.fused, video),
        ours=encoded.sample(ours, encoded.fused, video),
        alone=encoded.sample(native, encoded.alone, video),
    )
    assert "the condition has 230" in encoded.notes[encoded.fused[0]]
    assert relative(found["native"] * NATIVE_SCALE, found["ours"] * OUR_SCALE) < 1e-3
    assert relative(found["native"], found["alone"]) > 1e-3


def test_one_and_a_half_in_windows(encoded: Encoded) -> None:
    """41 frames, 11 latent ones and one in front, in windows of odd and even length; one holds all."""
    model = encoded.add("MimirLoadModel", model_name="other_15", dtype="float32")
    kind = "ContextWindowsManual"
    extra = encoded.known(
        kind, freenoise=False, cond_retain_index_list="", split_conds_to_windows=False,
        latent_retain_index_list="", causal_window_fix=True,
    )  # fmt: skip

    def windows(length: int, schedule: str) -> Ref:
        return encoded.add(
            kind, model=model, context_length=length, context_overlap=2, context_schedule=schedule,
            context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2, **extra,
        )  # fmt: skip

    long = encoded.add("MimirEmptyLatent", width=64, height=64, frames=41, batch=1)
    models = {
        "plain": model, "whole": windows(12, "standard_static"), "odd": windows(5, "standard_uniform"),
        "even": windows(4, "standard_static"),
    }  # fmt: skip
    found = encoded.run(**{name: encoded.sample(each, encoded.fused, long) for name, each in models.items()})
    assert torch.equal(found["whole"], found["plain"])
    for video in found.values():
        assert video.shape == (1, 16, 11, 8, 8) and torch.isfinite(video).all()


def test_compiled_is_eager(encoded: Encoded, object_info: dict[str, Any]) -> None:
    """Backend cudagraphs, which needs no C++ compiler; without a card the graph is run as it is."""
    plain = eager = encoded.add("MimirLoadModel", model_name="other_15", dtype="float32")
    if "ModelAttentionBackend" in object_info:  # 0.33: an attention override by a node of core's
        eager = encoded.add("ModelAttentionBackend", model=plain, attention="pytorch attention")
    compiled = encoded.add("TorchCompileModel", model=eager, backend="cudagraphs")
    models, video = {"plain": plain, "eager": eager, "compiled": compiled}, encoded.video(4)
    found = encoded.run(**{name: encoded.sample(each, encoded.fused, video) for name, each in models.items()})
    assert relative(found["compiled"], found["eager"]) < 1e-4
    assert relative(found["eager"], found["plain"]) < 1e-4
