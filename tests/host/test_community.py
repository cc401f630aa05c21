"""Core's samplers, guiders, conditions and MODEL patches around ours, as queued graphs on the real host.

Where theory says that two graphs give the same latent, they must: core's SaveLatent brings the tensors here.
What a queued graph cannot show is in inprocess/test_community.py; models from files: test_other_models.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launcher.client import Client
from launcher.server import Server
from mimir_core.config import DiffusionConfig
from mimir_core.diffusion import alphas_cumprod

from .graph import Graph, Ref, relative

STEPS, CFG, SEED = 6, 2.0, 7


class Tiny(Graph):
    """Mimir Tiny up to its two conditions: the positive one is fused (68 tokens), the negative T5's (64)."""

    def __init__(self, host: Client) -> None:
        super().__init__(host)
        loaded = self.add("MimirLoadTiny", fuser_preset="mimir")[0]
        self.model, self.t5, self.phi, self.fuser, self.vae = ([loaded, output] for output in range(5))
        self.positive = self.fuse("a red circle moves left")
        self.negative = self.add("MimirT5Encode", clip=self.t5, text="")
        self.empty = self.canvas(9)

    def canvas(self, frames: int) -> Ref:
        return self.add("MimirEmptyLatent", width=64, height=64, frames=frames, batch=1)

    def fuse(self, text: str) -> Ref:
        tokens = self.add(
            "MimirPhiEncode", clip=self.phi, text=text, instructions="a\nb\nc\nd", answer_length=0,
            temperature=0.0, seed=0, layer=-1,
        )  # fmt: skip
        alone = self.add("MimirT5Encode", clip=self.t5, text=text)
        return self.add(
            "MimirTokenFuser", conditioning=alone, tokens=tokens, fuser=self.fuser, preset="as trained",
            strength=1.0, start=0.0, end=1.0,
        )  # fmt: skip

    def ksampler(self, **changed: Any) -> Ref:
        inputs = {
            "model": self.model, "positive": self.positive, "negative": self.negative,
            "latent_image": self.empty, "seed": SEED, "steps": STEPS, "cfg": CFG, "sampler_name": "euler",
            "scheduler": "simple", "denoise": 1.0,
        }  # fmt: skip
        return self.add("KSampler", **{**inputs, **changed})

    def advanced(self, **changed: Any) -> Ref:
        inputs = {
            "model": self.model, "positive": self.positive, "negative": self.negative,
            "latent_image": self.empty, "add_noise": "enable", "noise_seed": SEED, "steps": STEPS, "cfg": CFG,
            "sampler_name": "euler", "scheduler": "simple", "start_at_step": 0, "end_at_step": 10000,
            "return_with_leftover_noise": "disable",
        }  # fmt: skip
        return self.add("KSamplerAdvanced", **{**inputs, **changed})

    def sigmas(self, **changed: Any) -> Ref:
        inputs = {"model": self.model, "scheduler": "simple", "steps": STEPS, "denoise": 1.0}
        return self.add("BasicScheduler", **{**inputs, **changed})

    def custom(self, sigmas: Ref, latent: Ref | None = None, noise: bool = True, output: int = 0) -> Ref:
        """SamplerCustomAdvanced with CFGGuider."""
        guider = self.add(
            "CFGGuider", model=self.model, positive=self.positive, negative=self.negative, cfg=CFG
        )
        return self.add(
            "SamplerCustomAdvanced",
            output,
            noise=self.add("RandomNoise", noise_seed=SEED) if noise else self.add("DisableNoise"),
            guider=guider,
            sampler=self.add("KSamplerSelect", sampler_name="euler"),
            sigmas=sigmas,
            latent_image=latent or self.empty,
        )


@pytest.fixture
def tiny(host: Client) -> Tiny:
    return Tiny(host)


def finite(video: torch.Tensor, frames: int = 3) -> bool:
    return video.shape == (1, 16, frames, 8, 8) and bool(torch.isfinite(video).all() and video.std() > 0.01)


def test_every_sampler_node_gives_what_ksampler_gives(tiny: Tiny) -> None:
    ours = tiny.add(
        "MimirSampler", model=tiny.model, positive=tiny.positive, negative=tiny.negative, latent=tiny.empty,
        seed=SEED, steps=STEPS, cfg=CFG, dynamic_cfg="off", sampler_name="euler", scheduler="simple",
        denoise=1.0,
    )  # fmt: skip
    sampler = tiny.add("KSamplerSelect", sampler_name="euler")
    custom = tiny.add(
        "SamplerCustom", model=tiny.model, add_noise=True, noise_seed=SEED, cfg=CFG, positive=tiny.positive,
        negative=tiny.negative, sampler=sampler, sigmas=tiny.sigmas(), latent_image=tiny.empty,
    )  # fmt: skip
    found = tiny.run(
        core=tiny.ksampler(),
        ours=ours,
        custom=custom,
        advanced=tiny.advanced(),
        guided=tiny.custom(tiny.sigmas()),
    )
    assert finite(found["core"])
    for name, video in found.items():
        assert torch.equal(video, found["core"]), name


