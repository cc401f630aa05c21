"""Latents to frames and back."""

from typing import Any

from comfy_api.latest import io

from .host import vae as host_vae
from .host.report import say
from .types import schema, widget


class MimirVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirVAEDecode",
            "VAE Decode (Mimir)",
            "Turns a latent video into frames, for Create Video. Whole is exact; in tiles it needs a "
            "fraction of the memory.",
            inputs=[
                widget(
                    io.Vae,
                    "vae",
                    tooltip="From Load CogVideoX VAE or Load Mimir Tiny; core's VAE loader works too.",
                ),
                widget(io.Latent, "latent", tooltip="From a sampler."),
                widget(
                    io.Combo,
                    "tiling",
                    options=list(host_vae.TILINGS),
                    default="auto",
                    tooltip=(
                        "auto: whole where it fits, in tiles where it does not. on: always in tiles. off: "
                        "whole, or an error."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image", display_name="IMAGE", tooltip="All frames of all videos, one after the other."
                )
            ],
            search_aliases=["video decode"],
        )

    @classmethod
    def execute(cls, vae: Any, latent: Any, tiling: host_vae.Tiling) -> io.NodeOutput:
        frames, report = host_vae.decode(vae, latent["samples"], tiling)
        return io.NodeOutput(frames, ui=say(report))


class MimirVAEEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MimirVAEEncode",
            "VAE Encode (Mimir)",
            "Turns the frames of a video into a latent, to vary it with a sampler at denoise below 1.",
            inputs=[
                widget(io.Vae, "vae", tooltip="The VAE of the model that will sample."),
                widget(
                    io.Image,
                    "image",
                    tooltip=(
                        "The frames of one video: width and height multiples of 16, 1, 9, 17 ... 49 frames."
                    ),
                ),
                widget(
                    io.Combo,
                    "tiling",
                    options=list(host_vae.TILINGS),
                    default="auto",
                    tooltip=(
                        "auto: whole where it fits, in tiles where it does not. on: always in tiles. off: "
                        "whole, or an error."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent", display_name="LATENT", tooltip="For Mimir DiT Sampler with denoise below 1."
                )
            ],
            search_aliases=["video encode"],
        )

    @classmethod
    def execute(cls, vae: Any, image: Any, tiling: host_vae.Tiling) -> io.NodeOutput:
        samples, report = host_vae.encode(vae, image, tiling)
        return io.NodeOutput({"samples": samples}, ui=say(report))
