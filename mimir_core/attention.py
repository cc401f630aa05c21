"""One attention signature for every network, and the choice of a backend with its reason.

Shapes: B batch, H heads, L query tokens, M key tokens, D head width. All tensors are (B, H, L, D); they
may be strided views, so a caller that splits heads with `view(B, L, H, D).transpose(1, 2)` copies nothing.
"""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)
_logged: set[str] = set()

REMEDY = "install the xformers build made for this torch, or uninstall it"


class Attention(Protocol):
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """q (B, H, L, D), k and v (B, H, M, D) -> (B, H, L, D).

        mask: broadcastable to (B, H, L, M); bool (True attends) or a float bias.
        options: opaque, from the caller of the model's forward; read only by a host's attention.
        """
        ...


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, options: Mapping[str, Any] | None = None
) -> Tensor:
    """PyTorch's own kernels (flash, memory-efficient, cuDNN or plain maths, as it sees fit)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def xformers_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, options: Mapping[str, Any] | None = None
) -> Tensor:
    """xFormers, whose native layout is (B, L, H, D): the transposes are views. Masked calls go to `sdpa`."""
    if mask is not None:  # xFormers wants an aligned, expanded bias, and only the language model masks
        return sdpa(q, k, v, mask=mask)
    import xformers.ops as xops

    out = xops.memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def choose_attention(device: torch.device | str) -> tuple[Attention, str]:
    """The fastest attention that works on `device`, and the reason as a sentence, also logged once."""
    chosen, reason = _choose(torch.device(device))
    if reason not in _logged:
        _logged.add(reason)
        log.info(reason)
    return chosen, reason


def _choose(device: torch.device) -> tuple[Attention, str]:
    if device.type != "cuda":
        return sdpa, f"Attention: PyTorch SDPA, because xFormers has no kernels for {device.type}."
    problem = _xformers_problem(device)
    if problem is None:
        return xformers_attention, "Attention: xFormers, tried on this GPU and working."
    return sdpa, f"Attention: PyTorch SDPA, because {problem}."


def _xformers_problem(device: torch.device) -> str | None:
    """Why xFormers cannot serve `device`, with the remedy; None when a small call gave the right numbers."""
    try:
        import xformers.ops  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "xformers":
            return "xFormers is not installed (it is optional)"
        return f"xFormers does not import ({error}); {REMEDY}"
    except Exception as error:  # noqa: BLE001  OSError, RuntimeError ... of a build for another torch
        return f"xFormers does not import ({type(error).__name__}: {_first_line(error)}); {REMEDY}"
    try:
        q = torch.linspace(-1, 1, 32 * 2 * 64, device=device, dtype=torch.float16).view(1, 2, 32, 64)
        off = (xformers_attention(q, q, q) - sdpa(q, q, q)).abs().max().item()
    except Exception as error:  # noqa: BLE001  no kernel for this device or build
        return f"xFormers cannot run on this device ({type(error).__name__}: {_first_line(error)}); {REMEDY}"
    return None if off < 1e-2 else f"xFormers gives wrong numbers here (off by {off:.2g}); {REMEDY}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
