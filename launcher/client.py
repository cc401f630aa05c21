"""ComfyUI's HTTP API: queue a prompt, follow it, fetch what it made. Standard library only."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .console import Failure
from .websocket import WebSocket

Prompt = dict[str, dict[str, Any]]  # node id -> {"class_type": ..., "inputs": ...}
Progress = Callable[[str, float], None]  # (node id, part done 0..1)

REMEDY = (
    "Open the workflow with `python run.py serve`, where the node is marked, and choose another value or "
    'file; for a missing file see "Where files go" in README.md.'
)
# The server is on this machine, which no proxy of http_proxy can reach.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class File:
    """A file that a run has written, as ComfyUI names it."""

    filename: str
    subfolder: str
    type: str


@dataclass
class Run:
    """A finished run. `seconds`: time of each node that was executed, in the order of execution."""

    prompt_id: str
    history: dict[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def outputs(self) -> dict[str, Any]:
        """What each node showed, by node id."""
        return self.history.get("outputs", {})

    def files(self) -> list[File]:
        """Every file named in the outputs."""
        lists = [v for shown in self.outputs.values() for v in shown.values() if isinstance(v, list)]
        entries = [e for entries in lists for e in entries if isinstance(e, dict) and "filename" in e]
        return [File(e["filename"], e.get("subfolder", ""), e.get("type", "output")) for e in entries]

    def text(self, node_id: str) -> list[str]:
        """The text that a node showed."""
        return list(self.outputs.get(node_id, {}).get("text", ()))


class Client:
    """A ComfyUI server. `alive` is called while waiting and may raise to end the wait."""

    def __init__(self, url: str, alive: Callable[[], None] = lambda: None) -> None:
        self.url = url.rstrip("/")
        self.alive = alive

    def answers(self) -> bool:
        """Whether the server is up."""
        try:
            self.get("/system_stats", timeout=2)
        except (OSError, ValueError):
            return False
        return True

    def get(self, path: str, timeout: float = 30) -> Any:
        """The JSON at `path`."""
        return json.loads(self.get_bytes(path, timeout))

    def get_bytes(self, path: str, timeout: float = 30) -> bytes:
        """The body at `path`; raises urllib.error.HTTPError (an OSError) for anything but success."""
        with _OPENER.open(self.url + path, timeout=timeout) as response:
            return response.read()

    def post(self, path: str, body: Any, timeout: float = 30) -> Any:
        """POST `body` as JSON; returns the JSON answer, or None for an empty one."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with _OPENER.open(request, timeout=timeout) as response:
            text = response.read()
        return json.loads(text) if text else None

    def object_info(self, node: str = "") -> dict[str, Any]:
        """The schemas of all nodes, or of one."""
        return self.get(f"/object_info/{urllib.parse.quote(node)}" if node else "/object_info")

    def view(self, file: File) -> bytes:
        """The content of a file that a run has written."""
        return self.get_bytes("/view?" + urllib.parse.urlencode(vars(file)), timeout=120)

    def queue(self, prompt: Prompt, client_id: str = "") -> str:
        """Queue an API-format prompt and return its id; raises Failure for anything the server's validation
        finds, also where only a branch of the prompt is invalid."""
        prompt_id = str(uuid.uuid4())
        body = {"prompt": prompt, "prompt_id": prompt_id, "client_id": client_id or uuid.uuid4().hex}
        try:
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            answer = json.loads(error.read())
        problems = validation_problems(answer, prompt)
        if problems:
            raise Failure("ComfyUI refused the workflow:\n" + "\n".join(problems), REMEDY)
        return answer["prompt_id"]

    def interrupt(self) -> None:
        """Stop what runs now."""
        self.post("/interrupt", {})

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The record of a finished run; None while it is still queued or running."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def run(self, prompt: Prompt, timeout: float = 600, progress: Progress = lambda node, part: None) -> Run:
        """Queue and wait. Raises Failure for a refused or failed run, TimeoutError after `timeout`
        seconds."""
        client_id = uuid.uuid4().hex
        events = WebSocket(self.url, f"/ws?clientId={client_id}")
        try:
            prompt_id = self.queue(prompt, client_id)
            seconds = self._follow(events, prompt_id, time.monotonic() + timeout, progress)
        finally:
            events.close()
        record = self._record(prompt_id)
        raise_if_failed(record, prompt)
        return Run(prompt_id, record, seconds)

    def _follow(self, events: WebSocket, prompt_id: str, end: float, progress: Progress) -> dict[str, float]:
        """Read events until the run has ended; returns the seconds of each node."""
        clock, filed = _NodeClock(prompt_id, progress), False
        while time.monotonic() < end:
            try:
                text = events.read()
            except ConnectionError:
                self.alive()
                raise
            if text is not None:
                clock.hear(json.loads(text))
            elif filed:  # the run is over and its last event has not come
                clock.stop()
            else:
                self.alive()
                filed = self.history(prompt_id) is not None
            if clock.ended:
                return clock.seconds
        raise TimeoutError(f"run {prompt_id} has not ended in time")

    def _record(self, prompt_id: str) -> dict[str, Any]:
        """The record of a run that has ended (the server files it a moment after it says so)."""
        for _ in range(100):
            record = self.history(prompt_id)
            if record is not None:
                return record
            time.sleep(0.05)
        raise Failure(f"ComfyUI has no record of run {prompt_id}.", "Run it again.")


