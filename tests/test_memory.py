"""The counts of mimir_core.memory against a trace of the networks, at the sizes that people use.

On the meta device tensors have shapes and no contents, so a 5B at 49 x 480 x 720 can be traced anywhere:
every tensor that an operation makes is counted until nothing holds it any more.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimir_core import memory, positions
from mimir_core.config import DIT_PRESETS, PHI_PRESETS
from mimir_core.dit import CogVideoXTransformer
from mimir_core.phi import Phi3ForCausalLM
from mimir_core.plan import Machine, Stage, judge, main_memory, report

GB = memory.GB


class Trace(TorchDispatchMode):
    """Bytes of the tensors made inside it: alive now, and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self.seen:
                self.seen.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.alive -= size
        self.seen.discard(key)


def peak(function: Any) -> int:
    with torch.no_grad(), Trace() as trace:
        kept = function()
    del kept
    return trace.peak


def test_trace_counts_what_is_alive():
    def work() -> torch.Tensor:
        x = torch.empty(1000, device="meta")
        y = (x + 1) + 1  # the inner sum is gone when y is there
        return y[:10]

    assert peak(work) == 3 * 4000


def no_attention(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """A kernel without work space: what flash attention and PyTorch's other fused ones are."""
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@pytest.mark.parametrize(
    ("preset", "dtype", "latent", "batch"),
    [
        ("5b", torch.bfloat16, (13, 60, 90), 2),
        ("5b", torch.float32, (5, 32, 48), 1),
        ("2b", torch.float16, (13, 60, 90), 2),
        ("1.5-5b", torch.bfloat16, (22, 96, 170), 2),
    ],
)
def test_dit_is_what_a_trace_counts(monkeypatch, preset, dtype, latent, batch):
    monkeypatch.setattr(positions, "COMPLEX_DEVICES", {"meta"})
    config = replace(DIT_PRESETS[preset], num_layers=3)  # blocks follow each other: a fourth adds nothing
    model = CogVideoXTransformer(config, attention=no_attention, device="meta", dtype=dtype)
    latents = torch.empty(batch, 16, *latent, device="meta", dtype=dtype)
    text = torch.empty(batch, 230, 4096, device="meta", dtype=dtype)
    step = torch.empty(batch, device="meta")
    found = peak(lambda: model(latents, step, text))
    assert memory.dit(config, latent, batch, 230, dtype.itemsize) == pytest.approx(found, rel=0.1)


def test_the_hosts_factor_is_the_same_count():
    """ComfyUI multiplies it with pixels, bytes per value and its unit; text and tables are a few per cent."""
    for preset in ("2b", "5b", "1.5-5b"):
        config, latent = DIT_PRESETS[preset], (14, 60, 90)
        theirs = 2 * 14 * 60 * 90 * 2 * memory.HOST_UNIT * memory.host_factor(config)
        assert theirs == pytest.approx(memory.dit(config, latent, 2, 226, 2), rel=0.1)


PUBLISHED_VAE: dict[str, Any] = {}
SMALL_VAE = {"block_out_channels": (64, 128, 128, 256), "layers_per_block": 2, "norm_num_groups": 8}


@pytest.mark.parametrize(
    ("config", "latent", "tile"),
    [
        (PUBLISHED_VAE, (13, 60, 90), None),
        (PUBLISHED_VAE, (5, 60, 90), (240, 360)),
        (PUBLISHED_VAE, (3, 30, 45), None),
        (SMALL_VAE, (5, 30, 45), None),
        (SMALL_VAE, (2, 60, 90), (240, 360)),
    ],
)
def test_vae_is_what_a_trace_counts(config, latent, tile):
    pytest.importorskip("diffusers")
    from mimir_core import vae as V

    model = V.build_vae(config, device="meta", dtype=torch.bfloat16)
    latents = torch.empty(1, 16, *latent, device="meta", dtype=torch.bfloat16)
    found = peak(lambda: V.decode(model, latents, tile))
    assert memory.vae_decode(config, latent, 2, tile) == pytest.approx(found, rel=0.1)
    if latent[0] % 2:
        size = (V.pixel_frames(latent[0]), latent[1] * 8, latent[2] * 8)
        video = torch.empty(1, 3, *size, device="meta", dtype=torch.bfloat16)
        found = peak(lambda: V.encode(model, video, tile=tile)) + video.nbytes
        assert memory.vae_encode(config, size, 2, tile) == pytest.approx(found, rel=0.1)


def test_whole_decoding_takes_little_more_than_half_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX

    with torch.device("meta"):
        theirs: Any = AutoencoderKLCogVideoX()
        theirs.to(torch.bfloat16)
    latents = torch.empty(1, 16, 13, 60, 90, device="meta", dtype=torch.bfloat16)
    found = peak(lambda: theirs.decode(latents).sample)
    assert memory.vae_decode({}, (13, 60, 90), 2) < 0.56 * found
    assert (found / GB, memory.vae_decode({}, (13, 60, 90), 2) / GB) == pytest.approx((15.8, 8.6), abs=0.1)


@pytest.mark.parametrize("length", [300, 3000])
def test_phi_is_what_a_trace_counts(length):
    """The prefix is read, forked for the answer, and forked for an instruction."""
    config = PHI_PRESETS["phi-3.5-mini"]
    model = Phi3ForCausalLM(config, attention=no_attention, device="meta", dtype=torch.bfloat16)

    def work() -> Any:
        prefix = model.new_cache()
        first = model(torch.empty(1, length - 40, dtype=torch.long, device="meta"), prefix)
        answer, instruction = prefix.fork(), prefix.fork()
        rest = torch.empty(1, 40, dtype=torch.long, device="meta")
        return first, model(rest, answer), model(rest, instruction)

    assert memory.phi(config, length, 2, 2) == pytest.approx(peak(work), rel=0.15)


RAM = 64 * GB
CARD = Machine(12 * GB, int(11.4 * GB), int(0.4 * GB), int(1.2 * GB), RAM, RAM)
BARE = replace(CARD, card=0, free=0)


def test_a_stage_fits_splits_or_is_too_large():
    fits = judge(Stage("T5", "file", 9 * GB, int(0.3 * GB)), CARD)
    assert fits.fits and not fits.outside and fits.text == "fits"
    split = judge(Stage("DiT", "file", 11 * GB, 3 * GB, int(1.5 * GB), "one by one"), CARD)
    assert split.fits and "partly: 1.8 GB" in split.text and split.peak <= CARD.free
    assert split.outside == pytest.approx(11 * GB - (11.4 - 1.5 - 0.4 - 0.3) * GB)
    tiled = judge(Stage("VAE", "file", GB, 15 * GB, 4 * GB, "in tiles", splits=False), CARD)
    assert tiled.fits and tiled.text == "fits in tiles (16.0 GB otherwise)" and tiled.peak == 5 * GB
    large = judge(Stage("VAE", "file", GB, 15 * GB, splits=False), CARD)
    assert not large.fits and large.text == "TOO LARGE by 5.0 GB"
    assert not judge(Stage("DiT", "file", GB, 12 * GB), CARD).fits


def test_main_memory_holds_all_weights_and_the_work_that_is_done_there():
    stages = [Stage("T5", "a", 9 * GB, GB, cached=9 * GB), Stage("DiT", "b", 11 * GB, 3 * GB)]
    assert main_memory(stages, CARD) == 21 * GB and main_memory(stages, BARE) == 24 * GB
    on_cpu = [replace(stages[0], on_cpu=True), stages[1]]
    assert main_memory(on_cpu, CARD) == 22 * GB and "main memory" in judge(on_cpu[0], CARD).text
    assert not judge(stages[1], replace(BARE, ram=10 * GB)).fits


def test_the_first_line_is_the_verdict():
    t5 = Stage("T5", "a", 5 * GB, GB)
    dit = Stage("DiT", "b", 11 * GB, 3 * GB)
    vae = Stage("VAE Decode", "c", GB, 15 * GB, 4 * GB, "in tiles", splits=False)
    whole = Stage("VAE Decode", "c", GB, 15 * GB, splits=False)
    card = replace(CARD, card=12 * 2**30)
    for stages, machine, line in (
        ([t5], card, "Fits a card of 12 GB."),
        ([t5, vae], card, "Fits a card of 12 GB: VAE Decode in tiles."),
        ([t5, dit, vae], card, "Too large for a card of 12 GB, but runs, slower: 3.3 GB of DiT stays in main "
         "memory; VAE Decode in tiles."),
        ([dit, whole], card, "Too large for a card of 12 GB: VAE Decode by 5.0 GB."),
        ([t5], replace(card, ram=5 * GB), "Too little main memory: 6.0 GB are needed, and there are 5.0."),
        ([t5], BARE, "Fits main memory."),
        ([dit], replace(BARE, ram=10 * GB), "Too large for main memory: DiT by 5.0 GB."),
    ):  # fmt: skip
        assert report("720 x 480", stages, machine, "Computed.").splitlines()[:2] == [line, "720 x 480"]


def test_the_report_is_columns_and_what_to_change():
    stages = [
        Stage("T5", "t5xxl.safetensors", 9 * GB, GB, cached=9 * GB),
        Stage("DiT", "dit", 14 * GB, 3 * GB, advice="fewer frames."),
    ]
    text = report("720 x 480", stages, replace(CARD, ram=8 * GB), "Computed.")
    lines = text.splitlines()[1:]
    assert lines[0] == "720 x 480" and "12.0 GB, of which ComfyUI can use 11.4" in lines[1]
    assert lines[3].split() == ["GB", "weights", "work", "peak"]
    assert lines[4].split() == ["T5", "9.0", "1.0", "10.0"] and len(lines[4]) == len(lines[3])
    assert "TOO LITTLE" in text and "- DiT: fewer frames." in text and "- T5" not in text
    assert "9.0 GB of file cache" in text and lines[-1] == "Computed."
