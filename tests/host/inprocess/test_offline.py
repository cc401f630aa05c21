"""Nothing opens a network connection while a graph runs, although no library was told to stay offline."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from mimir_pack import nodes
from mimir_pack.mimir_core.config import DEFAULT_INSTRUCTIONS
from mimir_pack.nodes.host import t5 as host_t5
from mimir_pack.nodes.host import tiny
from mimir_pack.nodes.host.model import load_dit
from mimir_pack.nodes.host.phi import load_phi
from mimir_pack.nodes.host.vae import load_vae
from mimir_pack.tests.host.inprocess import references

READ = {
    "instructions": "\n".join(DEFAULT_INSTRUCTIONS), "answer_length": 4, "temperature": 0.7, "seed": 0,
    "layer": -1,
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every attempt to reach another machine, also those whose failure is caught; each is refused."""
    found: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        found.append(repr(args))
        raise OSError("no network in this test")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield found


def test_the_fixture_sees_a_request_of_the_hub_library(calls):
    with pytest.raises(Exception):  # noqa: B017  whatever its HTTP client makes of the refusal
        huggingface_hub.get_session().get("https://huggingface.co/api/models")
    assert calls


def test_mimir_tiny_from_prompt_to_frames_and_back(calls, run_node):
    model, t5, phi, fuser, vae = tiny.load_tiny("mimir")

    def read(text: str) -> Any:
        (condition,) = run_node(nodes.MimirT5Encode, clip=t5, text=text)
        tokens, _ = run_node(nodes.MimirPhiEncode, clip=phi, text=text, **READ)
        return run_node(
            nodes.MimirTokenFuser, conditioning=condition, tokens=tokens, fuser=fuser, preset="as trained",
            strength=1.0, start=0.0, end=1.0,
        )[0]  # fmt: skip

    (empty,) = run_node(nodes.MimirEmptyLatent, width=64, height=64, frames=9, batch=1)
    (latent,) = run_node(
        nodes.MimirSampler, model=model, positive=read("a red circle moves left"), negative=read(""),
        latent=empty, seed=1, steps=2, cfg=2.0, dynamic_cfg="off", sampler_name="euler", scheduler="simple",
        denoise=1.0,
    )  # fmt: skip
    (frames,) = run_node(nodes.MimirVAEDecode, vae=vae, latent=latent, tiling="auto")
    run_node(nodes.MimirVAEEncode, vae=vae, image=frames, tiling="auto")
    assert frames.shape == (9, 64, 64, 3) and not calls


def test_every_loader_of_files(calls, run_node, tmp_path):
    """Hugging Face and diffusers folders, and T5-XXL's way to the tokenizer that ComfyUI ships."""
    folders: dict[str, Path] = {name: tmp_path / name for name in ("dit", "t5", "phi", "vae")}
    references.transformer().save_pretrained(folders["dit"])
    references.vae().save_pretrained(folders["vae"])
    references.save_t5(folders["t5"])
    references.save_phi(folders["phi"])
    load_dit(folders["dit"])
    load_vae(folders["vae"])
    (condition,) = run_node(nodes.MimirT5Encode, clip=host_t5.load_t5(folders["t5"]), text="a red circle")
    tokens, _ = run_node(nodes.MimirPhiEncode, clip=load_phi(folders["phi"]), text="a red circle", **READ)
    assert host_t5.load_tokenizer(host_t5.HOST_TOKENIZER)("a red circle")["input_ids"]
    assert condition[0][0].shape == (1, 226, references.TEXT_WIDTH) and torch.isfinite(tokens.query).all()
    assert not calls
