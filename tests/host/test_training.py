"""Training in the queue of a real ComfyUI: it learns, stops and goes on, and leaves sampling alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from launcher.client import Client, Prompt
from launcher.console import Failure
from launcher.server import Server
from mimir_core.tiny.parts import WEIGHTS
from mimir_core.train.cache import CacheConfig, cache, load_encoders

from .graph import Graph, Ref

WIDGETS: dict[str, Any] = {
    "train": "fuser", "steps": 30, "batch": 4, "learning_rate": 0.03, "seed": 0, "preset": "mimir",
    "llm_tokens": "answer", "micro_batch": 4, "learning_rate_dit": 1e-4, "lora_rank": 4, "optimiser": "muon",
    "warmup": 2, "dropout": 0.1, "doubt": 1.0, "precision": "auto", "checkpointing": False,
    "save_every": 1000,
}  # fmt: skip
LONGER = 50
SAMPLING: dict[str, Any] = {
    "seed": 3, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
}  # fmt: skip


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def training(name: str, **changed: Any) -> Prompt:
    widgets = {**WIDGETS, **changed}
    return {
        "tiny": node("MimirLoadTiny", fuser_preset="mimir"),
        "world": node("MimirWorldFeatures", clips=32, seed=0),
        "train": node("MimirTrainFuser", model=["tiny", 0], features=["world", 0], name=name, **widgets),
    }


def runs(server: Server) -> Path:
    return server.base / "output" / "mimir" / "training"


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def same(one: Path, other: Path) -> bool:
    a, b = load_file(str(one)), load_file(str(other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(host: Client, server: Server) -> Path:
    """The folder of a run that nobody interrupted."""
    host.run(training("whole"))
    return runs(server) / "whole_001"


def test_the_loss_falls_and_the_graph_has_it(host: Client, server: Server) -> None:
    plot = node("LossGraphNode", loss=["train", 2], filename_prefix="x")
    settings = {"steps": 90, "batch": 16, "micro_batch": 16, "learning_rate": 0.08}
    done = host.run({**training("falls", **settings), "plot": plot})
    assert any(file.filename.endswith(".png") for file in done.files())
    values = losses(runs(server) / "falls_001")
    assert len(values) == 90 and np.mean(values[-30:]) < 0.97 * np.mean(values[:30])


def test_a_finished_run_goes_on_when_steps_are_raised(host: Client, whole: Path) -> None:
    assert len(losses(whole)) == WIDGETS["steps"]
    assert host.run(training("whole", steps=LONGER)).text("train")[0].startswith(f"{LONGER} steps, loss ")
    assert not (whole.parent / "whole_002").exists() and len(losses(whole)) == LONGER


def test_an_interrupt_keeps_a_checkpoint_and_the_same_settings_go_on(host: Client, server: Server) -> None:
    host.run(training("unbroken"))

    def stop(name: str, part: float) -> None:
        if name == "train" and part >= 0.25:
            host.interrupt()

    with pytest.raises(Failure, match="The run was interrupted"):
        host.run(training("broken"), progress=stop)
    broken = runs(server) / "broken_001"
    (checkpoint,) = (broken / "checkpoints").iterdir()
    done = json.loads((checkpoint / "state.json").read_text())["step"]
    assert 5 <= done < WIDGETS["steps"] and len(losses(broken)) == done
    report = host.run(training("broken")).text("train")[0]
    assert (
        report.startswith(f"{WIDGETS['steps']} steps, loss ") and "output/mimir/training/broken_001" in report
    )
    unbroken = runs(server) / "unbroken_001"
    assert losses(broken) == losses(unbroken)
    assert same(broken / "fuser.safetensors", unbroken / "fuser.safetensors")


def video(
    host: Client, fuser: Ref | None = None, extra: Prompt | None = None, fresh: bool = False
) -> torch.Tensor:
    """Its latents; with `fresh` they must not be what the host remembers."""
    graph = Graph(host)
    graph.prompt.update(extra or {})
    tiny = graph.add("MimirLoadTiny", fuser_preset="mimir")[0]
    conditions = []
    for text in ("a red circle moves left", ""):
        read = {
            "instructions": "Count.\nColours.\nPlaces.\nMotion.",
            "answer_length": 8,
            "seed": 0,
            "layer": -1,
        }
        t5 = graph.add("MimirT5Encode", clip=[tiny, 1], text=text)
        tokens = graph.add("MimirPhiEncode", clip=[tiny, 2], text=text, temperature=0.0, **read)
        used = {"preset": "as trained", "strength": 1.0, "start": 0.0, "end": 1.0}
        conditions.append(
            graph.add("MimirTokenFuser", conditioning=t5, tokens=tokens, fuser=fuser or [tiny, 3], **used)
        )
    latent = graph.add("MimirEmptyLatent", width=64, height=64, frames=9, batch=1)
    ends = {"positive": conditions[0], "negative": conditions[1], "latent_image": latent}
    sampled = graph.add("KSampler", model=[tiny, 0], **ends, **SAMPLING)
    found = graph.run(video=sampled)["video"]
    assert not fresh or sampled[0] in graph.seconds
    return found


@pytest.mark.parametrize("mode", ["fuser+lora", "fuser+dit", "dit"])
def test_the_next_video_is_what_it_was(host: Client, server: Server, mode: str) -> None:
    before = video(host)
    name = mode.replace("+", "_")
    report = host.run(training(name, train=mode, steps=3)).text("train")[0]
    expected = {
        "fuser+lora": "lora.safetensors",
        "fuser+dit": "transformer.safetensors",
        "dit": "transformer",
    }
    assert expected[mode] in report
    after = video(host, fresh=True)
    assert torch.equal(before, after)


def test_the_wire_and_the_file_are_the_same_fuser(host: Client, server: Server, whole: Path) -> None:
    save = node("MimirSaveFuser", fuser=["train", 0], name="mine/first", folder="models/mimir")
    done = host.run({**training("whole", steps=LONGER), "save": save})
    assert "Load Token Fuser offers it" in done.text("save")[0]
    file = server.base / "models" / "mimir" / "mine" / "first.safetensors"
    assert same(file, whole / "fuser.safetensors")
    with safe_open(str(file), "pt") as opened:
        trained_on = json.loads(opened.metadata()["training"])
    assert trained_on["base"]["file"] == "transformer.safetensors" and trained_on["t5"]["file"] == "t5"
    wire = video(host, ["train", 0], training("whole", steps=LONGER))
    loaded = video(host, ["load", 0], {"load": node("MimirLoadFuser", fuser_name="mine/first.safetensors")})
    assert torch.equal(wire, loaded)
    assert not torch.equal(wire, video(host))


def test_other_settings_begin_another_run(host: Client, server: Server) -> None:
    host.run(training("twice", steps=2))
    host.run(training("twice", steps=2, seed=1))
    host.run(training("twice", steps=2))
    assert sorted(path.name for path in runs(server).glob("twice*")) == ["twice_001", "twice_002"]


@pytest.mark.parametrize("name", ["../out", "/etc/x", "a/../../b", "..\\b", "C:\\b", "con", ""])
def test_names_never_lead_out(host: Client, server: Server, name: str) -> None:
    with pytest.raises(Failure, match="name"):
        host.run(training(name, steps=1))
    assert not [path for path in server.base.rglob("*_001") if runs(server) not in path.parents]


def test_what_cannot_be_trained_is_said_in_one_sentence(host: Client) -> None:
    prompt = training("none")
    prompt["train"]["inputs"]["features"] = "nothing"
    with pytest.raises(Failure, match="There are no features called 'nothing'"):
        host.run(prompt)
    with pytest.raises(Failure, match="batch is 4, expected a multiple of micro_batch 3"):
        host.run(training("none", micro_batch=3))


def test_videos_to_features(
    host: Client, server: Server, make_video: Callable[..., Path], tmp_path: Path
) -> None:
    """Prepare Dataset and Cache Features give what the two commands give."""
    folder = server.base / "input" / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    for index, colour in enumerate(((230, 20, 20), (30, 60, 235))):
        frames = np.full((9, 64, 64, 3), 150, np.uint8)
        for step in range(9):
            frames[step, 24:40, 4 + 4 * step : 20 + 4 * step] = colour
        make_video(folder / f"{index}.mp4", frames, fps=8)
    (folder / "0.txt").write_text("a red square moves right")
    limits = {"frames": 9, "width": 64, "height": 64, "fps": 8.0, "shots": "none", "min_brightness": 0.1,
              "min_aesthetic": 0.0, "max_watermark": 1.0}  # fmt: skip
    reading = {"answers": 2, "answer_length": 8, "temperature": 1.5, "instructions": "One.\nTwo.", "seed": 0,
               "layer": -1}  # fmt: skip
    done = host.run({
        "tiny": node("MimirLoadTiny", fuser_preset="mimir"),
        "prepare": node("MimirPrepareDataset", videos="clips", name="d", **limits),
        "cache": node("MimirCacheFeatures", clip_t5=["tiny", 1], clip_phi=["tiny", 2], vae=["tiny", 4],
                      dataset=["prepare", 0], name="f", **reading),
    })  # fmt: skip
    assert done.text("prepare")[0].startswith("1 clips kept") and "caption" in done.text("prepare")[0]
    assert any(file.filename == "kept.jpg" for file in done.files())
    made = server.base / "output" / "mimir"
    config = CacheConfig(
        clips=str(made / "datasets" / "d"), videos=str(folder), out=str(tmp_path / "f"),
        t5=str(WEIGHTS / "t5"), phi=str(WEIGHTS / "phi"), vae=str(WEIGHTS / "vae.safetensors"),
        text_length=64, fps=8.0, answers=2, answer_length=8, temperature=1.5, instructions=("One.", "Two."),
    )  # fmt: skip
    cache(config, load_encoders(config, "cpu", torch.float32))
    for file in ("00000.safetensors", "null.safetensors"):
        ours, theirs = load_file(str(made / "features" / "f" / file)), load_file(str(tmp_path / "f" / file))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.allclose(ours[name].float(), theirs[name].float(), rtol=1e-2, atol=1e-2), (
                file,
                name,
            )
    assert (made / "features" / "f" / "plan.json").read_bytes() == (tmp_path / "f" / "plan.json").read_bytes()
