"""The host's attention under the project's signature.

Which kernel runs is the host's choice (its start-up flags, and whatever a node put on the model); all tensors
are (B, H, L, D).
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules import attention as host
from torch import Tensor

log = logging.getLogger(__name__)
_logged: set[str] = set()

# In transformer_options: how many tokens in front of each batch item's sequence are padding, a tuple.
PADDING = "mimir_padding"


def host_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, options: Mapping[str, Any] | None = None
) -> Tensor:
    """q (B, H, L, D), k and v (B, H, M, D) -> (B, H, L, D). `options` is the host's transformer_options."""
    padding = (options or {}).get(PADDING)
    if padding is None:
        return _call(host.optimized_attention, q, k, v, mask, options)
    parts: list[Tensor] = []
    for items, skip in _runs(padding):  # one call for neighbours of one length, each on views
        q_, k_, v_ = (tensor[items, :, skip:] for tensor in (q, k, v))
        out = _call(host.optimized_attention, q_, k_, v_, mask, options)
        parts.append(F.pad(out, (0, 0, skip, 0)))  # the padding's own rows are never looked at
    return torch.cat(parts)


def _runs(padding: Sequence[int]) -> list[tuple[slice, int]]:
    """(0, 0, 4) -> [(items 0 and 1, 0), (item 2, 4)]."""
    found: list[tuple[slice, int]] = []
    for skip, group in groupby(range(len(padding)), key=lambda item: padding[item]):
        items = list(group)
        found.append((slice(items[0], items[-1] + 1), skip))
    return found


def text_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, options: Mapping[str, Any] | None = None
) -> Tensor:
    """The same for a language model: few tokens and a mask, for which the host prefers other kernels."""
    chosen = host.optimized_attention_for_device(q.device, mask=mask is not None, small_input=True)
    return _call(chosen, q, k, v, mask, options)


def log_choice() -> str:
    """Says once which attention the host chose, and why; returns the sentence."""
    name = host.optimized_attention.__name__.removeprefix("attention_")
    reason = f"Attention: {name}, chosen by ComfyUI (change it with ComfyUI's own start-up flags)."
    if reason not in _logged:
        _logged.add(reason)
        log.info("Mimir: %s", reason)
    return reason


def _call(
    function: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Mapping[str, Any] | None
) -> Tensor:
    heads, length = q.shape[1], q.shape[2]
    if mask is not None and mask.dtype == torch.bool:  # the host's kernels disagree on what a bool mask means
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min / 2)
    out = function(
        q,
        k,
        v,
        heads,
        mask=mask,
        skip_reshape=True,
        skip_output_reshape=True,
        transformer_options=options or {},
    )
    if out.ndim == 3:  # 0.3.75's xformers falls back to PyTorch without passing skip_output_reshape on
        out = out.unflatten(-1, (heads, -1)).transpose(1, 2)
    if out.shape[2] != length:
        raise RuntimeError(f"The host's attention returned {tuple(out.shape)} for {length} query tokens.")
    return out
