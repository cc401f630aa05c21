"""What run.py is made of: environment, host, server, client. Standard library only, no import of torch or
ComfyUI.

console      steps with their times, and Failure: what went wrong and what to do
environment  the .venv in the checkout and what is installed in it
comfyui      finds or fetches the ComfyUI sources
server       starts that ComfyUI with this pack, and stops it
client       its HTTP API: queue, follow, fetch
websocket    the few lines of RFC 6455 that following needs
workflow     turns a saved workflow into what the API takes
inside       runs the benchmark inside a ComfyUI, in a process of its own (there it imports both)
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (an older Python would stop at its first line with a riddle)
    raise SystemExit(f"This is Python {sys.version.split()[0]}; ComfyUI-Mimir needs 3.10 to 3.13.")
