"""English as the page looks it up, from the schemas: the measure of every language in locales/.

    COMFYUI_PATH=... python tests/host/inprocess/locales.py

writes locales/en/nodeDefs.json afresh; run it after a change of a name or tooltip, then translate what
tests/test_locales.py finds missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import tests.host.inprocess.conftest  # noqa: F401  sets ComfyUI up for the CPU


def english() -> dict[str, Any]:
    """{node id: its entry in nodeDefs.json}, in the order of the pack."""
    from mimir_pack import nodes
    from mimir_pack.nodes.host import files

    files.register()
    return {node.__name__: entry(node.GET_SCHEMA()) for node in nodes.NODES}


def entry(schema: Any) -> dict[str, Any]:
    """Inputs by id, outputs by place. An output that is called like its type is named by the page itself."""
    inputs = {socket.id: _words(socket.display_name or socket.id, socket) for socket in schema.inputs}
    outputs = {}
    for place, socket in enumerate(schema.outputs):
        own = socket.display_name != socket.get_io_type()
        outputs[str(place)] = _words(socket.display_name if own else None, socket)
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": outputs,
    }


def _words(name: str | None, socket: Any) -> dict[str, str]:
    return {"name": name, "tooltip": socket.tooltip} if name else {"tooltip": socket.tooltip}


if __name__ == "__main__":
    path = ROOT / "locales/en/nodeDefs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(english(), ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")
