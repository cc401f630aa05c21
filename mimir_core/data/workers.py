"""Where tasks run: in local processes, or on Ray Data. Both give the same results."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .work import Task, Worker

Result = tuple[Task, dict[str, Any]]
AHEAD = 3  # tasks per process that are handed out at once
CRASHED = {
    "error": "the process that decoded it crashed (a damaged file, or too little memory)",
    "retry": True,
}
INSTALL_RAY = 'pip install "ray[data]>=2.40,<2.64"'  # 2.64 drops the way to bound retries

_worker: Worker | None = None  # of this process


def _start(worker: Worker) -> None:
    global _worker
    _worker = worker


def _run(task: Task) -> dict[str, Any]:
    assert _worker is not None, "a worker process that was not started"
    return _worker(task)


def _pool(worker: Worker, count: int) -> ProcessPoolExecutor:
    """Spawned, as on Windows: a forked copy of a process with threads may hang."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start, initargs=(worker,))


def run_local(worker: Worker, tasks: Sequence[Task], count: int) -> Iterator[Result]:
    """In `count` processes, 0 means in this one. Results come as they are finished. A task that crashes its
    process is found and reported; the others are done all the same."""
    if count == 0:
        yield from ((task, worker(task)) for task in tasks)
        return
    waiting = deque(tasks)
    while waiting:
        suspects: list[Task] = []
        yield from _until_crash(worker, waiting, min(count, len(waiting)), suspects)
        for task in suspects:
            yield task, _alone(worker, task)


def _until_crash(worker: Worker, waiting: deque[Task], count: int, suspects: list[Task]) -> Iterator[Result]:
    """Works `waiting` off; after a crash returns with the tasks that were at work in `suspects`."""
    flying: dict[Future[dict[str, Any]], Task] = {}
    pool = _pool(worker, count)
    try:
        while waiting or flying:
            while waiting and len(flying) < AHEAD * count:
                flying[pool.submit(_run, waiting[0])] = waiting[0]
                waiting.popleft()
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield flying.pop(future), result
    except BrokenProcessPool:
        suspects += flying.values()
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(worker: Worker, task: Task) -> dict[str, Any]:
    with _pool(worker, 1) as pool:
        try:
            return pool.submit(_run, task).result()
        except BrokenProcessPool:
            return dict(CRASHED)


def check_ray() -> None:
    """ValueError with the remedy when Ray Data is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--ray needs Ray Data, which cannot be imported ({error}). Install it: {INSTALL_RAY}. "
            "On one machine, leave --ray out: local processes give the same result."
        ) from error


def run_ray(worker: Worker, tasks: Sequence[Task], count: int, address: str) -> Iterator[Result]:
    """On Ray Data; `address` is a cluster's, or "local" for a Ray of this machine with `count` processors.
    Every machine must see both folders under the same paths."""
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if not ray.is_initialized():
        _start_ray(ray, count, address)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a crash costs some tasks, which are done below, and not the run
    known = {task.key: task for task in tasks}
    rows = [{"kind": task.kind, "key": task.key, "values": json.dumps(task.values)} for task in tasks]
    done = ray.data.from_items(rows).map(partial(_row, worker), num_gpus=_gpus(worker, tasks), max_retries=1)
    for row in done.iter_rows():
        result = json.loads(row["result"])
        if "failed" in result:
            raise ValueError(result["failed"])
        yield known.pop(row["key"]), result
    # Ray says only that a process crashed; which task it was comes out here.
    yield from run_local(worker, list(known.values()), max(count, 1))


def _start_ray(ray: Any, count: int, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine
    package = Path(__file__).parents[1]
    if address == "local":
        # As spawned processes do, Ray's find what this one finds: this library, and plug-ins.
        paths = [str(package.parent), os.getcwd(), *(path for path in sys.path if path)]
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}}
        ray.init(
            num_cpus=max(count, 1), include_dashboard=False, log_to_driver=False, runtime_env=environment
        )
    else:
        # The library travels to the other machines, without the weights of the built-in model.
        modules = {"py_modules": [str(package)], "excludes": ["tiny/weights"]}
        ray.init(address=address, log_to_driver=False, runtime_env=modules)


def _gpus(worker: Worker, tasks: Sequence[Task]) -> float | None:
    """Ray hides graphics cards from tasks that do not ask for one."""
    config = worker.config
    devices = (config.aesthetic.device, config.watermark.device, config.captions.device)
    judging = any(task.kind == "judge" for task in tasks)
    return 1.0 if judging and any(device.startswith("cuda") for device in devices) else None


def _row(worker: Worker, row: dict[str, str]) -> dict[str, str]:
    """A task and its result as rows of strings, which Ray stores without guessing at their types."""
    try:
        result = worker(Task(row["kind"], row["key"], json.loads(row["values"])))
    except ValueError as error:  # a plug-in's: the same sentence as from a local process
        result = {"failed": str(error)}
    return {"key": row["key"], "result": json.dumps(result)}
