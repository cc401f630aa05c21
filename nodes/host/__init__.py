"""The only part of the pack that knows ComfyUI's model management.

Nodes above it never touch a device; `mimir_core` below it never imports ComfyUI. Differences between host
versions (0.3.75 to 0.33) live here.
"""
