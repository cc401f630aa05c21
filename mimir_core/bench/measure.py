"""Taking turns: who is measured when, and what the times say."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Clock = Callable[[], float]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` values."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))


def alternate(
    runs: Sequence[Run],
    repeats: int,
    warmup: int = 1,
    *,
    clock: Clock = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,
    deadline: float = float("inf"),
) -> list[list[float]]:
    """Seconds of each run in each round: A B C, C B A, then the same from B on, from C on, ...

    Whatever slows the machine for a while slows all of them, and nobody always follows the same one. The
    first `warmup` rounds are dropped. Rounds end early after `deadline` (by `clock`), once one round counts.
    """
    times: list[list[float]] = [[] for _ in runs]
    for number in range(warmup + repeats):
        for index in order(len(runs), number):
            synchronize()
            start = clock()
            runs[index]()
            synchronize()
            if number >= warmup:
                times[index].append(clock() - start)
        if number >= warmup and clock() > deadline:
            break
    return times


def order(count: int, number: int) -> list[int]:
    """Who runs in which place in round `number`."""
    turn = [(number // 2 + place) % count for place in range(count)]
    return turn[::-1] if number % 2 else turn


def ratios(times: Sequence[float], reference: Sequence[float]) -> Spread:
    """Time over the reference's time, round by round: below 1 is faster."""
    return Spread.of([mine / its for mine, its in zip(times, reference, strict=True)])


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until `device` has done everything."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def difference(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(largest absolute difference, norm of the difference over the norm of `expected`)."""
    off = found.float() - expected.float()
    return off.abs().max().item(), (off.norm() / expected.float().norm()).item()


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """What one run needs on top of what lies in memory before it. None where that cannot be seen.

    CUDA: the allocator's own count. CPU: the growth of the process's peak, on Linux with glibc, which let a
    process give back what its allocator has kept and set its peak back.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = _resident("VmRSS") if _trimmed() and _peak_set_back() else None
    if before is None:
        return None
    run()
    after = _resident("VmHWM")
    return None if after is None else max(after - before, 0)


def _trimmed() -> bool:
    """Free memory is given back to the system; otherwise it would be used again without being seen."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return False
    return True


def _peak_set_back() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    """A figure of this process from Linux's own accounts, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")]
    return values[0] if values else None
