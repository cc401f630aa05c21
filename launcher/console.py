"""How run.py talks: one line per step with its seconds, and failures that say what to do."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Failure(Exception):
    """Something a person can mend. `problem` says what happened, `remedy` what to do about it."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem if not remedy else f"{problem}\n{remedy}")
        self.problem = problem
        self.remedy = remedy


@dataclass
class Step:
    """A step in progress; what is put into `note` is printed behind its time."""

    note: str = ""


@contextmanager
def step(text: str) -> Iterator[Step]:
    """Print `text ...`, run the body, print its seconds."""
    print(f"{text} ...", end="", flush=True)
    start = time.monotonic()
    state = Step()
    try:
        yield state
    except BaseException:
        print(f" failed after {time.monotonic() - start:.1f} s", flush=True)
        raise
    note = f"  ({state.note})" if state.note else ""
    print(f" {time.monotonic() - start:.1f} s{note}", flush=True)


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


def complain(failure: Failure) -> None:
    """Print a failure, problem first."""
    print(f"\nFAILED: {failure.problem}", file=sys.stderr, flush=True)
    if failure.remedy:
        print(f"What to do: {failure.remedy}", file=sys.stderr, flush=True)
