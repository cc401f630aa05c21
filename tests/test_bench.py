"""The benchmark: its arithmetic, its turns (on a clock of our own), its report, every kind of row once."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mimir_core.bench import limits, measure
from mimir_core.bench.__main__ import main
from mimir_core.bench.flops import step_flops
from mimir_core.bench.prefill import Reader
from mimir_core.bench.report import Report, Row, markdown, summary
from mimir_core.bench.rivals import Missing, Model, inputs, models, random_state
from mimir_core.bench.shapes import PREFILLS, REAL, SMALL, TINY, Shape
from mimir_core.bench.suite import DIFFUSERS, OURS, Entry, Settings, contest, run
from mimir_core.dit import CogVideoXTransformer

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
pytest.importorskip("diffusers")


# --- arithmetic


def test_the_arithmetic_of_5b_is_the_published_one():
    flops = step_flops(REAL[0].config, REAL[0].latents, batch=1)
    assert REAL[0].name == "5B 49x480x720"
    assert round((flops.linear + flops.attention) / 1e12, 1) == 332.2
    assert round(flops.linear * 2 / 1e12, 1) == 338.2 and round(flops.attention * 2 / 1e12, 1) == 326.2
    assert flops.rest < 1e-4 * flops.total


@pytest.mark.parametrize("shape", [*TINY, *SMALL, *REAL[:2]], ids=lambda shape: shape.name)
def test_the_arithmetic_is_what_torch_counts(shape: Shape):
    with torch.device("meta"):
        model = CogVideoXTransformer(shape.config)
        latents = torch.empty(shape.batch, 16, *shape.latents)
        text = torch.empty(shape.batch, shape.text, shape.config.text_embed_dim)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(latents, torch.zeros(shape.batch), text)
    assert step_flops(shape.config, shape.latents, shape.text, shape.batch).total == counter.get_total_flops()


# --- turns


class Clock:
    """A clock that only moves when a contestant works."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def worker(self, name: str, *seconds: float) -> Any:
        """A run that takes these times in turn, over and over."""
        calls = iter(range(10**6))

        def work() -> Tensor:
            self.order.append(name)
            self.now += seconds[next(calls) % len(seconds)]
            return torch.ones(2)

        return work


def test_contestants_take_turns_in_changing_order():
    clock = Clock()
    runs = [clock.worker(name, 1.0) for name in "ABC"]
    times = measure.alternate(runs, 5, 1, clock=clock)
    rounds = ["".join(clock.order[i : i + 3]) for i in range(0, 18, 3)]
    assert rounds == ["ABC", "CBA", "BCA", "ACB", "CAB", "BAC"]
    assert times == [[1.0] * 5] * 3
    assert {tuple(measure.order(2, number)) for number in range(2)} == {(0, 1), (1, 0)}


def test_warm_up_is_dropped_and_ratios_pair_the_rounds():
    clock = Clock()
    slow = [9.0, 1.0, 2.0, 4.0, 8.0]  # the first round is warm-up; then the machine slows down
    times = measure.alternate(
        [clock.worker("A", *slow), clock.worker("B", *(2 * s for s in slow))], 4, clock=clock
    )
    assert times == [slow[1:], [2 * s for s in slow[1:]]]
    assert measure.ratios(times[1], times[0]) == measure.Spread(2.0, 2.0, 2.0, 4)
    assert measure.Spread.of(times[0]) == measure.Spread(3.0, 1.75, 5.0, 4)
    assert measure.Spread.of([3.0]) == measure.Spread(3.0, 3.0, 3.0, 1)


def test_a_deadline_ends_the_rounds_but_not_before_one_counts():
    clock = Clock()
    assert measure.alternate([clock.worker("A", 5.0)], 10, 2, clock=clock, deadline=-1.0) == [[5.0]]


