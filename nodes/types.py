"""Our two socket types, and the schema helper that speaks to every supported host."""

import dataclasses
import inspect
from typing import Any

from comfy_api.latest import io

MimirTokens = io.Custom("MIMIR_TOKENS")  # mimir_core.tokens.LlmTokens
MimirFuser = io.Custom("MIMIR_FUSER")  # nodes.host.fuser.Fuser

CATEGORY = "Mimir"
INSPECT = f"{CATEGORY}/inspect"
_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(node_id: str, display_name: str, description: str, **fields: Any) -> io.Schema:
    """A Schema of our category; fields that an older host does not know (search_aliases ...) are left out."""
    known = {name: value for name, value in fields.items() if name in _FIELDS}
    known = {"category": CATEGORY, **known}
    return io.Schema(node_id=node_id, display_name=display_name, description=description, **known)


def widget(kind: Any, name: str, **options: Any) -> Any:
    """`kind.Input(name, ...)` without the options that an older host's input does not know (advanced ...)."""
    known = inspect.signature(kind.Input.__init__).parameters
    return kind.Input(name, **{key: value for key, value in options.items() if key in known})