def test_a_run_in_two_parts_is_the_whole(tiny: Tiny) -> None:
    first = tiny.advanced(end_at_step=3, return_with_leftover_noise="enable")
    second = tiny.advanced(latent_image=first, add_noise="disable", start_at_step=3)
    high = tiny.add("SplitSigmas", sigmas=tiny.sigmas(), step=3)
    begun = tiny.custom(high)
    split = tiny.custom([high[0], 1], latent=begun, noise=False)
    found = tiny.run(whole=tiny.ksampler(), first=first, parts=second, split=split)
    assert relative(found["parts"], found["whole"]) < 1e-5
    assert relative(found["split"], found["whole"]) < 1e-5
    assert relative(found["first"], found["whole"]) > 0.1


def test_sigmas_of_every_kind(tiny: Tiny, object_info: dict[str, Any]) -> None:
    kinds = {
        "turbo": tiny.add("SDTurboScheduler", model=tiny.model, steps=4, denoise=1.0),
        "beta": tiny.add("BetaSamplingScheduler", model=tiny.model, steps=STEPS, alpha=0.6, beta=0.6),
        "uniform": tiny.sigmas(scheduler="sgm_uniform"),
        "normal": tiny.sigmas(scheduler="normal"),
    }
    if "ManualSigmas" in object_info:  # 0.33
        kinds["manual"] = tiny.add(
            "ManualSigmas", sigmas=", ".join(f"{value:.9f}" for value in simple_sigmas())
        )
    graphs = {name: tiny.custom(sigmas) for name, sigmas in kinds.items()}
    found = tiny.run(core=tiny.ksampler(), **graphs)
    assert all(finite(video) for video in found.values())
    if "manual" in found:
        assert relative(found["manual"], found["core"]) < 1e-4


def simple_sigmas() -> list[float]:
    """The scheduler "simple" over CogVideoX's schedule: every n-th of the thousand from the end, then 0."""
    signal = alphas_cumprod(DiffusionConfig()).double().clone()
    signal[-1] = 4.8973451890853435e-08  # the host's stand-in for zero
    sigmas = ((1 - signal) / signal).sqrt().tolist()
    return [sigmas[-1 - int(step * len(sigmas) / STEPS)] for step in range(STEPS)] + [0.0]


def test_video_to_video(tiny: Tiny) -> None:
    """Half of twice the steps, whichever node counts them; from frames, through our VAE Encode."""
    video = tiny.ksampler(cfg=1.0)
    frames = tiny.add("MimirVAEDecode", vae=tiny.vae, latent=video, tiling="off")
    source = tiny.add("MimirVAEEncode", vae=tiny.vae, image=frames, tiling="off")
    half = tiny.add("SplitSigmasDenoise", 1, sigmas=tiny.sigmas(steps=2 * STEPS), denoise=0.5)
    found = tiny.run(
        source=source,
        varied=tiny.ksampler(latent_image=source, denoise=0.5),
        scheduled=tiny.custom(tiny.sigmas(denoise=0.5), latent=source),
        halved=tiny.custom(half, latent=source),
        late=tiny.advanced(latent_image=source, steps=2 * STEPS, start_at_step=STEPS),
        new=tiny.ksampler(),
    )
    for name in ("scheduled", "halved", "late"):
        assert torch.equal(found[name], found["varied"]), name
    assert finite(found["varied"])
    assert (
        relative(found["varied"], found["source"]) > 0.05 and relative(found["varied"], found["new"]) > 0.05
    )


def test_conditions_combined_with_themselves_are_themselves(tiny: Tiny) -> None:
    other = tiny.fuse("two blue squares")

    def part(start: float, end: float) -> Ref:
        return tiny.add("ConditioningSetTimestepRange", conditioning=tiny.positive, start=start, end=end)

    def combine(one: Ref, two: Ref) -> Ref:
        return tiny.add("ConditioningCombine", conditioning_1=one, conditioning_2=two)

    def average(weight: float) -> Ref:
        return tiny.add(
            "ConditioningAverage", conditioning_to=tiny.positive, conditioning_from=other,
            conditioning_to_strength=weight,
        )  # fmt: skip

    same = {
        "ranged": part(0.0, 1.0),
        "weighted": average(1.0),
        "twice": combine(tiny.positive, tiny.positive),
        "halves": combine(part(0.0, 0.5), part(0.5, 1.0)),
    }
    changed = {
        "average": average(0.5),
        "combined": combine(tiny.positive, other),
        "changing": combine(part(0.0, 0.5), tiny.add(
            "ConditioningSetTimestepRange", conditioning=other, start=0.5, end=1.0
        )),
    }  # fmt: skip
    zero = {
        name: tiny.add("ConditioningZeroOut", conditioning=condition)
        for name, condition in {"zeroed": tiny.negative, "nothing": tiny.positive}.items()
    }
    graphs = {name: tiny.ksampler(positive=ref) for name, ref in {**same, **changed}.items()}
    graphs |= {name: tiny.ksampler(negative=ref) for name, ref in zero.items()}
    found = tiny.run(plain=tiny.ksampler(), **graphs)
    for name in ("ranged", "weighted"):
        assert torch.equal(found[name], found["plain"]), name
    for name in ("twice", "halves"):
        assert relative(found[name], found["plain"]) < 1e-5, name
    for name in (*changed, "zeroed", "nothing"):
        assert finite(found[name]) and relative(found[name], found["plain"]) > 1e-3, name


