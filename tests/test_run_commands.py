"""What run.py's commands refuse, and say, before and after a host runs."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import run
from launcher import client, environment, server
from launcher.comfyui import Comfy
from launcher.console import Failure

ROOT = Path(__file__).resolve().parents[1]


def empty_workflow(folder: Path) -> Path:
    (folder / "empty.json").write_text('{"nodes": [], "links": []}', encoding="utf-8")
    return folder / "empty.json"


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path):
    code = (
        f"import sys; sys.path.append({str(ROOT)!r})\nfrom pathlib import Path\n"
        f"from launcher.environment import exclusive\nwith exclusive(Path({str(tmp_path / 'lock')!r})): pass"
    )
    with environment.exclusive(tmp_path / "lock"):
        second = subprocess.Popen([sys.executable, "-c", code])
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(1.5)
    assert second.wait(10) == 0


def test_a_taken_port_is_said_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(Failure, match="is taken") as caught:
            server.free_port(taken.getsockname()[1])
    assert "--port" in caught.value.remedy
    assert server.free_port(0) > 0


@pytest.fixture
def lock_holder(tmp_path, monkeypatch):
    """Starts a process that has the base directory of a command of run.py until its input is closed."""
    monkeypatch.setattr(server, "CACHE", tmp_path)
    holders = []

    def hold(command: str) -> subprocess.Popen:
        code = (
            f"import sys; sys.path.append({str(ROOT)!r})\nfrom pathlib import Path\n"
            f"from launcher.environment import exclusive\n"
            f"with exclusive(Path({str(tmp_path / command)!r} + '.lock')): print(1, flush=True); input()"
        )
        holders.append(
            subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        assert holders[-1].stdout.readline()
        return holders[-1]

    yield hold
    for holder in holders:
        holder.communicate(b"\n")


def test_a_second_demo_waits_for_the_first(lock_holder, capsys):
    first = lock_holder("demo")
    threading.Timer(0.5, first.stdin.write, [b"\n"]).start()
    threading.Timer(0.6, first.stdin.flush).start()
    with server.claimed("demo"):
        assert first.wait(10) == 0
    assert "starts when that has ended" in capsys.readouterr().out


def test_a_second_serve_is_refused(lock_holder):
    lock_holder("serve")
    with pytest.raises(Failure, match="Another `run.py serve` is running"), server.claimed("serve"):
        pass
    with server.claimed("demo"):
        pass


# --- commands


def test_an_unknown_template_names_those_that_exist(capsys):
    assert run.main(["demo", "--workflow", "nothing"]) == 1
    assert "There is no workflow 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"not json", "is not a workflow: Expecting value"),
        (b"\xff\xfe\x00", "is not a workflow"),
        (b"[1, 2]", "holds a list"),
        (b'{"3": {"class_type": "Sample", "inputs": {}}}', "API format"),
        (b'{"version": 1}', "no list of nodes"),
        (b'{"nodes": [3], "links": []}', "no list of nodes"),
        (b'{"nodes": [], "links": [{"id": 1}]}', "no list of links"),
    ],
)
def test_a_file_that_is_no_workflow_is_refused_before_the_start(
    tmp_path, monkeypatch, capsys, content, problem
):
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("prepared a host"))
    (tmp_path / "x.json").write_bytes(content)
    assert run.main(["demo", "--workflow", str(tmp_path / "x.json")]) == 1
    said = capsys.readouterr().err
    assert problem in said and "What to do: Give a file" in said


@pytest.mark.parametrize("name", run.templates())
def test_every_template_can_be_read(name):
    assert run.read_workflow(name)["nodes"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--port", "99999"],
        ["serve", "--port", "0"],
        ["demo", "--steps", "0"],
        ["demo", "--steps", "x"],
    ],
)
def test_numbers_out_of_range_are_refused_at_once(arguments, monkeypatch, capsys):
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("prepared a host"))
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)
    assert ended.value.code == 2
    assert f"{arguments[2]!r} is not a whole number" in capsys.readouterr().err


def test_an_impossible_out_is_refused_before_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("prepared a host"))
    out = empty_workflow(tmp_path) / "folder" / "video.mp4"
    assert run.main(["demo", "--workflow", str(empty_workflow(tmp_path)), "--out", str(out)]) == 1
    assert "What to do: Choose another file with --out" in capsys.readouterr().err


def test_a_long_prompt_is_shortened_to_one_line():
    assert run.shortened("a red\ncircle") == "a red circle"
    for prompt in ("word " * 100, "x" * 500):
        assert len(run.shortened(prompt)) == 120 and run.shortened(prompt).endswith(" ...")


def test_a_finished_video_that_cannot_be_copied_is_named(tmp_path):
    host = server.Server(Comfy(tmp_path, "0.33.0"), Path(sys.executable), tmp_path)
    video = tmp_path / "output" / "video" / "x.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(b"video")
    shown = {"images": [{"filename": "x.mp4", "subfolder": "video", "type": "output"}]}
    made = client.Run("1", {"outputs": {"8": shown}})
    own = client.Client("http://127.0.0.1:1")
    assert run.keep_video(own, host, made, str(tmp_path / "copy.mp4")).read_bytes() == b"video"
    with pytest.raises(Failure, match="is finished but cannot be copied") as caught:
        run.keep_video(own, host, made, str(tmp_path / "nowhere" / "copy.mp4"))
    assert str(video) in caught.value.remedy


def test_run_imports_the_standard_library_only(tmp_path):
    code = f"import sys; sys.path.append({str(ROOT)!r}); import run; print(run.__doc__[:14])"
    made = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert made.returncode == 0, made.stderr


def test_a_full_disk_is_explained():
    assert "disk is full" in run._explain(OSError(28, "No space left on device")).problem


def test_bench_runs_inside_the_host_with_its_arguments(monkeypatch, tmp_path):
    """Also from a Python that does not look into the current folder, like a portable build's."""
    comfy = Comfy(tmp_path, "0.33.0")
    here = environment.Environment(Path(sys.executable), None, cpu=True)
    commands: list[list[str]] = []
    monkeypatch.setattr(run, "prepare", lambda comfyui: (comfy, here))
    monkeypatch.setattr(
        run.subprocess,
        "run",
        lambda command, **_: commands.append(command) or subprocess.CompletedProcess([], 3),
    )
    assert run.main(["bench", "--only", "step", "--host-flags=--use-sage-attention --cpu"]) == 3
    python, option, code, *rest = commands[0]
    assert (python, option) == (sys.executable, "-c") and "launcher.inside" in code
    assert rest == [str(ROOT), str(tmp_path), "--host-flags=--use-sage-attention --cpu", "--only", "step"]


def test_inside_needs_a_comfyui(tmp_path):
    from launcher import inside

    with pytest.raises(Failure, match="is not a ComfyUI folder"):
        inside.main([str(tmp_path)])
