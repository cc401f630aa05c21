"""`python -m mimir_core.data --videos FOLDER --out FOLDER`: videos to captioned clips."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from .config import DataConfig
from .prepare import Where, plan, prepare
from .report import table

WORDS = {"probe": "opening", "shots": "finding shots", "judge": "judging clips", "write": "writing clips"}
EVERY = 5.0  # seconds between lines of progress where the output is no terminal


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mimir_core.data", description=__doc__)
    parser.add_argument("--videos", type=Path, help="a folder, or a .txt file with one path per line")
    parser.add_argument("--out", type=Path, help="where the result goes; the same again continues there")
    parser.add_argument("--config", type=Path, help="a JSON file; what it leaves out keeps its default")
    parser.add_argument(
        "--show-config", action="store_true", help="print the configuration as JSON, and stop"
    )
    parser.add_argument(
        "--workers", type=int, default=max((os.cpu_count() or 2) - 1, 1), help="processes; 0: this one alone"
    )
    parser.add_argument(
        "--ray", nargs="?", const="local", default="", metavar="ADDRESS",
        help="on Ray Data, for more than one machine: a cluster's address, or none for this machine",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    found = parser.parse_args(given)
    if found.workers < 0:
        parser.error(f"--workers is {found.workers}, expected 0 or more")
    if not found.show_config and not (found.videos and found.out):
        parser.error("--videos and --out are needed")
    return found


class Lines:
    """Progress for people: one line that is overwritten in a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self.kind, self.began, self.said = "", 0.0, 0.0

    def __call__(self, kind: str, done: int, total: int) -> None:
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if kind != self.kind:
            self.kind, self.began, self.said = kind, now, 0.0
        if done < total and now - self.said < (0.2 if terminal else EVERY):
            return
        self.said = now
        text = f"{WORDS[kind]:<14} {done:>7} of {total}  {now - self.began:6.1f} s"
        print(
            f"\r{text}" if terminal else text, end="\n" if done == total or not terminal else "", flush=True
        )


def show_plan(found: argparse.Namespace, config: DataConfig, where: Where) -> None:
    would = plan(found.videos, found.out, config, where)
    names, problems = would.pop("names"), would.pop("problems")
    for key, value in would.items():
        print(f"{key:<32} {value}")
    place = f"Ray ({where.ray})" if where.ray else f"{where.workers or 1} process(es)"
    print(f"{'would run in':<32} {place}\n{'would write to':<32} {found.out}")
    print("\n".join(f"problem: {problem}" for problem in problems))
    print(json.dumps(config.to_dict(), indent=2))
    print("\n".join(names[:20]) + (f"\n... and {len(names) - 20} more" if len(names) > 20 else ""))


def main(given: list[str] | None = None) -> int:
    """0, or 2 with a sentence when something has to be put right first."""
    found = arguments(given)
    try:
        config = DataConfig.read_json(found.config) if found.config else DataConfig()
        where = Where(found.workers, found.ray)
        if found.show_config:
            print(json.dumps(config.to_dict(), indent=2))
        elif found.dry_run:
            show_plan(found, config, where)
        else:
            print(table(prepare(found.videos, found.out, config, where, Lines())))
            print(f"{found.out / 'clips.jsonl'}: every clip; {found.out / 'sheets'}: examples of every stage")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
