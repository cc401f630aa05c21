"""Measures Mimir Tiny with the exact detector: `python -m mimir_core.tiny.evaluate`.

The 400 scenes, captions and seeds are fixed in prompts.json; no training set holds any of the scenes. Every
style is generated twice from the same noise: from the fused condition, and from T5 alone, either with the
same weights or (--control) with a DiT that was trained alike but without the language model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import weights
from ..diffusion import cfg_schedule, trailing_timesteps
from ..pipeline import Models, condition
from ..sampling import SAMPLERS, guided
from .captions import STYLES, caption
from .detector import judge
from .parts import WEIGHTS, load_parts
from .world import FRAMES, SIZE, Scene, Thing, random_scene, render, stage

PROMPTS = Path(__file__).parent / "prompts.json"
SHARES = {"one": 120, "light": 60, "count": 80, "pair": 20, "relation": 80, "order": 40}
STEPS, CFG, ANSWER = 25, 2.0, 32  # cfg was chosen on scenes of the training set

# name: (which scenes, which verdict)
METRICS: dict[str, tuple[Callable[[Scene], bool], str]] = {
    "colour of one object": (lambda s: s.kind in ("one", "light"), "colour"),
    "motion of one object": (lambda s: s.kind in ("one", "light"), "motion"),
    "day and night": (lambda s: s.kind == "light", "light"),
    "count (two or three alike)": (lambda s: s.kind == "count", "count"),
    "shape of one object": (lambda s: s.kind in ("one", "light"), "shape"),
    "both colours of two objects": (lambda s: len(s.things) == 2, "colour"),
    "which of two has which colour": (lambda s: len(s.things) == 2, "binding"),
    "relation of two objects": (lambda s: s.kind == "relation", "relation"),
    "which of two appears first": (lambda s: s.kind == "order", "order"),
    "everything about two or three": (lambda s: len(s.things) == 2 or s.count > 1, "all"),
    "everything the caption says": (lambda s: True, "all"),
}


@dataclass(frozen=True)
class Prompt:
    """A scene, its caption in every style, and the seed of its noise."""

    scene: Scene
    captions: dict[str, str]
    seed: int


def make_prompts(seed: int = 2412) -> list[Prompt]:
    """The fixed list, as it was first written to prompts.json."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, kind, held_out=True) for kind, share in SHARES.items() for _ in range(share)]
    return [
        Prompt(s, {style: caption(s, style, rng) for style in STYLES}, seed + i) for i, s in enumerate(scenes)
    ]


def load_prompts(path: Path = PROMPTS) -> list[Prompt]:
    """The list in prompts.json."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        row["scene"]["things"] = tuple(Thing(**t) for t in row["scene"]["things"])
    return [Prompt(Scene(**row["scene"]), row["captions"], row["seed"]) for row in rows]


def save_prompts(prompts: Sequence[Prompt], path: Path = PROMPTS) -> None:
    """One prompt a line, for readable differences."""
    lines = ",\n".join(json.dumps(asdict(p), sort_keys=True) for p in prompts)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


@torch.no_grad()
def generate(
    parts: Models,
    prompts: Sequence[str],
    seeds: Sequence[int],
    fused: bool,
    steps: int = STEPS,
    scale: float = CFG,
) -> Tensor:
    """(B, 3, F, H, W) in -1..1. Noise depends on the seed alone."""
    strength = 1.0 if fused else 0.0
    positive = torch.cat([condition(parts, prompt, strength, ANSWER) for prompt in prompts])
    negative = condition(parts, "", strength, ANSWER)
    shape = (parts.transformer.config.in_channels, (FRAMES - 1) // 4 + 1, SIZE // 8, SIZE // 8)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    timesteps = trailing_timesteps(steps, parts.diffusion)
    denoise = guided(parts.transformer, positive, negative, cfg_schedule("constant", scale, timesteps))
    latents = SAMPLERS["ddim"](denoise, noise.to(positive.device), timesteps, schedule=parts.diffusion)
    with torch.autocast(positive.device.type, torch.bfloat16):  # half the time, the same scores
        return parts.vae.decode(latents / parts.diffusion.latent_scale).sample.float().cpu()


def score(prompts: Sequence[Prompt], videos: Tensor) -> dict[str, float]:
    """Share of scenes that each metric finds right."""
    marks = defaultdict(list)
    for prompt, video in zip(prompts, videos, strict=True):
        verdict = judge(video, prompt.scene)
        for name, (applies, key) in METRICS.items():
            if applies(prompt.scene):
                marks[name].append(verdict[key])
    return {name: sum(marks[name]) / len(marks[name]) for name in METRICS if marks[name]}


def rendered_truth(prompts: Sequence[Prompt]) -> Tensor:
    """What the renderer makes of the scenes: the detector's own ceiling."""
    return render([stage(p.scene, random.Random(p.seed)) for p in prompts])


