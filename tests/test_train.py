"""The trainer: resuming equals not stopping, dividing a batch equals not dividing it, and gradients are the
theory's. Networks and features are tiny and random.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mimir_core import weights
from mimir_core.config import DiffusionConfig, DiTConfig
from mimir_core.dit import CogVideoXTransformer
from mimir_core.fuser import TokenFuser
from mimir_core.headers import fingerprint
from mimir_core.train.config import TrainConfig
from mimir_core.train.features import FeatureSet, Index, complete, write_index, write_shard
from mimir_core.train.loop import Progress, Stopped, train
from mimir_core.train.optimiser import rate_share
from mimir_core.train.trainee import Batch, Drawing, Trainee, build

ROOT = Path(__file__).parents[1]
DIT = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=16,
    time_embed_dim=16, text_embed_dim=12, max_text_seq_length=6, sample_width=4, sample_height=4,
    sample_frames=9,
)  # fmt: skip
TEXT, LLM, LENGTH, INSTRUCTIONS = 12, 10, 6, 4


def shard(clips: int, size: tuple[int, int, int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    captions, answers, query, answer = 2, 3, 5, 4
    return {
        "latents": rand(clips, 16, *size),
        "t5": rand(clips, captions, LENGTH, TEXT),
        "query": rand(clips, captions, query, LLM),
        "query_length": torch.randint(1, query + 1, (clips, captions), generator=generator),
        "answer": rand(clips, captions, answers, answer, LLM),
        "answer_length": torch.randint(0, answer + 1, (clips, captions, answers), generator=generator),
        "instruction": rand(clips, captions, INSTRUCTIONS, LLM),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A tiny base model and features of two sizes, and a run over them."""
    folder = tmp_path_factory.mktemp("train")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    dit = CogVideoXTransformer(DIT)
    for parameter in dit.parameters():  # large enough that every layer matters
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    weights.save_transformer(folder / "dit.safetensors", DIT, DiffusionConfig(), dit.state_dict())
    shards = [
        write_shard(folder / "features", "0000.safetensors", shard(5, (3, 4, 4), generator)),
        write_shard(folder / "features", "0001.safetensors", shard(3, (1, 4, 6), generator)),
    ]
    null = shard(1, (3, 4, 4), generator)
    null.pop("latents")
    write_shard(folder / "features", "null.safetensors", null)
    write_index(folder / "features", Index(tuple(shards), ("a", "b", "c", "d"), -1))
    return TrainConfig(
        features=str(folder / "features"), base=str(folder / "dit.safetensors"), run=str(folder / "run"),
        steps=6, batch=4, micro_batch=2, warmup=2, rate_new=1e-2, rate_old=1e-3, ema=0.9, log_every=1,
        save_every=2,
    )  # fmt: skip


def result(run: Path) -> dict[str, torch.Tensor]:
    """Everything a run has learnt."""
    files = [run / f"{name}.safetensors" for name in ("fuser", "lora", "transformer")]
    return {f"{f.stem}/{name}": t for f in files if f.exists() for name, t in load_file(f).items()}