def test_a_contest_knows_ratio_speed_difference_and_who_could_not_run():
    clock = Clock()

    def broken() -> Tensor:
        raise RuntimeError("no kernel\nwith a long story")

    entries = [
        Entry("broken", broken),
        Entry("absent", None, note="not installed"),
        Entry("ours", clock.worker("ours", 1.0)),
        Entry("diffusers", clock.worker("theirs", 4.0)),
    ]
    rows = contest("step", "shape", entries, Settings(repeats=3), "diffusers", int(8e12), clock)
    found = {row.contestant: row for row in rows}
    assert found["broken"].note == "RuntimeError: no kernel" and found["broken"].seconds is None
    assert found["absent"].note == "not installed"
    ours = found["ours"]
    assert (ours.seconds, ours.ratio) == (measure.Spread(1, 1, 1, 3), measure.Spread(0.25, 0.25, 0.25, 3))
    assert ours.tflops == 8.0 and found["diffusers"].tflops == 2.0
    assert ours.reference == "diffusers" and ours.difference == ours.largest == 0


def test_without_the_reference_the_first_that_works_is_it():
    clock = Clock()
    rows = contest(
        "step", "shape", [Entry("ours", clock.worker("a", 2.0))], Settings(repeats=1), "x", None, clock
    )
    assert [(row.reference, row.ratio and row.ratio.median) for row in rows] == [("ours", 1.0)]


def test_operators_are_grouped_by_name():
    names = (
        "addmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "gelu_",
        "native_layer_norm",
        "copy_",
        "mul",
    )
    assert [limits.group(name) for name in names] == [*limits.GROUPS, limits.OTHER]
    assert limits.group("efficient_attention_forward_cutlass") == "attention"


# --- report


def report() -> Report:
    rows = [
        Row("step", "5B", "diffusers", "diffusers", "sdpa", seconds=measure.Spread(2, 1, 3, 5), tflops=300.0,
            ratio=measure.Spread(1, 1, 1, 5), peak_mb=12.0, difference=0.0, largest=0.0),
        Row("step", "5B", "ours", "diffusers", "sdpa", "model", measure.Spread(1.5, 1.4, 1.6, 5),
            measure.Spread(0.75, 0.7, 0.8, 5), 400.0, None, 1e-7, 1e-6),
        Row("step", "5B", "ours", "diffusers", "xformers", note="no kernel"),
    ]  # fmt: skip
    machine = {"device": "H", "cores": 2, "threads": 2, "date": "2026-01-01", "versions": {"torch": "2"}}
    shares = {"5B, ours": {"matrix products": 0.75, "everything else": 0.25}}
    return Report(machine, {"dtype": "bfloat16"}, rows, {"5B": "42 layers"}, shares, ["A note."])


def test_json_and_back(tmp_path):
    made = report()
    made.write(tmp_path / "new" / "b")
    assert Report.from_json((tmp_path / "new" / "b.json").read_text()) == made
    assert (tmp_path / "new" / "b.md").read_text() == markdown(made)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["b.json", "b.md"]


def test_the_page_says_everything():
    page = markdown(report())
    assert "# Benchmark: H" in page and "2026-01-01" in page and "torch 2" in page and "- A note." in page
    assert "| ours | sdpa | model | 1.5 (1.4 to 1.6) | 0.750 | 400 |  | 1.0e-07 |" in page
    assert "| ours (no kernel) | xformers |  | did not run |" in page
    assert "| 5B, ours | 75.0 | 25.0 |" in page
    assert "| 5B | ours (compiled: model) | sdpa | 1.5 | 0.75 |" in summary(report())


