"""What the templates show, remade by the pack itself: `python -m launcher.pictures` in the pack's .venv.

Run it after Mimir Tiny's weights have changed. First it saves the built-in example of Load Conditioning
(Mimir), then it runs every template on a ComfyUI of its own and writes its picture, `workflows/<name>.jpg`:
frames of its video, or what it previews. A template that needs downloads gets a card that names them.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .client import Client, File, Run
from .comfyui import ROOT, find
from .console import Failure, step
from .environment import overlay_folder
from .server import Server
from .workflow import Workflow, set_text, to_prompt

if TYPE_CHECKING:
    from PIL import Image

FOLDER = ROOT / "workflows"
EXAMPLE = ROOT / "mimir_core" / "tiny" / "weights" / "example_conditioning.safetensors"
EXAMPLE_TEMPLATE = "mimir_tiny_text_to_video"
EXAMPLE_PROMPT = "a yellow triangle moves right, night turns to day"
SIDE = 592  # pixels; the Templates browser shows a square
GAP = 4
BACKGROUND, PAPER, INK, FAINT = "#15151c", "#24242e", "#ffffff", "#9a9aa8"
STAGES = (("T5-XXL", "Phi-3.5"), ("Token Fuser",), ("DiT",), ("VAE",))


def main() -> None:
    """Remake the example and all pictures, or the pictures of the named templates alone."""
    parser = argparse.ArgumentParser(description="Remake the pictures of the templates.")
    parser.add_argument("names", nargs="*", help="templates (default: all, and the example condition)")
    names = parser.parse_args().names
    comfy = find()
    if comfy is None:
        raise SystemExit("No ComfyUI: `python run.py demo` fetches one, or set COMFYUI_PATH.")
    with tempfile.TemporaryDirectory() as base:
        overlay = overlay_folder(comfy)
        with Server(comfy, Path(sys.executable), Path(base), overlay=overlay) as server:
            client = Client(server.url, alive=server.raise_if_dead)
            if not names:
                with step("Saving the example condition"):
                    save_example(client, Path(base))
            for name in names or sorted(path.stem for path in FOLDER.glob("*.json")):
                with step(f"Picture of {name}"):
                    picture(client, read(name)).save(FOLDER / f"{name}.jpg", quality=88)


def read(name: str) -> Workflow:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def save_example(client: Client, base: Path) -> None:
    """The condition of EXAMPLE_PROMPT, as Save Conditioning (Mimir) writes it."""
    prompt = to_prompt(read(EXAMPLE_TEMPLATE), client.object_info())
    set_text(prompt, EXAMPLE_PROMPT)
    (sampler,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "MimirSampler")
    inputs = {
        "positive": sampler["positive"],
        "negative": sampler["negative"],
        "filename_prefix": "example",
        "dtype": "exact",
    }
    prompt = {number: node for number, node in prompt.items() if node["class_type"] != "SaveVideo"}
    prompt["save"] = {"class_type": "MimirSaveConditioning", "inputs": inputs}
    done = client.run(prompt)
    (place,) = done.outputs["save"]["conditioning"]
    EXAMPLE.write_bytes((base / "output" / place["subfolder"] / place["filename"]).read_bytes())


def picture(client: Client, workflow: Workflow) -> Image.Image:
    """A square picture of what the template makes, or of what it needs."""
    if models_of(workflow):
        return card(workflow)
    done = client.run(to_prompt(workflow, client.object_info()))
    shown = [frames for frames in (_frames(client, file) for file in _in_order(workflow, done)) if frames]
    if not shown:
        raise Failure("The template showed neither a video nor a picture.", "Give it a Save Video node.")
    return sheet(shown)


def models_of(workflow: Workflow) -> list[dict[str, Any]]:
    """The files that ComfyUI offers to download for a workflow."""
    return [model for node in workflow["nodes"] for model in node["properties"].get("models", ())]


def _in_order(workflow: Workflow, done: Run) -> list[File]:
    """Files of the nodes' outputs, in the order of the template's nodes."""
    order = [str(node["id"]) for node in workflow["nodes"]]
    outputs = sorted(done.outputs.items(), key=lambda item: order.index(item[0].split(".")[0].split(":")[0]))
    return [file for node, shown in outputs for file in Run("", {"outputs": {node: shown}}).files()]


def _frames(client: Client, file: File) -> list[Image.Image]:
    """The frames of a video or the one picture of an image file; nothing for another kind of file."""
    import av
    from PIL import Image

    if file.filename.endswith(".png"):
        return [Image.open(io.BytesIO(client.view(file))).convert("RGB")]
    if not file.filename.endswith(".mp4"):
        return []
    with av.open(io.BytesIO(client.view(file))) as video:
        return [frame.to_image() for frame in video.decode(video=0)]


def sheet(videos: list[list[Image.Image]]) -> Image.Image:
    """Nine frames of one video (16 of a long one), three of each of several; one of what is wide or still."""
    from PIL import Image

    first = videos[0]
    columns = 4 if len(videos) == 1 and len(first) > 16 else 3
    if len(first) == 1 or first[0].width > 1.5 * first[0].height:
        columns = 1
    count = columns * columns if len(videos) == 1 else columns
    cells = [frame for video in videos for frame in spread(video, count)]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    width, tallest = ((SIDE - GAP * (n + 1)) // n for n in (columns, len(rows)))
    tiles = [[_fitted(frame, width, tallest) for frame in row] for row in rows]
    heights = [max(tile.height for tile in row) + GAP for row in tiles]
    whole = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    top = (SIDE - sum(heights) + GAP) // 2
    for row, height in zip(tiles, heights):
        for column, tile in enumerate(row):
            whole.paste(tile, (GAP + column * (width + GAP) + (width - tile.width) // 2, top))
        top += height
    return whole


def spread(video: list[Image.Image], count: int) -> list[Image.Image]:
    """`count` frames from the first to the last, evenly; the middle one if one is wanted."""
    if count == 1:
        return [video[len(video) // 2]]
    return [video[round(index * (len(video) - 1) / (count - 1))] for index in range(count)]


def _fitted(frame: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / frame.width, height / frame.height)
    return frame.resize((round(frame.width * scale), round(frame.height * scale)))


def card(workflow: Workflow) -> Image.Image:
    """The stages of a template for real weights, its size and the files it takes."""
    from PIL import Image, ImageDraw

    whole = Image.new("RGB", (SIDE, SIDE), BACKGROUND)
    draw = ImageDraw.Draw(whole)
    (latent,) = (n["widgets_values"] for n in workflow["nodes"] if n["type"] == "MimirEmptyLatent")
    title = next(name for name in ("CogVideoX-5B", "CogVideoX-2B") if name in json.dumps(workflow))
    _text(draw, 62, title, 54, INK)
    _text(draw, 118, "prompt to {} x {}, {} frames".format(*latent), 26, FAINT)
    for row, stage in enumerate(STAGES):
        _boxes(draw, 172 + 92 * row, stage, arrow=row > 0)
    _text(draw, 562, "needs downloads, offered when it opens", 22, FAINT)
    return whole


def _boxes(draw: Any, top: int, names: tuple[str, ...], arrow: bool) -> None:
    """One stage: its parts side by side."""
    width = 400 // len(names)
    for column, name in enumerate(names):
        left = 96 + column * width + GAP
        draw.rounded_rectangle((left, top, left + width - 2 * GAP, top + 62), 12, PAPER, FAINT, 2)
        _text(draw, top + 31, name, 28, INK, left + width // 2 - GAP)
    if arrow:
        draw.line((SIDE // 2, top - 28, SIDE // 2, top - 4), FAINT, 3)


def _text(draw: Any, middle: int, text: str, size: int, colour: str, centre: int = SIDE // 2) -> None:
    from PIL import ImageFont

    draw.text((centre, middle), text, colour, ImageFont.load_default(size), anchor="mm")


if __name__ == "__main__":
    main()
