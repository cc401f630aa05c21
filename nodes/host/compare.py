"""One prompt under several settings of the Token Fuser, as a graph that takes the node's place."""

from typing import Any

from comfy_execution.graph_utils import GraphBuilder

from ...mimir_core.compare import compare, repeated
from ...mimir_core.config import FUSER_PRESETS
from .fuser import AS_TRAINED, PRESETS

T5_ONLY = "T5 only"
NAMES = "abcdefgh"  # of the inputs of MimirCompare
VARIANTS = [T5_ONLY, *PRESETS]
STANDARD = [T5_ONLY, *(name for name in FUSER_PRESETS if name not in ("mimir", "baseline")), "mimir"]
LABELS = {
    "decoder_only": "decoder_only (LLM raw)",
    "mimir": "mimir (full fusion)",
    "baseline": "baseline (no LLM)",
}


def compare_images(images: list[Any], labels: str, columns: int) -> Any:
    """The grid of the connected IMAGEs; without labels their letters. A repeated video is labelled so."""
    names = [letter for letter, image in zip(NAMES, images) if image is not None]
    videos = [image[..., :3].cpu().float() for image in images if image is not None]
    if labels.strip():
        names = _lines(labels, len(videos))
    for index, other in (repeated(videos) if len(names) == len(videos) else {}).items():
        names[index] += f"\n= {names[other] or f'video {other + 1}'}, bit for bit"
    return compare(videos, names, columns)


def _lines(labels: str, count: int) -> list[str]:
    """The labels, one per line and any of them empty; what there is beyond `count` must not be empty."""
    lines = [line.strip() for line in labels.replace("\r\n", "\n").split("\n")]
    while len(lines) > count and "" in (lines[-1], lines[0]):
        lines.pop(0 if lines[-1] else -1)
    return lines


def chosen_variants(text: str) -> list[str]:
    """The variants written in `text`, one per line. ValueError names those that there are."""
    names = [line.strip() for line in text.splitlines() if line.strip()]
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variants has '{unknown[0]}', expected one per line of: {', '.join(VARIANTS)}.")
    if len(set(names)) != len(names):
        raise ValueError("variants has the same line twice: each variant is computed once.")
    if not 1 <= len(names) <= len(NAMES):
        raise ValueError(f"variants has {len(names)} lines, expected 1 to {len(NAMES)}.")
    return names


def expand(variants: str, columns: int, links: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Any]:
    """(the link of the grid, the graph that makes it).

    `links` lead to the outputs that this node's inputs are connected to, so what is connected there is made
    once and each branch is cached by itself; `settings` are Mimir DiT Sampler's.
    """
    graph = GraphBuilder()
    names = chosen_variants(variants)
    images = {letter: _branch(graph, name, links, settings) for letter, name in zip(NAMES, names)}
    labels = "\n".join(LABELS.get(name, name) for name in names)
    grid = graph.node("MimirCompare", id="grid", labels=labels, columns=columns, **images)
    return grid.out(0), graph.finalize()


def _branch(graph: Any, name: str, links: dict[str, Any], settings: dict[str, Any]) -> Any:
    """The link of one variant's frames. Ids are the variants' names: adding one leaves the others cached."""
    chosen = {"preset": AS_TRAINED, "strength": 0.0} if name == T5_ONLY else {"preset": name, "strength": 1.0}
    conditions = {
        side: graph.node(
            "MimirTokenFuser",
            id=f"{name} {side}",
            conditioning=links[side],
            tokens=links[f"{side}_tokens"],
            fuser=links["fuser"],
            start=0.0,
            end=1.0,
            **chosen,
        ).out(0)
        for side in ("positive", "negative")
    }
    samples = graph.node(
        "MimirSampler",
        id=f"{name} sampler",
        model=links["model"],
        latent=links["latent"],
        denoise=1.0,
        **conditions,
        **settings,
    )
    frames = graph.node(
        "MimirVAEDecode", id=f"{name} decode", vae=links["vae"], latent=samples.out(0), tiling="auto"
    )
    return frames.out(0)
