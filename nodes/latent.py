"""An empty latent video, and the sizes that a CogVideoX can make."""

from typing import NamedTuple

from comfy_api.latest import io

from .host.latent import empty_latent
from .types import schema, widget


class Range(NamedTuple):
    """Values low, low + step ... high."""

    low: int
    high: int
    step: int
    rule: str

    def problem(self, name: str, value: int | None) -> str:
        """What is wrong with `value`, and the nearest valid ones; empty if nothing. None: not known yet."""
        if value is None or (self.low <= value <= self.high and (value - self.low) % self.step == 0):
            return ""
        below = self.low + (value - self.low) // self.step * self.step
        nearest = sorted({min(max(near, self.low), self.high) for near in (below, below + self.step)})
        use = " or ".join(map(str, nearest))
        return f"{name} is {value}: use {use} ({self.rule}, {self.low} to {self.high})."


SIZE = Range(32, 2048, 16, "a multiple of 16")  # the VAE shrinks by 8, the DiT's patches are 2 x 2
FRAMES = Range(1, 513, 8, "8 times a whole number, plus 1")  # CogVideoX was trained on odd latent counts only


class MimirEmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirEmptyLatent",
            "Empty Mimir Latent Video",
            "The canvas of a new video: its size and its number of frames. CogVideoX 5B and 2B were trained "
            "at 720 x 480 with "
            "49 frames at 8 per second, CogVideoX 1.5 at 1360 x 768 with 81 frames at 16, Mimir Tiny at 64 "
            "x 64 with 9.",
            inputs=[
                widget(
                    io.Int,
                    "width",
                    default=720,
                    min=SIZE.low,
                    max=SIZE.high,
                    step=SIZE.step,
                    tooltip="Pixels, a multiple of 16.",
                ),
                widget(
                    io.Int,
                    "height",
                    default=480,
                    min=SIZE.low,
                    max=SIZE.high,
                    step=SIZE.step,
                    tooltip="Pixels, a multiple of 16.",
                ),
                widget(
                    io.Int,
                    "frames",
                    default=49,
                    min=FRAMES.low,
                    max=FRAMES.high,
                    step=FRAMES.step,
                    tooltip="Frames of the video: 8 times a whole number, plus 1 (1, 9, 17 ... 49 ... 81).",
                ),
                widget(io.Int, "batch", default=1, min=1, max=64, tooltip="How many videos to make at once."),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="LATENT", tooltip="Zeros, to be filled with noise by the sampler."
                )
            ],
            search_aliases=["cogvideox latent", "empty video"],
        )

    @classmethod
    def validate_inputs(cls, width: int | None, height: int | None, frames: int | None) -> bool:
        return require_size(width, height, frames)  # raises: a returned sentence is shown once per argument

    @classmethod
    def execute(cls, width: int, height: int, frames: int, batch: int) -> io.NodeOutput:
        require_size(width, height, frames)  # linked values are not known when inputs are validated
        return io.NodeOutput({"samples": empty_latent(width, height, frames, batch)})


def require_size(width: int | None, height: int | None, frames: int | None) -> bool:
    """True, or a ValueError with everything that is wrong with a video's size, one sentence for each."""
    found = (SIZE.problem("width", width), SIZE.problem("height", height), FRAMES.problem("frames", frames))
    if any(found):
        raise ValueError(" ".join(filter(None, found)))
    return True
