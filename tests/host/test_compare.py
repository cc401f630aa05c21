"""Compare Fusions in the queue: the grid shows what each variant makes alone, and shares what it can."""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from launcher.client import Client, File
from launcher.console import Failure

from .graph import Graph, Ref

SETTINGS: dict[str, Any] = {
    "seed": 7, "steps": 3, "cfg": 2.0, "dynamic_cfg": "off", "sampler_name": "euler", "scheduler": "simple",
}  # fmt: skip
FACTOR = 3  # 64 pixels are shown as 192


class Compared(Graph):
    """Mimir Tiny up to both readings of both prompts."""

    def __init__(self, host: Client, text: str = "a red circle moves left") -> None:
        super().__init__(host)
        loaded = self.add("MimirLoadTiny", fuser_preset="mimir")[0]
        self.model, self.t5, self.phi, self.fuser, self.vae = ([loaded, output] for output in range(5))
        self.positive, self.positive_tokens = self.read(text)
        self.negative, self.negative_tokens = self.read(f"not {text}")  # nobody else has it in the cache
        self.latent = self.add("MimirEmptyLatent", width=64, height=64, frames=9, batch=1)

    def read(self, text: str) -> tuple[Ref, Ref]:
        tokens = self.add(
            "MimirPhiEncode", clip=self.phi, text=text, instructions="a\nb\nc\nd", answer_length=4,
            temperature=0.0, seed=0, layer=-1,
        )  # fmt: skip
        return self.add("MimirT5Encode", clip=self.t5, text=text), tokens

    def all_in_one(self, *variants: str) -> Ref:
        names = "model positive positive_tokens negative negative_tokens fuser vae latent".split()
        links = {name: getattr(self, name) for name in names}
        return self.add(
            "MimirCompareFusions", variants="\n".join(variants), columns=0, **links, **SETTINGS
        )

    def alone(self, preset: str, strength: float) -> Ref:
        """The frames of one variant, in the nodes that a person would use, with core's sampler and decode."""
        fused = [
            self.add(
                "MimirTokenFuser", conditioning=text, tokens=tokens, fuser=self.fuser, preset=preset,
                strength=strength, start=0.0, end=1.0,
            )
            for text, tokens in ((self.positive, self.positive_tokens), (self.negative, self.negative_tokens))
        ]  # fmt: skip
        settings = {name: value for name, value in SETTINGS.items() if name != "dynamic_cfg"}
        samples = self.add(
            "KSampler", model=self.model, positive=fused[0], negative=fused[1], latent_image=self.latent,
            denoise=1.0, **settings,
        )  # fmt: skip
        return self.add("VAEDecode", samples=samples, vae=self.vae)

    def frames(self, **images: Ref) -> dict[str, torch.Tensor]:
        """(F, H, W, 3) uint8 by name, as core's SaveImage wrote them; `seconds` has what was executed."""
        for name, link in images.items():
            inputs = {"images": link, "filename_prefix": f"compare/{name}"}
            self.prompt[name] = {"class_type": "SaveImage", "inputs": inputs}
        run = self.host.run(self.prompt)
        self.seconds = run.seconds
        return {name: self.pictures(run.outputs[name]["images"]) for name in images}

    def pictures(self, entries: list[Any]) -> torch.Tensor:
        opened = [Image.open(io.BytesIO(self.host.view(File(**entry)))).convert("RGB") for entry in entries]
        return torch.from_numpy(numpy.stack([numpy.asarray(image) for image in opened]))


def cells(grid: torch.Tensor, video: torch.Tensor) -> int:
    """How many cells of the grid are `video`, in every frame and pixel."""
    large = video.repeat_interleave(FACTOR, 1).repeat_interleave(FACTOR, 2)
    height, width = large.shape[1:3]
    corners = (grid[0] == large[0, 0, 0]).all(-1).nonzero().tolist()
    return sum(torch.equal(grid[:, y : y + height, x : x + width], large) for y, x in corners)


def test_the_grid_shows_what_each_variant_makes_alone(host: Client) -> None:
    graph = Compared(host, "a cyan triangle moves down")
    found = graph.frames(
        grid=graph.all_in_one("T5 only", "decoder_only", "norm_ss", "mimir"),
        plain=graph.alone("as trained", 0.0),
        raw=graph.alone("decoder_only", 1.0),
        norm_ss=graph.alone("norm_ss", 1.0),
        full=graph.alone("as trained", 1.0),
    )
    grid = found.pop("grid")
    assert len(grid) == 9 and grid.shape[1] % 2 == grid.shape[2] % 2 == 0
    for name, video in found.items():
        assert cells(grid, video) == 1, name
    executed = [graph.prompt[node]["class_type"] for node in graph.seconds if node in graph.prompt]
    assert executed.count("MimirPhiEncode") == executed.count("MimirT5Encode") == 2


def test_a_fused_condition_is_refused(host: Client) -> None:
    """Else the cell 'T5 only' would show the fused one."""
    graph = Compared(host, "a green circle moves up")
    graph.positive = graph.add(
        "MimirTokenFuser", conditioning=graph.positive, tokens=graph.positive_tokens, fuser=graph.fuser,
        preset="as trained", strength=1.0, start=0.0, end=1.0,
    )  # fmt: skip
    with pytest.raises(Failure, match="been through Token Fuser already. Connect that of T5 Encode"):
        graph.frames(grid=graph.all_in_one("T5 only", "mimir"))


def test_another_variant_leaves_the_others_as_they_are(host: Client) -> None:
    graph = Compared(host, "a blue square moves up")
    graph.frames(grid=graph.all_in_one("T5 only", "mimir"))
    assert samplers(graph) == {"T5 only", "mimir"}
    graph = Compared(host, "a blue square moves up")
    graph.frames(grid=graph.all_in_one("T5 only", "norm", "mimir"))
    assert samplers(graph) == {"norm"}


def samplers(graph: Compared) -> set[str]:
    """The variants that the last run has sampled."""
    return {node.split(".")[-1].removesuffix(" sampler") for node in graph.seconds if "sampler" in node}


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        (["T5 only", "best"], "variants has 'best', expected one per line of: T5 only, as trained"),
        (["norm", "norm"], "the same line twice"),
        ([""], "0 lines, expected 1 to 8"),
    ],
)
def test_unknown_variants_are_refused_before_anything_runs(host: Client, variants, words) -> None:
    graph = Compared(host)
    with pytest.raises(Failure, match=words):
        graph.frames(grid=graph.all_in_one(*variants))


def test_images_of_any_node_side_by_side(host: Client) -> None:
    graph = Compared(host)
    sizes = {"a": 3 * 65536, "c": 200}
    small = {"width": 200, "height": 100, "batch_size": 3}
    colours: dict[str, Any] = {
        name: graph.add("EmptyImage", color=colour, **small) for name, colour in sizes.items()
    }
    wide = graph.add("EmptyImage", width=256, height=100, batch_size=2, color=9)
    grid = graph.add("MimirCompare", labels="one\n<b>two</b>\nthree", columns=3, b=wide, **colours)
    (found,) = graph.frames(grid=grid).values()
    assert found.shape == (3, found.shape[1], 3 * (256 + 4) + 4, 3)
    assert (found == torch.tensor([3, 0, 0])).all(-1).sum() == 3 * 200 * 100
    bad = graph.add("MimirCompare", labels="one", columns=3, a=wide, b=wide)
    with pytest.raises(Failure, match="1 labels for 2 videos"):
        graph.frames(grid=bad)
