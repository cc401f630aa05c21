"""python -m mimir_core.bench: see --help."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .report import Report, machine, markdown, summary
from .rivals import Builder
from .shapes import PREFILLS, STEPS, Shape
from .suite import Settings, run

KINDS = ("step", "prefill", "video")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NO_HOST = "ComfyUI's own CogVideoX did not take part: `python3 run.py bench` runs inside a ComfyUI."


def main(
    arguments: Sequence[str] | None = None,
    hosts: Sequence[Builder] = (),
    versions: dict[str, str] | None = None,
    notes: Sequence[str] = (NO_HOST,),
) -> int:
    """Measure and write. `hosts`: models of a host that take part; `versions`, `notes`: what to say of it."""
    options = parser().parse_args(arguments)
    if options.summary:
        print(summary(Report.from_json(options.summary.read_text(encoding="utf-8"))))
        return 0
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger(__package__).setLevel(logging.INFO)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    sizes = options.sizes or ("real" if device.type == "cuda" else "small")
    dtype = DTYPES[options.dtype or ("bfloat16" if sizes == "real" else "float32")]
    settings = Settings(
        device,
        dtype,
        options.repeats,
        options.warmup,
        options.video_steps,
        options.compile_mode if options.compile else None,
        time.monotonic() + 60 * options.minutes,
        tuple(hosts),
    )
    report = Report(
        machine(device, versions or {}),
        {
            "dtype": str(dtype).removeprefix("torch."),
            "rounds": options.repeats,
            "warm-up rounds": options.warmup,
            **({"compile mode": options.compile_mode} if options.compile else {}),
        },
        notes=[*notes, *_facts(sizes)],
    )
    steps = chosen(STEPS[sizes], options.shapes)
    videos = [shape for shape in steps if shape.config.patch_size_t is None][:1]
    asked = {name: name in options.only for name in KINDS}
    run(
        report,
        settings,
        steps if asked["step"] else (),
        videos if asked["video"] else (),
        PREFILLS[sizes] if asked["prefill"] else (),
        options.out,
    )
    print(markdown(report))
    return 0 if any(row.seconds for row in report.rows) else 1


def parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    made = argparse.ArgumentParser(prog="python -m mimir_core.bench", description=__doc__)
    made.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    made.add_argument("--sizes", choices=list(STEPS), help="default: real on a GPU, small on a CPU")
    made.add_argument(
        "--shapes", nargs="+", metavar="NAME", help="only shapes whose name contains one of these"
    )
    made.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    made.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 for real sizes, else float32")
    made.add_argument("--repeats", type=int, default=10, help="rounds that count (default: %(default)s)")
    made.add_argument("--warmup", type=int, default=2, help="rounds that do not (default: %(default)s)")
    made.add_argument("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    made.add_argument(
        "--video-steps", type=int, default=4, help="steps of a whole video (default: %(default)s)"
    )
    made.add_argument("--compile", action="store_true", help="also compiled models (minutes for real sizes)")
    made.add_argument("--compile-mode", default="default", help="torch.compile's mode (default: %(default)s)")
    made.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after this long")
    made.add_argument("--out", type=Path, metavar="PATH", help="write PATH.json and PATH.md")
    made.add_argument(
        "--summary", type=Path, metavar="JSON", help="measure nothing: a short table of this file"
    )
    return made


def chosen(shapes: Sequence[Shape], names: Sequence[str] | None) -> list[Shape]:
    """The shapes whose name contains one of `names`; all without names."""
    return [s for s in shapes if not names or any(name.lower() in s.name.lower() for name in names)]


def _facts(sizes: str) -> list[str]:
    facts = [
        "All contestants of a shape share one set of random weights and the same inputs; their order changes "
        "from round to round. Speed does not depend on the weights' values.",
        "TFLOP/s: the arithmetic of mimir_core/bench/flops.py (matrix products and attention, a multiply-add "
        "counts as two) over the median time.",
    ]
    if sizes == "real":
        facts.append(
            "A random language model's tokens are almost equally likely: in 16 bit the two ways to read may "
            "give different answers, and then differ from there on."
        )
    else:
        facts.append("Small shapes say nothing about a real video's speed, only about ours against theirs.")
    return facts


if __name__ == "__main__":
    sys.exit(main())
