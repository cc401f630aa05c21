"""What a node tells the person in front of it: a line on the node, progress, and the chance to interrupt."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context

log = logging.getLogger(__name__)
_inside: ContextVar[bool] = ContextVar("mimir_inside_one_bar", default=False)


def say(text: str) -> ui.PreviewText:
    """Shows `text` on the node that is executing, and returns it for the node's `ui` (the history)."""
    log.info("Mimir: %s", text)
    show(text)
    return ui.PreviewText(text)


def show(text: str) -> None:
    """Shows `text` on the node that is executing, for the moment."""
    context, server = get_executing_context(), _server()
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)


def require_finite(values: torch.Tensor, stage: str, remedy: str) -> None:
    """ValueError when a stage gave NaN or infinity, instead of a black video in silence."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        share = 1 - finite.float().mean().item()
        if share > 0.95:
            remedy += " If that does not help, the model's file may be damaged: download it again."
        raise ValueError(f"{stage}: {share:.0%} of the result is NaN or infinite. {remedy}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A ValueError inside the block becomes one sentence that begins with the file the user chose."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path.name}: {str(error).rstrip('.')}.") from error


def progress() -> Callable[[int, int], None]:
    """A callback (done, total) that moves the node's progress bar, and raises when the user interrupted."""
    bar = None if _inside.get() else comfy.utils.ProgressBar(1)

    def step(done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        if bar is not None:
            bar.update_absolute(done, total)

    return step


@contextmanager
def one_bar() -> Iterator[Callable[[int, int], None]]:
    """A `progress` for work in many parts: inside the block theirs only raise, and leave the bar alone."""
    step = progress()
    token = _inside.set(True)
    try:
        yield step
    finally:
        _inside.reset(token)


def _server() -> Any:
    """The web server of this process, if it is one; importing its module would begin to set one up."""
    prompt_server = getattr(sys.modules.get("server"), "PromptServer", None)
    return getattr(prompt_server, "instance", None)
