"""ComfyUI-Mimir in one command. Needs Python 3.10 to 3.13 and nothing else.

    python run.py demo --prompt "a red circle moves left above a blue square"
    python run.py serve
    python run.py test
    python run.py bench

`demo` makes a video, `serve` opens a ComfyUI for your browser, `test` runs every check, `bench` measures our
speed against diffusers' and ComfyUI's own CogVideoX. The first use makes .venv and fetches a ComfyUI (both
inside this folder, nothing elsewhere); from then on each starts in seconds.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.client import Client, Prompt, Run
from launcher.comfyui import ROOT, Comfy, fetch, find
from launcher.console import Failure, complain, say, step
from launcher.environment import Environment, ensure, ensure_venv, own_python, use_own_python
from launcher.server import PACK_FOLDER, Server, base_folder, claimed
from launcher.workflow import SAVED_WORKFLOW, SEEDS, check_saved, set_text, set_value, to_prompt

TEMPLATE = "mimir_tiny_text_to_video"
PROMPT = "a red circle moves left above a blue square"
SERVE_PORT = 8188
RUN_SECONDS = 1800.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options, rest = _parser().parse_known_args(arguments)
    if rest and options.command not in ("test", "bench"):
        _parser().error(f"unknown arguments: {' '.join(rest)}")
    options.rest = rest
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a letter of the prompt prints "?" for it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Both unwind the stack, so that the host is ended. A shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return options.run(options)
    except Failure as failure:
        complain(failure)
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130
    except OSError as error:
        complain(_explain(error))
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | serve | test | bench")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--comfyui", metavar="PATH", help="use the ComfyUI in this folder (also: COMFYUI_PATH)"
    )

    demo_ = commands.add_parser("demo", parents=[common], help="make one video from a prompt")
    demo_.add_argument("--prompt", default=PROMPT, help=f'what to show (default: "{PROMPT}")')
    demo_.add_argument("--seed", type=int, help="another number, another video")
    demo_.add_argument("--steps", type=_whole(1), help="sampling steps")
    demo_.add_argument(
        "--workflow", default=TEMPLATE, help="a template of workflows/, or a saved workflow's path"
    )
    demo_.add_argument("--out", metavar="FILE", help="where to put the video as well")
    demo_.set_defaults(run=demo)

    serve_ = commands.add_parser("serve", parents=[common], help="run ComfyUI with this pack for a browser")
    serve_.add_argument("--port", type=_whole(1, 65535), default=SERVE_PORT, help=f"default: {SERVE_PORT}")
    serve_.add_argument("--open", action="store_true", help="open the page in the browser")
    serve_.set_defaults(run=serve)

    test_ = commands.add_parser(
        "test", parents=[common], help="run ruff, pyright and pytest; with pytest arguments, pytest only"
    )
    test_.set_defaults(run=test)

    bench_ = commands.add_parser(
        "bench",
        parents=[common],
        help="measure the speed; other arguments go to the benchmark (python -m mimir_core.bench --help)",
    )
    bench_.add_argument("--host-flags", metavar="FLAGS", help="ComfyUI's own start-up flags, in one string")
    bench_.set_defaults(run=bench)
    return parser


def _whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high` (None: no limit)."""
    span = f"from {low} to {high}" if high else f"of at least {low}"

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= (high or int(text)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {span}")
        return int(text)

    return parse


def prepare(comfyui: str | None, tests: bool = False) -> tuple[Comfy, Environment]:
    """A ComfyUI and a Python that runs it: its own where it has one, else our .venv (always for the
    tests)."""
    comfy = find(comfyui)
    own = own_python(comfy) if comfy and not comfy.managed and not tests else None
    if comfy and own:
        return comfy, use_own_python(own)
    python = ensure_venv()
    comfy = comfy or fetch(python)
    return comfy, ensure(comfy, tests)


def demo(options: argparse.Namespace) -> int:
    """Make one video and say where it is and how long each stage took."""
    start = time.monotonic()
    workflow = read_workflow(options.workflow)
    make_room(options.out)
    comfy, environment = prepare(options.comfyui)
    with started(options.command, comfy, environment) as server:
        client = Client(server.url, alive=server.raise_if_dead)
        prompt = demo_prompt(client, workflow, options)
        say(f'Running {options.workflow}: "{shortened(options.prompt)}"')
        run = client.run(prompt, timeout=RUN_SECONDS)
        video = keep_video(client, server, run, options.out)
    report(prompt, run)
    say(f"\nVideo: {video}  ({video.stat().st_size / 1e3:.0f} kB, {time.monotonic() - start:.0f} s in all)")
    return 0


@contextmanager
def started(command: str, comfy: Comfy, environment: Environment, port: int = 0) -> Iterator[Server]:
    """A running host; says how long its start took."""
    base = base_folder(command)
    server = Server(comfy, environment.python, base, port, environment.cpu, environment.overlay)
    with claimed(command):
        with step(f"Starting ComfyUI {comfy.version} on the {'CPU' if server.cpu else 'GPU'} ({comfy.path})"):
            server.start()
        try:
            yield server
        finally:
            server.stop()


def read_workflow(name: str) -> dict:
    """A saved workflow: the name of one in workflows/, or a path."""
    path = ROOT / "workflows" / f"{name}.json"
    path = path if path.exists() else Path(name)
    if not path.is_file():
        raise Failure(f"There is no workflow {name!r}.", f"Templates: {', '.join(templates()) or 'none'}.")
    try:
        workflow = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise Failure(f"{path} is not a workflow: {error}.", SAVED_WORKFLOW) from error
    check_saved(workflow, str(path))
    return workflow


def templates() -> list[str]:
    """The names of the shipped workflows."""
    return sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


def demo_prompt(client: Client, workflow: dict, options: argparse.Namespace) -> Prompt:
    """The workflow as an API prompt, with what was asked for in it."""
    prompt = to_prompt(workflow, client.object_info())
    set_text(prompt, options.prompt)
    if options.seed is not None:
        set_value(prompt, SEEDS, options.seed)
    if options.steps is not None:
        set_value(prompt, ("steps",), options.steps)
    return prompt


def shortened(text: str, limit: int = 120) -> str:
    """One line of `text`, of `limit` characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."


def make_room(out: str | None) -> None:
    """Make the folder that `out` lies in; raises Failure if that cannot be done, before anything is run."""
    if not out:
        return
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(
            f"The folder of --out {out} cannot be made ({error.strerror}).", "Choose another file with --out."
        ) from error


def keep_video(client: Client, server: Server, run: Run, out: str | None) -> Path:
    """The path of the video that the run has written, copied to `out` if that is given."""
    videos = [file for file in run.files() if file.filename.endswith((".mp4", ".webm", ".webp", ".mkv"))]
    if not videos:
        raise Failure("The workflow ran but wrote no video.", "It needs a SaveVideo node.")
    path = server.base / videos[0].type / videos[0].subfolder / videos[0].filename
    try:
        return Path(shutil.copy2(path, out)) if out else path
    except OSError as error:
        raise Failure(
            f"The video is finished but cannot be copied to {out} ({error.strerror or error}).",
            f"It lies in {path}; copy it from there.",
        ) from error


def report(prompt: Prompt, run: Run) -> None:
    """Print the seconds of each stage."""
    for node_id, seconds in run.seconds.items():
        say(f"  {prompt[node_id]['_meta']['title']:<32}{seconds:7.2f} s")
    say(f"  {'all stages':<32}{sum(run.seconds.values()):7.2f} s")


def serve(options: argparse.Namespace) -> int:
    """Run the host until Ctrl-C, printing what it prints."""
    comfy, environment = prepare(options.comfyui)
    with started(options.command, comfy, environment, options.port) as server:
        say(f"\nOpen {server.url}/?template={TEMPLATE}&source={PACK_FOLDER}\nCtrl-C stops it.\n")
        if options.open:
            webbrowser.open(server.url)
        shown = 0
        try:
            while True:
                shown += _print_from(server.log, shown)
                server.raise_if_dead()
                time.sleep(0.5)
        except KeyboardInterrupt:
            say("\nStopping ComfyUI.")
    return 0


def _print_from(log: str, start: int) -> int:
    print(log[start:], end="", flush=True)
    return len(log) - start


def test(options: argparse.Namespace) -> int:
    """Run the checks; with pytest arguments only pytest, with those. Returns 1 if any failed."""
    comfy, environment = prepare(options.comfyui, tests=True)
    say(f"Testing with ComfyUI {comfy.version} in {comfy.path}")
    python = str(environment.python)
    checks = {"ruff": ["ruff", "check", "."], "pyright": ["pyright", "--pythonpath", python]}
    commands = {} if options.rest else checks
    commands["pytest"] = ["pytest", *options.rest]
    variables = {**os.environ, "COMFYUI_PATH": str(comfy.path), "MIMIR_NEEDS_HOST": "1"}
    variables.setdefault("OMP_NUM_THREADS", "1")
    failed = []
    for name, command in commands.items():
        say(f"\n--- {name}")
        start = time.monotonic()
        if subprocess.run([python, "-m", *command], cwd=ROOT, env=variables).returncode:
            failed.append(name)
        say(f"--- {name}: {time.monotonic() - start:.0f} s")
    say(f"\nFAILED: {', '.join(failed)}" if failed else "\nAll checks passed.")
    return 1 if failed else 0


def bench(options: argparse.Namespace) -> int:
    """Measure inside a ComfyUI; returns the benchmark's exit status."""
    comfy, environment = prepare(options.comfyui)
    say(f"Measuring with ComfyUI {comfy.version} in {comfy.path}")
    code = "import sys; sys.path.append(sys.argv.pop(1)); from launcher.inside import main; sys.exit(main())"
    command = [str(environment.python), "-c", code, str(ROOT), str(comfy.path)]  # -m fails in portable builds
    command += [f"--host-flags={options.host_flags}"] if options.host_flags else []
    return subprocess.run([*command, *options.rest], cwd=ROOT).returncode


def _explain(error: OSError) -> Failure:
    if error.errno == errno.ENOSPC:
        return Failure(f"The disk is full ({error.filename or ROOT}).", "Free some space and run it again.")
    return Failure(
        f"{type(error).__name__}: {error}", "Run it again; if it stays so, report it with these lines."
    )


if __name__ == "__main__":
    sys.exit(main())
