"""Plan Memory on the real host: its figures against measurements, its files, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import comfy.model_management as management
import pytest
import torch
from mimir_pack.mimir_core import memory, weights
from mimir_pack.mimir_core.config import DIT_PRESETS, PHI_PRESETS, FuserConfig
from mimir_pack.mimir_core.dit import CogVideoXTransformer
from mimir_pack.mimir_core.fuser import TokenFuser
from mimir_pack.mimir_core.phi import Phi3ForCausalLM
from mimir_pack.mimir_core.vae import build_vae
from mimir_pack.nodes.host import model as host_model
from mimir_pack.nodes.host import plan as host_plan
from mimir_pack.nodes.plan import PARTS, MimirPlan
from mimir_pack.tests.host.inprocess import references

DEFAULTS: dict[str, Any] = {
    "dit_dtype": "default",
    "phi_dtype": "default",
    "phi_device": "default",
    "width": 720,
    "height": 480,
    "frames": 49,
    "batch": 1,
    "cfg": True,
    "answer_length": 64,
    "tiling": "auto",
    **{name: default for name, (default, _) in PARTS.items()},
}
SMALL = {"width": 64, "height": 64, "frames": 9, **dict.fromkeys(PARTS, host_plan.BUILT_IN)}


def figures(text: str) -> dict[str, list[float]]:
    """{stage: [weights, work, peak]} in GB from the plan's columns."""
    rows = (line for line in text.splitlines() if line[:1].isalnum() and line[-1:].isdigit())
    found = {row[:12].strip(): row[12:].split() for row in rows}
    return {name: [float(x) for x in row] for name, row in found.items() if name in STAGES}


STAGES = ("T5", "Phi-3.5", "Token Fuser", "DiT", "VAE Decode")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell a process its peak without extras")
def test_planned_is_within_15_per_cent_of_measured():
    """Each stage in a process of its own host, on the CPU: loading its file, and using it."""
    names = ["t5", "phi", "dit", "vae"]
    runs = [names] if sys.platform == "linux" else [[name] for name in names]
    lines: list[str] = []
    for run in runs:
        out = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("peak.py")), *run],
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")},
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr[-3000:]
        lines += [line for line in out.stdout.splitlines() if line.startswith("{")]
    found = {row["stage"]: row for row in map(json.loads, lines)}
    assert set(found) == {*names, *(f"load {name}" for name in names)}
    off = {name: row["planned"] / row["measured"] - 1 for name, row in found.items()}
    assert all(abs(value) < 0.15 for value in off.values()), off


def test_published_parts_are_counted_right():
    """The sizes that can be planned with before anything is downloaded."""
    counts = {
        "dit": [CogVideoXTransformer(DIT_PRESETS[name], device="meta") for name in ("5b", "1.5-5b", "2b")],
        "phi": [Phi3ForCausalLM(PHI_PRESETS["phi-3.5-mini"], device="meta")],
        "fuser": [TokenFuser(FuserConfig(), device="meta")],
        "vae": [build_vae({}, device="meta")],
    }
    for kind, networks in counts.items():
        found = [source.parameters for source in host_plan.KINDS[kind].published.values()]
        assert found == [sum(p.numel() for p in network.parameters()) for network in networks]
    blocks = {"dit": "transformer_blocks.", "phi": "model.layers."}
    for kind, prefix in blocks.items():
        for source, network in zip(host_plan.KINDS[kind].published.values(), counts[kind], strict=True):
            sizes = (
                (2 - (name.startswith(prefix) and tensor.ndim == 2)) * tensor.numel()
                for name, tensor in network.state_dict().items()
            )
            assert source.sizes["fp8_e4m3fn"] == sum(sizes)


def test_what_common_cards_will_do(run_node):
    """5B in 16 bit: a 24 GB card takes everything; 12 GB leaves some of the DiT outside; 8 GB tiles."""
    texts = {card: run_node(MimirPlan, **DEFAULTS, card=card)[0] for card in ("8", "12", "16", "24")}
    assert "partly" not in texts["24"] and "TOO LARGE" not in texts["24"] and "in tiles" not in texts["16"]
    assert "partly" in texts["12"].split("DiT")[1].split("VAE")[0]
    assert "fits in tiles" in texts["8"] and "What helps" in texts["8"] and "dtype fp8" in texts["8"]
    for text in texts.values():
        rows = figures(text)
        assert rows["DiT"][0] == 11.1 and rows["T5"][0] == 9.5 and rows["Phi-3.5"][0] == 7.6
        assert all(abs(w + a - peak) < 0.11 for w, a, peak in rows.values())


