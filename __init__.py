"""ComfyUI-Mimir: text to video with a token fuser, for ComfyUI.

ComfyUI imports this file; everything else (tests, `python -m mimir_core...`) does not need it. Only the
probe for ComfyUI is guarded, so that a real error in `nodes/` reaches the host's log with its traceback.
"""

try:
    import comfy_api.latest  # noqa: F401  (the probe: is this a ComfyUI process?)
except ImportError:
    pass
else:
    from .nodes import comfy_entrypoint  # noqa: F401  (ComfyUI calls it)

    __all__ = ["comfy_entrypoint"]
