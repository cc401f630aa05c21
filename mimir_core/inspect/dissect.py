"""One fusion taken apart: its tensors, their norms, what each branch contributes, how values are spread.

    share of the language model at a position = |e_beta| / (|e_theta| + |e_beta|), T5 has the rest

Norms are Euclidean. Where both vectors are zero nothing was added, and the share is T5's.
Letters: n text tokens, L language model tokens, K instructions, Dt text width, Dl language model width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import FUSER_PRESETS, FuserConfig
from ..fuser import TokenFuser
from ..tokens import LlmTokens

BINS = 48


@dataclass(frozen=True)
class Fusion:
    """The tensors of one fusion (the first of a batch), float32 on the CPU."""

    config: FuserConfig
    text: Tensor  # (n, Dt) what T5 gave
    raw: Tensor  # (L, Dl) what the language model gave, those kinds of tokens that the fuser reads
    normed: Tensor  # (L, Dl) after Norm and scale
    encoder: Tensor  # (n, Dt) e_theta
    decoder: Tensor  # (n, Dt) e_beta, zero where it adds nothing
    fused: Tensor  # (n, Dt), or (n + K, Dt) with the instruction tokens: what the DiT reads
    content: Tensor  # (K, Dt) e_i, zero when not appended
    learned: Tensor  # (K, Dt) e_l, zero when not appended
    reached: int  # how many of the L tokens are in the sum: the first ones


@torch.no_grad()
def dissect(
    module: TokenFuser | None,
    text: Tensor,
    tokens: LlmTokens,
    preset: str = "mimir",
    strength: float = 1.0,
    device: torch.device | str = "cpu",
) -> Fusion:
    """What `module` makes of text (B, n, Dt) and the tokens.

    Without a module, or at strength 0, T5's condition passes unchanged, and Norm is that of a fresh fuser, as
    `preset` has it. ValueError where widths or the number of instructions do not fit.
    """
    text = text[:1].to(device, torch.float32)
    if module is None or strength == 0:
        return _passed(FUSER_PRESETS.get(preset, FuserConfig()), text, tokens)
    config, gain = module.config, tokens.weights(module.config.llm_tokens)
    raw, instruction = (
        tensor[:1].to(device, torch.float32)
        for tensor in (tokens.sequence(config.llm_tokens), tokens.instruction)
    )
    gain = None if gain is None else gain[:1].to(device, torch.float32)
    fused = module(text, raw, instruction, gain, strength)
    encoder, added = module.branches(text, raw, gain, strength)
    content = learned = text.new_zeros(instruction.shape[1], text.shape[2])
    if config.stabilizer:
        content, learned = (strength * part for part in module.stabilized(instruction))
    return Fusion(
        config=config,
        text=text[0].cpu(),
        raw=raw[0].cpu(),
        normed=module.normed(raw)[0].cpu(),
        encoder=encoder[0].cpu(),
        decoder=(torch.zeros_like(encoder) if added is None else added)[0].cpu(),
        fused=fused[0].cpu(),
        content=content.reshape(learned.shape).cpu(),
        learned=learned.cpu(),
        reached=0 if added is None else min(raw.shape[1], text.shape[1]),
    )


def _passed(config: FuserConfig, text: Tensor, tokens: LlmTokens) -> Fusion:
    """The fusion that adds nothing."""
    text, raw = text[0].cpu(), tokens.sequence(config.llm_tokens)[0].float().cpu()
    nothing = torch.zeros(tokens.instruction.shape[1], text.shape[1])
    normed = _fresh(config, raw)
    return Fusion(config, text, raw, normed, text, torch.zeros_like(text), text, nothing, nothing, reached=0)


def _fresh(config: FuserConfig, hidden: Tensor) -> Tensor:
    """Norm and scale as they are before training."""
    if not config.norm:
        return hidden
    return config.scale_init * torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], eps=config.norm_eps)


def norms(tokens: Tensor) -> list[float]:
    """The norm of each row."""
    return [rounded(value) for value in tokens.norm(dim=-1).tolist()]


def llm_shares(encoder: Tensor, decoder: Tensor) -> list[float]:
    """The language model's share at each position, from e_theta and e_beta (n, Dt)."""
    ours, theirs = decoder.double().norm(dim=-1), encoder.double().norm(dim=-1)
    total = ours + theirs
    share = torch.where(total > 0, ours / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return [round(value, 6) for value in share.tolist()]


def histogram(values: Tensor) -> dict[str, Any]:
    """Mean, population standard deviation, range and BINS equal bins between, of all values of a tensor."""
    flat = values.reshape(-1).float()
    if flat.numel() == 0:
        return {"mean": 0.0, "std": 0.0, "min": 0.0, "max": 0.0, "values": 0, "edges": [], "counts": []}
    low, high = flat.min().item(), flat.max().item()
    span = (low, high) if high > low else (low - 0.5, high + 0.5)
    counts, edges = torch.histogram(flat, BINS, range=span)
    exact = flat.double()
    moments = {"mean": exact.mean(), "std": exact.std(unbiased=False), "min": exact.min(), "max": exact.max()}
    return {
        **{name: rounded(value.item()) for name, value in moments.items()},
        "values": flat.numel(),
        "edges": [rounded(edge) for edge in edges.tolist()],
        "counts": [int(count) for count in counts.tolist()],
    }


def range_ratio(llm: dict[str, Any], t5: dict[str, Any]) -> float | None:
    """How many times as wide the language model's range is as T5's; None without values or T5's width."""
    width = t5["max"] - t5["min"]
    return rounded((llm["max"] - llm["min"]) / width) if width > 0 and llm["values"] else None


def rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")
