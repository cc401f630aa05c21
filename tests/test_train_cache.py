"""From videos to a trained fuser: clips, features, a run. The models are Mimir Tiny's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mimir_core.data.config import DataConfig
from mimir_core.data.prepare import prepare
from mimir_core.tiny.parts import WEIGHTS
from mimir_core.train import cache as caching
from mimir_core.train.cache import CacheConfig, cache, load_encoders, main
from mimir_core.train.config import TrainConfig
from mimir_core.train.features import FeatureSet
from mimir_core.train.loop import train
from mimir_core.weights import read_fuser

SIZES = {
    "basic": {"min_width": 64, "min_height": 64, "min_aspect": 0.5, "min_seconds": 1.0, "max_seconds": 1.125},
    "aesthetic": {"limit": 0, "plugin": "none"},
    "watermark": {"limit": 1, "plugin": "none"},
    "output": {"buckets": [[9, 64, 64]]},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., Path]) -> CacheConfig:
    """Three captioned videos of moving squares, and one without a caption."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "videos").mkdir()
    for index, colour in enumerate(((230, 20, 20), (20, 180, 30), (30, 60, 235), (230, 220, 10))):
        frames = np.full((9, 64, 64, 3), 150, np.uint8)
        for step in range(9):
            frames[step, 24:40, 4 + 4 * step : 20 + 4 * step] = colour
        make_video(folder / "videos" / f"{index}.mp4", frames, fps=8)
    for index, word in enumerate(("red", "green", "blue")):
        (folder / "videos" / f"{index}.txt").write_text(f"a {word} square moves right")
    prepare(folder / "videos", folder / "clips", DataConfig.from_dict(SIZES))
    return CacheConfig(
        clips=str(folder / "clips"), videos=str(folder / "videos"), out=str(folder / "features"),
        t5=str(WEIGHTS / "t5"), phi=str(WEIGHTS / "phi"), vae=str(WEIGHTS / "vae.safetensors"),
        text_length=64, answers=2, answer_length=12, temperature=1.5, shard=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoders(config: CacheConfig) -> caching.Encoders:
    return load_encoders(config, "cpu", torch.float32)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "plan.json"}


def test_videos_to_a_fuser(config, encoders, tmp_path):
    assert cache(config, encoders) == 3  # the one without a caption was not kept
    features = FeatureSet(config.out)
    assert features.index.shards[0].size == (16, 3, 8, 8) and features.answers == 2
    text = features.text(features.clips[0], 0, 0)
    expected = encoders.t5.encode("a red square moves right").hidden[0]
    assert torch.allclose(text.t5, expected, rtol=1e-2, atol=1e-2)
    assert text.instruction.shape == (4, 128) and 0 < len(text.answer) <= 12
    run = train(
        TrainConfig(
            features=config.out, base=str(WEIGHTS / "transformer.safetensors"), run=str(tmp_path / "run"),
            steps=2, batch=3, micro_batch=3, warmup=0, llm_tokens="answer",
        ),
        cpu=True,
    )  # fmt: skip
    fuser = read_fuser(run / "fuser.safetensors")
    trained_on = fuser.header["training"]
    assert trained_on["t5"]["fingerprint"] == features.index.origins["t5"]["fingerprint"]
    assert trained_on["base"]["file"] == "transformer.safetensors" and fuser.config.llm_tokens == "answer"


def test_stopping_and_going_on_gives_the_same_bits(config, encoders, tmp_path):
    whole = replace(config, out=str(tmp_path / "whole"))
    cache(whole, encoders)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    parts = replace(config, out=str(tmp_path / "parts"))
    with pytest.raises(KeyboardInterrupt):
        cache(parts, encoders, stop)
    with pytest.raises(ValueError, match="holds no cached features"):
        FeatureSet(parts.out)
    cache(parts, encoders)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_damaged_shard_is_made_anew(config, encoders, tmp_path):
    made = replace(config, out=str(tmp_path / "made"))
    cache(made, encoders)
    whole = content(tmp_path / "made")
    for damage in (b"junk", whole["00000.safetensors"][:-100]):
        (tmp_path / "made" / "00000.safetensors").write_bytes(damage)
        cache(made, encoders)
        assert content(tmp_path / "made") == whole


def test_sampled_answers_scatter_and_prompts_do_not(config, encoders, tmp_path):
    hot = replace(config, out=str(tmp_path / "hot"), answers=4, temperature=2.0)
    cache(hot, encoders)
    features = FeatureSet(hot.out)
    texts = [features.text(features.clips[0], 0, answer) for answer in range(4)]
    assert all(torch.equal(text.query, texts[0].query) for text in texts)
    assert len({text.answer.numpy().tobytes() for text in texts}) > 1


def test_other_settings_or_clips_are_refused(config, encoders, tmp_path):
    made = replace(config, out=str(tmp_path / "made"))
    cache(made, encoders)
    with pytest.raises(ValueError, match="made with other layer, seed"):
        cache(replace(made, layer=-2, seed=1), encoders)
    with pytest.raises(ValueError, match="holds no clip that was kept and has a caption"):
        (tmp_path / "none").mkdir()
        (tmp_path / "none" / "clips.jsonl").write_text("")
        cache(replace(made, clips=str(tmp_path / "none")), encoders)


def test_the_command(config, tmp_path, capsys):
    settings = {**vars(config), "out": str(tmp_path / "out"), "answers": 1}
    (tmp_path / "cache.json").write_text(json.dumps(settings))
    assert main(["--config", str(tmp_path / "cache.json"), "--device", "cpu"]) == 0
    assert "3 clips in" in capsys.readouterr().out
    (tmp_path / "cache.json").write_text("{}")
    assert main(["--config", str(tmp_path / "cache.json"), "--device", "cpu"]) == 1
    assert "missing" in capsys.readouterr().err