class _NodeClock:
    """Turns the server's events into the seconds that each node took."""

    def __init__(self, prompt_id: str, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.ended = False
        self._prompt_id, self._progress = prompt_id, progress
        self._node: str | None = None
        self._since = time.monotonic()

    def hear(self, event: dict[str, Any]) -> None:
        kind, data = event.get("type"), event.get("data", {})
        if data.get("prompt_id") != self._prompt_id:
            return
        if kind == "executing":
            self._switch(data.get("node"))
        elif kind == "progress" and data.get("max"):
            self._progress(str(data.get("node")), data["value"] / data["max"])
        elif kind in ("execution_success", "execution_error", "execution_interrupted"):
            self.stop()

    def stop(self) -> None:
        """The run is over: the node that ran until now has its time."""
        self._switch(None)
        self.ended = True

    def _switch(self, node: str | None) -> None:
        now = time.monotonic()
        if self._node is not None:
            self.seconds[self._node] = self.seconds.get(self._node, 0.0) + now - self._since
        self._node, self._since = node, now
        if node is not None:
            self._progress(node, 0.0)


def validation_problems(answer: dict[str, Any], prompt: Prompt) -> list[str]:
    """One line for each thing that the server's answer to /prompt complains of."""
    lines = []
    for node_id, found in (answer.get("node_errors") or {}).items():
        name = prompt.get(node_id, {}).get("class_type", "?")
        lines += [f"node {node_id} ({name}): {e['message']}: {e.get('details', '')}" for e in found["errors"]]
    error = answer.get("error")
    if error and not lines:
        lines.append(
            error if isinstance(error, str) else f"{error.get('message')} {error.get('details', '')}"
        )
    return lines


def raise_if_failed(record: dict[str, Any], prompt: Prompt) -> None:
    """Raises Failure with the node's own message when a run did not succeed."""
    status = record.get("status") or {}
    if status.get("status_str") == "success":
        return
    for kind, data in status.get("messages", ()):
        if kind == "execution_error":
            raise Failure(
                f"node {data['node_id']} ({data['node_type']}) failed: {data['exception_message'].strip()}",
                REMEDY,
            )
        if kind == "execution_interrupted":
            raise Failure("The run was interrupted.", "Run it again.")
    raise Failure(f"The run ended as {status.get('status_str')!r}: {status}", REMEDY)