def test_caches_that_reuse_nothing_change_nothing(tiny: Tiny, server: Server) -> None:
    def cached(kind: str, threshold: float, start: float = 0.1, end: float = 0.95) -> Ref:
        model = tiny.add(
            kind, model=tiny.model, reuse_threshold=threshold, start_percent=start, end_percent=end,
            verbose=False,
        )  # fmt: skip
        return tiny.ksampler(model=model, steps=12)

    kinds = ("EasyCache", "LazyCache")
    graphs = {f"{kind}_never": cached(kind, 0.0) for kind in kinds}
    graphs |= {f"{kind}_nowhere": cached(kind, 3.0, 0.5, 0.5) for kind in kinds}
    graphs |= {kind: cached(kind, 3.0) for kind in kinds}
    before = len(server.log)
    found = tiny.run(plain=tiny.ksampler(steps=12), **graphs)
    for name, video in found.items():
        assert torch.equal(video, found["plain"]) == (name not in kinds), name
        assert finite(video), name
    log = server.log[before:]
    for kind in kinds:
        assert f"{kind} - skipped 0/12 steps" in log
        assert log.count(f"{kind} - skipped") == 3 and log.count(f"{kind} - skipped 0/12") == 2


def windows(graph: Graph, model: Ref, length: int, overlap: int, schedule: str = "standard_static") -> Ref:
    """Core's Context Windows (Manual) over latent frames."""
    later = graph.known(
        "ContextWindowsManual", freenoise=False, cond_retain_index_list="", split_conds_to_windows=False,
        latent_retain_index_list="", causal_window_fix=True,
    )  # fmt: skip
    return graph.add(
        "ContextWindowsManual", model=model, context_length=length, context_overlap=overlap,
        context_schedule=schedule, context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2, **later,
    )  # fmt: skip


def test_context_windows(tiny: Tiny) -> None:
    """One that holds the video changes nothing; a long video through short ones has its length."""
    long = tiny.canvas(41)
    kind = "WanContextWindowsManual"  # counts frames, four to a latent one
    wide = tiny.add(kind, model=tiny.model, **tiny.known(
        kind, context_length=17, context_overlap=8, context_schedule="standard_uniform", context_stride=1,
        closed_loop=False, fuse_method="pyramid", freenoise=True, retain_first_frame=False,
        split_conds_to_windows=False,
    ))  # fmt: skip
    found = tiny.run(
        plain=tiny.ksampler(),
        whole=tiny.ksampler(model=windows(tiny, tiny.model, 16, 4)),
        long=tiny.ksampler(latent_image=long, model=windows(tiny, tiny.model, 5, 2)),
        loop=tiny.ksampler(latent_image=long, model=windows(tiny, tiny.model, 4, 1, "looped_uniform")),
        wan=tiny.ksampler(latent_image=long, model=wide),
    )
    assert torch.equal(found["whole"], found["plain"])
    assert all(finite(found[name], 11) for name in ("long", "loop", "wan"))


def test_schedule_and_guidance_patches(tiny: Tiny) -> None:
    same = tiny.add("ModelSamplingDiscrete", model=tiny.model, sampling="v_prediction", zsnr=True)
    none = tiny.add("RescaleCFG", model=tiny.model, multiplier=0.0)
    some = tiny.add("RescaleCFG", model=tiny.model, multiplier=0.7)
    found = tiny.run(
        plain=tiny.ksampler(cfg=6.0),
        same=tiny.ksampler(cfg=6.0, model=same),
        none=tiny.ksampler(cfg=6.0, model=none),
        some=tiny.ksampler(cfg=6.0, model=some),
    )
    assert relative(found["same"], found["plain"]) < 1e-3
    assert relative(found["none"], found["plain"]) < 1e-3
    assert finite(found["some"]) and relative(found["some"], found["plain"]) > 1e-2