def losses(run: Path) -> list[tuple[int, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and bool(a) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
@pytest.mark.parametrize("mode", ["fuser", "fuser+lora", "fuser+dit", "dit"])
def test_resuming_equals_not_stopping(made, tmp_path, mode, optimiser):
    config = replace(made, train=mode, optimiser=optimiser, lora_rank=2, run=str(tmp_path / "whole"))
    whole = train(config, cpu=True)

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise Stopped

    parts = replace(config, run=str(tmp_path / "parts"))
    train(parts, report=stop, cpu=True)
    assert losses(tmp_path / "parts")[-1][0] == 3
    assert not same(result(whole), result(tmp_path / "parts"))
    train(parts, cpu=True)
    assert same(result(whole), result(tmp_path / "parts"))
    assert losses(whole) == losses(tmp_path / "parts")


def test_killed_at_any_point_and_resumed(made, tmp_path):
    """A kill between checkpoints loses the steps since, not the numbers: they are repeated exactly."""
    config = replace(made, steps=5, save_every=2, run=str(tmp_path / "killed"))

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, report=kill, cpu=True)
    train(config, cpu=True)
    whole = train(replace(config, run=str(tmp_path / "whole")), cpu=True)
    assert same(result(whole), result(tmp_path / "killed")) and losses(whole) == losses(tmp_path / "killed")


def test_a_half_written_checkpoint_is_ignored(made, tmp_path):
    config = replace(made, run=str(tmp_path / "run"))
    whole = result(train(config, cpu=True))
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    (newest / "state.json").unlink()
    assert same(result(train(config, cpu=True)), whole)


def test_accumulation_does_not_change_the_numbers(made, tmp_path):
    one = train(replace(made, micro_batch=4, ema=0.0, run=str(tmp_path / "one")), cpu=True)
    four = train(replace(made, micro_batch=1, ema=0.0, run=str(tmp_path / "four")), cpu=True)
    for name, tensor in result(one).items():
        torch.testing.assert_close(result(four)[name], tensor, rtol=1e-4, atol=1e-5)


def test_two_processes_equal_one(made, tmp_path):
    """DDP over gloo, the same global batch."""
    config = replace(made, train="fuser+dit", micro_batch=2, ema=0.5, run=str(tmp_path / "two"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611"]
    command += ["-m", "mimir_core.train", "--config", str(tmp_path / "config.json"), "--cpu"]
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one = train(replace(config, run=str(tmp_path / "one")), cpu=True)
    two = result(tmp_path / "two")
    for name, tensor in result(one).items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)


def trained(model: Trainee) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_zero_convolutions_move_first_and_the_scale_after(made):
    """Z_beta = 0: at step one only it, Z_theta and the stabilizer get a gradient; s gets one from then on."""
    model = build(made)
    assert model.fuser is not None
    batch = Drawing(FeatureSet(made.features), replace(made, dropout=0.0, doubt=0.0), model.diffusion).batch(
        0, range(4)
    )
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    model(batch).backward()
    moved = {name for name, p in model.fuser.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"encoder_conv.weight", "llm_conv.weight", "stabilizer.weight", "instruction_conv.weight"} <= moved
    branch = torch.autograd.grad(
        model.fuser._branch(batch.llm, batch.mask, LENGTH).sum(), model.fuser.norm.weight
    )
    assert not branch[0].any()  # through Z_beta = 0 the scale learns nothing yet
    optimiser.step()
    branch = torch.autograd.grad(
        model.fuser._branch(batch.llm, batch.mask, LENGTH).sum(), model.fuser.norm.weight
    )
    assert branch[0].any()
    assert all(p.grad is None for p in model.dit.parameters())


def _scale_gradient(fuser: TokenFuser, batch: Batch) -> torch.Tensor:
    """Of s, through e_beta alone."""
    branch = fuser._branch(batch.llm, batch.mask, LENGTH)
    return torch.autograd.grad(branch.sum(), fuser.norm.weight)[0]


@pytest.mark.parametrize("mode", ["fuser", "fuser+lora", "fuser+dit", "dit"])
def test_only_what_is_said_to_train_trains(made, tmp_path, mode):
    config = replace(made, train=mode, lora_rank=2, ema=0.0, run=str(tmp_path / "run"))
    before = trained(build(config))
    train(config, cpu=True)
    found = result(tmp_path / "run")
    parts = {name.split("/")[0] for name in found}
    assert parts == {
        "fuser": {"fuser"}, "fuser+lora": {"fuser", "lora"}, "fuser+dit": {"fuser", "transformer"},
        "dit": {"transformer"},
    }[mode]  # fmt: skip
    base = load_file(made.base)
    for name, tensor in found.items():
        part, key = name.split("/", 1)
        start = base.get(key) if part == "transformer" else before.get(f"fuser.{key}")
        assert torch.isfinite(tensor).all()
        if start is not None and key not in ("norm.weight",):
            assert not torch.equal(start, tensor) or not tensor.any(), name
    assert same(base, load_file(made.base))


def test_overfitting_four_clips(made, tmp_path):
    """The DiT alone on four clips drives its loss below 5 % of the start."""
    dit = CogVideoXTransformer(replace(DIT, num_attention_heads=4, attention_head_dim=32))
    torch.manual_seed(0)
    dit.init_weights()
    weights.save_transformer(tmp_path / "dit.safetensors", dit.config, DiffusionConfig(), dit.state_dict())
    few = shard(4, (1, 4, 4), torch.Generator().manual_seed(1))
    piece = write_shard(tmp_path / "features", "0.safetensors", few)
    for name in ("null.safetensors", "index.json"):
        shutil.copy(Path(made.features) / name, tmp_path / "features" / name)
    write_index(tmp_path / "features", Index((piece,), ("a", "b", "c", "d"), -1))
    config = replace(
        made, train="dit", optimiser="muon", rate_new=0.03, rate_vectors=5e-3, steps=300, dropout=0.0,
        warmup=10, ema=0.0, save_every=1000, batch=16, micro_batch=16, final=0.02,
        features=str(tmp_path / "features"), base=str(tmp_path / "dit.safetensors"),
        run=str(tmp_path / "run"),
    )  # fmt: skip
    train(config, cpu=True)
    found = [loss for _, loss in losses(tmp_path / "run")]
    start, end = found[0], sum(found[-20:]) / 20
    assert end < 0.05 * start, (start, end)


def test_every_clip_comes_once_in_an_epoch(made):
    features = FeatureSet(made.features)
    steps = 2 + 1  # five clips of one size and three of the other, in batches of four
    for epoch in range(3):
        batches = [features.batch(0, epoch * steps + i, 4) for i in range(steps)]
        assert {clip for batch in batches for clip in batch} == set(features.clips)
        assert all(len({features.index.shards[c.shard].size for c in batch}) == 1 for batch in batches)


def test_rates():
    config = TrainConfig("f", "b", "r", steps=100, warmup=10, decay_from=0.5, final=0.1)
    shares = [rate_share(step, config) for step in range(100)]
    assert shares[0] == 0.1 and shares[9] == 1.0 and shares[50] == 1.0
    assert shares[-1] == pytest.approx(0.1, abs=2e-3) and shares == shares[:10] + sorted(shares[10:])[::-1]


def test_wrong_settings_are_refused(made, tmp_path):
    with pytest.raises(ValueError, match="unknown settings: rate"):
        TrainConfig.from_dict({**made.to_dict(), "rate": 1})
    with pytest.raises(ValueError, match="multiple of micro_batch 3"):
        replace(made, micro_batch=3)
    with pytest.raises(ValueError, match="holds no cached features"):
        train(replace(made, features=str(tmp_path), run=str(tmp_path / "x")), cpu=True)
    config = replace(made, run=str(tmp_path / "run"))
    train(config, cpu=True)
    with pytest.raises(ValueError, match=r"other settings: seed \(0, now 1\)"):
        train(replace(config, seed=1), cpu=True)
    train(replace(config, steps=8), cpu=True)  # longer is allowed


def header(file: Path) -> dict:
    with safe_open(str(file), framework="pt") as opened:
        return json.loads(opened.metadata()["training"])


def test_a_fuser_trained_with_its_dit_belongs_to_the_trained_dit(made, tmp_path):
    """With the DiT frozen it belongs to the one it started from."""
    run = train(replace(made, train="fuser+dit", run=str(tmp_path / "both")), cpu=True)
    start = fingerprint(Path(made.base))
    run = train(replace(made, train="fuser+dit", run=str(tmp_path / "both")), cpu=True)
    trained = run / "transformer.safetensors"
    assert header(trained)["base"]["fingerprint"] == start
    assert header(run / "fuser.safetensors")["base"]["fingerprint"] == fingerprint(trained) != start
    run = train(replace(made, run=str(tmp_path / "fuser")), cpu=True)
    assert header(run / "fuser.safetensors")["base"]["fingerprint"] == start


def test_the_header_says_how_many_steps_there_were(made, tmp_path):
    """Not how many were asked for: after a stop, and when an older run has more."""
    config = replace(made, run=str(tmp_path / "run"))

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise Stopped

    for asked, report, expected in ((6, stop, 2), (6, lambda _: None, 6), (4, lambda _: None, 6)):
        run = train(replace(config, steps=asked), report, cpu=True)
        assert header(run / "fuser.safetensors")["steps"] == expected


def test_fp16_on_a_cpu_is_refused_in_words(made, tmp_path):
    with pytest.raises(ValueError, match="needs a graphics card"):
        train(replace(made, precision="fp16", run=str(tmp_path / "run")), cpu=True)


def test_a_damaged_shard_is_named(made, tmp_path):
    features = tmp_path / "features"
    shutil.copytree(made.features, features)
    (features / "0001.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="0001.safetensors is damaged"):
        train(replace(made, features=str(features), run=str(tmp_path / "run")), cpu=True)
    assert not complete(features / "0001.safetensors", 3)
    assert complete(features / "0000.safetensors", 5) and not complete(features / "0000.safetensors", 4)