def test_size_batch_guidance_and_dtype_change_the_figures(run_node):
    def dit(**changes: Any) -> list[float]:
        return figures(run_node(MimirPlan, **{**DEFAULTS, **changes}, card="24")[0])["DiT"]

    weights_, work, _ = dit()
    assert dit(cfg=False)[1] == pytest.approx(work / 2, abs=0.06)
    assert dit(batch=2)[1] == pytest.approx(2 * work, abs=0.06)
    assert dit(frames=25)[1] < 0.6 * work
    assert dit(dit_dtype="fp8_e4m3fn")[0] == pytest.approx(weights_ / 2, abs=0.06)
    text = run_node(MimirPlan, **{**DEFAULTS, "phi_device": "cpu"}, card="8")[0]
    assert "Phi-3.5-mini: fits in main memory" in text or "of main memory" in text.split("DiT")[0]
    vae = figures(run_node(MimirPlan, **{**DEFAULTS, "tiling": "on"}, card="24")[0])["VAE Decode"]
    assert vae[1] < 3.5


def test_files_are_read_from_their_headers_only(run_node, tmp_path, monkeypatch):
    """A real file in a model folder; nothing but headers is read, and the host's choice of dtype is used."""
    import folder_paths

    references.transformer().save_pretrained(tmp_path / "mine")
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda key: [str(tmp_path)])
    monkeypatch.setattr(weights.Checkpoint, "load", None)
    names = dict.fromkeys(PARTS, "none") | {"dit": "mine"}
    (text,) = run_node(MimirPlan, **{**DEFAULTS, **SMALL, **names}, card="none")
    assert "mine, float32" in text and "T5" not in text and "VAE" not in text
    with pytest.raises(ValueError, match="mine is a CogVideoX transformer, but a CogVideoX VAE is needed"):
        run_node(MimirPlan, **{**DEFAULTS, **SMALL, "dit": "none", "vae": "mine"}, card="none")
    with pytest.raises(ValueError, match="Choose at least one"):
        run_node(MimirPlan, **{**DEFAULTS, **dict.fromkeys(PARTS, "none")}, card="none")


def test_the_built_in_model_is_planned_as_it_loads(run_node):
    (text,) = run_node(MimirPlan, **{**DEFAULTS, **SMALL}, card="automatic")
    assert set(figures(text)) == set(STAGES) and "No card" in text and "TOO" not in text
    source = host_plan.KINDS["dit"].source(host_plan.BUILT_IN)
    assert source is not None
    loaded = host_model.load_dit(host_plan.TINY / "transformer.safetensors")
    settings = host_plan.Settings(64, 64, 9, 1, True, 0, "auto", "default", "default")
    (stage,) = host_plan.stages({"dit": source}, settings, host_plan.place_of("none"))
    assert stage.weights == pytest.approx(
        loaded.model_size(), rel=0.01
    )  # the schedule's table is not a weight
    assert loaded.model.memory_usage_factor == memory.host_factor(source.config)


def test_a_card_in_this_computer_is_asked(monkeypatch):
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(management, "get_total_memory", lambda *_: 16 * memory.GB)
    monkeypatch.setattr(management, "get_free_memory", lambda *_: 13 * memory.GB)
    machine = host_plan.place_of(host_plan.AUTOMATIC).machine
    assert (machine.card, machine.free) == (16 * memory.GB, 13 * memory.GB)
    assert machine.reserve == int(management.extra_reserved_memory())
    monkeypatch.setattr(management, "vae_device", lambda: torch.device("cpu"))  # --cpu-vae
    source = host_plan.KINDS["vae"].published["CogVideoX VAE (not on disk)"]
    settings = host_plan.Settings(720, 480, 49, 1, True, 0, "auto", "default", "default")
    (stage,) = host_plan.stages({"vae": source}, settings, host_plan.place_of(host_plan.AUTOMATIC))
    assert stage.on_cpu and stage.weights == 4 * source.parameters
    assert host_plan.place_of("none").cpu and host_plan.place_of("8").machine.card == 8 * 2**30


def test_a_model_without_its_tokenizer_is_refused_as_its_loader_does(run_node, tmp_path, monkeypatch):
    import folder_paths

    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((host_plan.TINY / "phi" / name).read_bytes())
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda key: [str(tmp_path)])
    names = dict.fromkeys(PARTS, "none") | {"phi": "bare"}
    with pytest.raises(ValueError, match="^bare: tokenizer missing: put tokenizer.json"):
        run_node(MimirPlan, **{**DEFAULTS, **SMALL, **names}, card="none")