def test_committed_reports_are_readable_and_shown_in_the_readme():
    """docs/bench_*.json: each has its page, and the README's table is made from it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").glob("bench_*.json")):
        made = Report.from_json(path.read_text(encoding="utf-8"))
        assert made.rows and made.machine["device"] and made.machine["date"]
        assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(made)
        assert summary(made) in readme, f"python -m mimir_core.bench --summary docs/{path.name}"


# --- real rows, tiny


@pytest.mark.parametrize("shape", TINY, ids=lambda shape: shape.name)
def test_contestants_share_weights_and_agree(shape: Shape):
    state = random_state(shape.config, CPU, torch.float32)
    built = list(models(shape, state))
    assert [(model.name, model.attention) for model in built] == [(DIFFUSERS, "sdpa"), (OURS, "sdpa")]
    theirs, ours = (model.predict for model in built if isinstance(model, Model))
    assert isinstance(ours, CogVideoXTransformer)
    assert all(ours.state_dict()[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    given = inputs(shape, CPU, torch.float32)
    with torch.inference_mode():
        assert measure.difference(ours(*given), theirs(*given))[1] < 1e-6


def test_a_shared_prefill_equals_separate_ones():
    shape = dataclasses.replace(PREFILLS["tiny"][0], tokens=37, answer=3)
    reader = Reader(shape, CPU, torch.float32)
    assert len(reader.tokenizer.turn(reader.prompt).query) == 37
    shared, separate = reader.shared(), reader.separate()
    assert shared.shape == separate.shape == (1, 37 + 3 + 4, shape.config.hidden_size)
    assert measure.difference(shared, separate)[1] < 1e-5


def test_every_kind_of_row(tmp_path):
    """One small round of everything, with a host's model that runs and one that is missing."""

    def host(shape: Shape, state: Any) -> list[Model | Missing]:
        ours = next(model for model in models(shape, state) if model.name == OURS)
        assert isinstance(ours, Model)
        return [dataclasses.replace(ours, name="a host's"), Missing("older host's", "it has none")]

    settings = Settings(repeats=2, warmup=0, video_steps=2, hosts=(host,))
    prefill = dataclasses.replace(PREFILLS["tiny"][0], tokens=20)
    made = run(Report({"device": "x"}, {}), settings, TINY[1:2], TINY[:1], [prefill], tmp_path / "b")
    assert not made.notes
    assert Report.from_json((tmp_path / "b.json").read_text()) == made
    found = {(row.kind, row.contestant): row for row in made.rows}
    assert sorted(found) == [
        ("prefill", "one shared prefill"), ("prefill", "separate prefills"),
        *(("step", who) for who in ("a host's", "diffusers", "older host's", "ours")),
        *(("video", who) for who in ("a host's", "diffusers", "older host's", "ours")),
    ]  # fmt: skip
    for (_, who), row in found.items():
        assert row.note == "it has none" if who == "older host's" else row.difference is not None
        assert row.difference is None or row.difference < 1e-5
    assert {name for name in made.limits} == {"tiny 5B, ours", "tiny 5B, diffusers"}
    assert all(abs(sum(shares.values()) - 1) < 1e-9 for shares in made.limits.values())


def test_a_shape_that_fails_is_a_note_and_the_rest_goes_on():
    wrong = dataclasses.replace(TINY[1], name="wrong", latents=(3, 5, 4))
    late = Settings(repeats=1, warmup=0, deadline=0.0)
    made = run(Report({}, {}), Settings(repeats=1, warmup=0), [wrong, TINY[2]])
    assert [row.shape for row in made.rows if row.contestant == OURS and row.seconds] == ["tiny 1.5"]
    assert any("multiples" in row.note for row in made.rows if row.contestant == OURS)
    assert run(Report({}, {}), late, [TINY[1]]).notes == ["Not measured, the time was over: step, tiny 5B."]


def test_compiled_rows_are_made_where_asked():
    shape = TINY[1]
    state = random_state(shape.config, CPU, torch.float32)
    found = [(model.name, model.compiled) for model in models(shape, state, "default")]
    assert found == [(DIFFUSERS, ""), (OURS, ""), (OURS, "model"), (OURS, "blocks"), (DIFFUSERS, "model")]


def test_the_command_writes_json_and_page(tmp_path, capsys):
    before = torch.get_num_threads()
    try:
        arguments = ["--device=cpu", "--sizes=tiny", "--only", "prefill", "--repeats=1", "--warmup=0"]
        assert main([*arguments, f"--threads={before}", "--out", str(tmp_path / "b")]) == 0
    finally:
        torch.set_num_threads(before)
    page = capsys.readouterr().out
    assert "one shared prefill" in page and (tmp_path / "b.md").read_text() in page
    assert json.loads((tmp_path / "b.json").read_text())["machine"]["threads"] == before
    assert main(["--summary", str(tmp_path / "b.json")]) == 0
    assert "| one shared prefill |" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process set its peak back")
@pytest.mark.parametrize("size", [10_000_000, 30_000_000])
def test_peak_memory_is_what_a_call_needs_on_top(size):
    found = measure.peak_bytes(lambda: torch.ones(size), CPU)
    assert found is not None and found == pytest.approx(4 * size, rel=0.1)
