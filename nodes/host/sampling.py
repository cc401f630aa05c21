"""Sampling through the host's own path: its samplers, schedulers, previews and patches all apply."""

from collections.abc import Callable
from typing import Any

import comfy.samplers
from torch import Tensor

import nodes as host_nodes  # the host's top-level module; this package is reached by relative imports only

from ...mimir_core.diffusion import CFG_CURVES
from ...mimir_core.provenance import RECORD, unlike_training
from .report import require_finite

SAMPLERS: list[str] = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS: list[str] = comfy.samplers.KSampler.SCHEDULERS
OFF = "off"
OVERFLOW = (
    "Load the DiT as bfloat16 or float32 (float16 overflows in CogVideoX 5B), start ComfyUI without a custom "
    "attention, and use cfg below 12."
)
DYNAMIC = {"cosine ramp (SAT)": "cosine_ramp", "diffusers curve": "diffusers"}


def sample(
    model: Any,
    seed: int,
    steps: int,
    cfg: float,
    dynamic: str,
    sampler: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    denoise: float,
) -> dict[str, Any]:
    """What core's KSampler returns for these arguments, with the guidance scale following `dynamic`.

    Raises ValueError when the result holds NaN or infinity.
    """
    if dynamic != OFF:
        model = with_dynamic_cfg(model, dynamic)
    out = host_nodes.common_ksampler(  # pyright: ignore[reportAttributeAccessIssue]  it takes ours for "nodes"
        model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise
    )[0]
    require_finite(out["samples"], "Mimir DiT Sampler", OVERFLOW)
    return out


def strange_base(model: Any, positive: Any) -> str:
    """A warning when a fused condition comes from a fuser that was trained on another DiT; else empty."""
    origin = getattr(model.model, "origin", None)
    for _, options in positive:
        fuser = options.get(RECORD, {}).get("fuser") or {}
        found = unlike_training({"base": fuser.get("base")}, {"base": origin})
        if found:
            return (
                f"Careful: the Token Fuser {fuser.get('file', '')} does not belong to this DiT: {found[0]}."
            )
    return ""


def with_dynamic_cfg(model: Any, dynamic: str) -> Any:
    """A clone of MODEL whose guidance changes with the step; another node's CFG function stays in force."""
    if dynamic not in DYNAMIC:
        raise ValueError(f"dynamic cfg is '{dynamic}', expected one of {', '.join((OFF, *DYNAMIC))}")
    clone = model.clone()
    inner = clone.model_options.get("sampler_cfg_function") or _plain_cfg
    curve = CFG_CURVES[DYNAMIC[dynamic]]
    clone.set_model_sampler_cfg_function(_guide(curve, inner), disable_cfg1_optimization=True)
    return clone


def _guide(
    curve: Callable[[float, int, int, int], float], inner: Callable[[dict[str, Any]], Tensor]
) -> Callable[[dict[str, Any]], Tensor]:
    def guide(args: dict[str, Any]) -> Tensor:
        sigmas = args["model_options"]["transformer_options"]["sample_sigmas"]  # (steps + 1,)
        sigma = args["sigma"].flatten()[0]
        step = int((sigmas[:-1].to(sigma) - sigma).abs().argmin())
        timestep = int(args["model"].model_sampling.timestep(sigma))
        scale = curve(args["cond_scale"], step, len(sigmas) - 1, timestep)
        return inner({**args, "cond_scale": scale})

    return guide


def _plain_cfg(args: dict[str, Any]) -> Tensor:
    """Classifier-free guidance in the host's convention: `cond` and `uncond` are x - denoised."""
    return args["uncond"] + (args["cond"] - args["uncond"]) * args["cond_scale"]