def evaluate(
    parts: Models, control: Models | None, prompts: Sequence[Prompt], styles: Sequence[str], batch: int = 20
) -> dict[str, dict]:
    """{"truth": metrics, "simple/fused": metrics, "simple/t5": metrics, ...}; with a control "simple/control"
    in place of "simple/t5".
    """
    results = {"truth": score(prompts, rendered_truth(prompts))}
    alone = ("t5", parts) if control is None else ("control", control)
    for style in styles:
        for name, models in (("fused", parts), alone):
            videos = []
            for i in range(0, len(prompts), batch):
                part = prompts[i : i + batch]
                texts, seeds = [p.captions[style] for p in part], [p.seed for p in part]
                videos.append(generate(models, texts, seeds, fused=name == "fused"))
            results[f"{style}/{name}"] = score(prompts, torch.cat(videos))
            print(f"{style}/{name}: {json.dumps(results[f'{style}/{name}'])}", flush=True)
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: a row per metric, a column per condition, in per cent."""
    columns = list(results)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in METRICS:
        cells = [f"{100 * results[c][name]:.0f}" if name in results[c] else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def contact_sheet(
    videos: Tensor, captions: Sequence[str], path: Path, columns: int = 3, zoom: int = 2
) -> None:
    """Every clip as a strip of five frames with its caption below."""
    from PIL import Image, ImageDraw

    frames = [0, 2, 4, 6, 8]
    width, height, margin = zoom * SIZE * len(frames), zoom * SIZE, 22
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * (width + 12) + 12, rows * (height + margin + 8) + 12), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (video, text) in enumerate(zip(videos, captions, strict=True)):
        x = 12 + (i % columns) * (width + 12)
        y = 12 + (i // columns) * (height + margin + 8)
        strip = torch.cat([video[:, f] for f in frames], dim=2)  # (3, H, 5 W)
        pixels = ((strip.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + height + 4), text, fill="black", font_size=14)
    sheet.save(path, quality=88)


def sheet_of(
    parts: Models, prompts: Sequence[Prompt], path: Path, style: str = "simple", number: int = 18
) -> None:
    """A contact sheet of prompts spread evenly over the list, the fused condition, nothing chosen by hand."""
    chosen = [prompts[i * len(prompts) // number] for i in range(number)]
    captions = [p.captions[style] for p in chosen]
    contact_sheet(generate(parts, captions, [p.seed for p in chosen], fused=True), captions, path)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with the parts")
    parser.add_argument("--control", type=Path, help="a DiT trained without the language model, to compare")
    parser.add_argument("--styles", nargs="+", default=STYLES, choices=STYLES)
    parser.add_argument("--every", type=int, default=1, help="take every n-th prompt, for a quick look")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="where to keep the results, as JSON; others in it stay")
    parser.add_argument("--sheet", type=Path, help="where to draw some of the videos")
    options = parser.parse_args()
    began = time.perf_counter()
    prompts = load_prompts()[:: options.every]
    parts = load_parts(options.weights, options.device)
    control = None
    if options.control:
        transformer, _ = weights.load_transformer(options.control, options.device, torch.float32)
        control = replace(parts, transformer=transformer)
    results = evaluate(parts, control, prompts, options.styles)
    print(table(results))
    seconds = time.perf_counter() - began
    print(f"{len(prompts)} prompts, {STEPS} steps, cfg {CFG}, {seconds:.0f} s on {options.device}")
    if options.out:
        write_results(options.out, options.weights, len(prompts), results)
    if options.sheet:
        sheet_of(parts, prompts, options.sheet)


def write_results(path: Path, folder: Path, prompts: int, results: dict[str, dict[str, float]]) -> None:
    """The measurement as JSON; other styles measured on the same weights stay in the file."""
    digest = hashlib.sha256((folder / "transformer.safetensors").read_bytes()).hexdigest()[:16]
    settings = {"weights": digest, "prompts": prompts, "steps": STEPS, "cfg": CFG}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = known if settings.items() <= known.items() else {}
    path.write_text(json.dumps({**same, **settings, **results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
