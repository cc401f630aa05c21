"""Where tokens lie: PCA, t-SNE and scatter, as in the paper's Figure 7 a (many prompts) and b (many answers).

Encoder, language model and fused tokens are compared in the DiT's text space: the language model's as the
fuser projects them. Where it adds none of them, untrained or made so, they are as the model gives them, and
the narrower kind is filled up with zeros.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..fuser import TokenFuser
from ..tokens import LlmTokens

FORMAT = 1
PCA, TSNE = "PCA", "t-SNE"
METHODS = [PCA, TSNE, f"{PCA} and {TSNE}"]
MOST = 240  # points of a kind
FEWEST = 5  # points that t-SNE needs
MISSING = (
    "t-SNE needs scikit-learn. Install it with 'pip install scikit-learn' in ComfyUI's Python, or choose PCA."
)


@dataclass(frozen=True)
class Reading:
    """The tokens of one prompt, float32 on the CPU. L tokens of the language model, r of them in the sum."""

    encoder: Tensor  # (p, Dt) T5's, without padding
    query: Tensor  # (Lq, Dl) as the language model gives them
    answer: Tensor  # (La, Dl)
    placed: Mapping[str, Tensor]  # "query" (Lq, D) and "answer" (La, D), in the space of the map
    added: Tensor  # (r, D) those that reach the sum, or would, in the space of the map
    final: Tensor  # (max(p, r), Dt) fused; (p, Dt) where nothing is added
    space: str  # "text", or "raw"
    answer_text: str = ""


@dataclass(frozen=True)
class Cloud:
    """Points of one half of a map: {method: {kind: (P, 2)}}."""

    points: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class TokenMap:
    prompts: Cloud  # Figure 7 a
    runs: Cloud  # Figure 7 b
    numbers: dict[str, Any]


def require_map(prompts: Sequence[str], method: str, runs: int) -> None:
    """ValueError when the map cannot be made, before anything is encoded."""
    if not prompts:
        raise ValueError("prompts is empty: write at least one prompt, one per line.")
    if runs < 2:
        raise ValueError(f"runs is {runs}, expected 2 or more: one run has no scatter.")
    if method not in METHODS:
        raise ValueError(f"method is '{method}', expected one of {', '.join(METHODS)}")
    if TSNE in method:
        _tsne_class()


@torch.no_grad()
def reading(
    module: TokenFuser | None,
    text: Tensor,
    tokens: LlmTokens,
    read: Sequence[int],
    device: torch.device | str = "cpu",
) -> Reading:
    """The tokens of one prompt: text (1, n, Dt), of which T5 read those at `read`."""
    text = text[:1].to(device, torch.float32)
    states = {kind: getattr(tokens, kind)[:1].to(device, torch.float32) for kind in ("query", "answer")}
    learnt = module is not None and module.config.use_llm
    final = text if module is None else _fused(module, text, states)
    if module is None or not learnt:
        space, placed, added = "raw", states, torch.cat([*states.values()], 1)
    else:
        llm = torch.cat([states[kind] for kind in module.config.llm_tokens.split("+")], 1)
        space = "text"
        placed = {kind: module.llm_conv(module.normed(state)) for kind, state in states.items()}
        added = module.llm_conv(module.normed(llm))
    added = added[0, : text.shape[1]].cpu()
    reach = max(len(read), added.shape[0] if learnt else 0)
    return Reading(
        encoder=text[0, list(read)].cpu(),
        query=states["query"][0].cpu(),
        answer=states["answer"][0].cpu(),
        placed={kind: state[0].cpu() for kind, state in placed.items()},
        added=added,
        final=final[0, :reach].cpu(),
        space=space,
        answer_text=tokens.answer_text,
    )


def _fused(module: TokenFuser, text: Tensor, states: Mapping[str, Tensor]) -> Tensor:
    """(1, n, Dt) the fused tokens, without the instruction tokens behind them."""
    llm = torch.cat([states[kind] for kind in module.config.llm_tokens.split("+")], 1)
    nothing = llm.new_zeros(1, module.config.num_instructions, module.config.llm_dim)
    return module(text, llm, nothing)[:, : text.shape[1]]


def token_map(
    over_prompts: Sequence[Reading], over_runs: Sequence[Reading], method: str, seed: int = 0
) -> TokenMap:
    """Both maps and their numbers, the same for the same seed."""
    methods = [name for name in (PCA, TSNE) if name in method]
    kinds_a = {
        "encoder": [reading.encoder for reading in over_prompts],
        "llm": [reading.added for reading in over_prompts],
        "fused": [reading.final for reading in over_prompts],
    }
    kinds_b = {
        "query": [reading.placed["query"] for reading in over_runs],
        "answer": [reading.placed["answer"] for reading in over_runs],
        "final": [reading.final for reading in over_runs],
    }
    first, share_a = _cloud(kinds_a, methods, seed)
    second, share_b = _cloud(kinds_b, methods, seed)
    measured = {
        "query": scatter([reading.query for reading in over_runs]),
        "answer": scatter([reading.answer for reading in over_runs]),
        "final": scatter([reading.final for reading in over_runs]),
    }
    answers = [reading.answer_text for reading in over_runs]
    numbers = {
        "format": FORMAT,
        "space": over_prompts[0].space,
        "methods": methods,
        "runs": len(over_runs),
        "answers": sorted(set(answers)),
        "scatter": measured,
        "tokens": {kind: sum(map(len, rows)) for kind, rows in {**kinds_a, **kinds_b}.items()},
        "gap_encoder_llm": separation(*(torch.cat(widened(kinds_a))[part] for part in _halves(kinds_a))),
        "variance_shown": {"prompts": share_a, "runs": share_b},
    }
    return TokenMap(first, second, numbers)


def _halves(kinds: Mapping[str, Sequence[Tensor]]) -> tuple[slice, slice]:
    """Where the encoder's and the language model's rows are among all."""
    first, second = (sum(map(len, kinds[kind])) for kind in ("encoder", "llm"))
    return slice(0, first), slice(first, first + second)


def scatter(runs: Sequence[Tensor]) -> dict[str, Any]:
    """How far tokens (L, D) of the same place lie from their mean over the runs, against their size.

    {"relative": root mean square distance / root mean square norm, "identical": every run is the first, bit
    for bit}. Runs may be of different length; a place that only one run has does not count, and where there
    is no other, "relative" is None.
    """
    identical = all(torch.equal(run, runs[0]) for run in runs)
    if sum(len(run) > 0 for run in runs) < 2:
        return {"relative": None, "identical": identical}
    distance = size = 0.0
    for place in range(max((len(run) for run in runs), default=0)):
        group = torch.stack([run[place] for run in runs if len(run) > place]).double()
        if len(group) > 1:
            distance += (group - group.mean(dim=0)).square().sum().item()
            size += group.square().sum().item()
    return {"relative": float(f"{math.sqrt(distance / size) if size else 0.0:.6g}"), "identical": identical}


def separation(a: Tensor, b: Tensor) -> float:
    """Distance of two clouds' centres against their mean radius (root mean square); 0 when one is empty."""
    if not len(a) or not len(b):
        return 0.0
    radius = [(cloud - cloud.mean(dim=0)).square().sum(dim=1).mean().sqrt().item() for cloud in (a, b)]
    distance = (a.mean(dim=0) - b.mean(dim=0)).norm().item()
    return float(f"{distance / max(sum(radius) / 2, 1e-12):.6g}")


def pca(points: Tensor) -> tuple[Tensor, float]:
    """(P, 2) on the two main axes, and the share of the variance that they show.

    The sign of an axis is that which makes its largest weight positive.
    """
    centred = points.double() - points.double().mean(dim=0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    flat = torch.zeros(len(points), 2, dtype=torch.float64)
    flat[:, : len(axes)] = centred @ axes.T
    total = values.square().sum()
    return flat.float(), (values[:2].square().sum() / total).item() if total > 0 else 1.0


def tsne(points: Tensor, seed: int) -> Tensor:
    """(P, 2) by scikit-learn's t-SNE. ValueError without it, or with fewer than FEWEST different points.

    Equal tokens are one point: t-SNE by itself would push them apart.
    """
    different, place = points.unique(dim=0, return_inverse=True)
    if len(different) < FEWEST:
        raise ValueError(
            f"t-SNE needs {FEWEST} different tokens, there are {len(different)}: write longer prompts."
        )
    perplexity = min(30.0, (len(different) - 1) / 3)
    made = _tsne_class()(2, perplexity=perplexity, init="pca", random_state=seed % 2**32)
    return torch.from_numpy(made.fit_transform(different.numpy())).float()[place]


def _tsne_class() -> Any:
    try:
        from sklearn.manifold import TSNE as Found
    except ModuleNotFoundError as error:
        raise ValueError(MISSING) from error
    return Found


def _cloud(kinds: Mapping[str, Sequence[Tensor]], methods: Sequence[str], seed: int) -> tuple[Cloud, float]:
    """The map of all kinds together, and the share of the variance that PCA's two axes show."""
    rows = [_thinned(tokens) for tokens in widened(kinds)]
    every = torch.cat(rows)
    found: dict[str, dict[str, Tensor]] = {}
    flat, share = pca(every)
    for method in methods:
        where = flat if method == PCA else tsne(every, seed)
        found[method] = dict(zip(kinds, where.split([len(part) for part in rows]), strict=True))
    return Cloud(found), float(f"{share:.6g}")


def widened(kinds: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
    """Each kind's tokens (P, D) in one width: zeros behind the narrower ones."""
    joined = [torch.cat(list(rows)) for rows in kinds.values()]
    width = max(tokens.shape[1] for tokens in joined)
    return [torch.nn.functional.pad(tokens, (0, width - tokens.shape[1])) for tokens in joined]


def _thinned(tokens: Tensor) -> Tensor:
    """At most MOST rows, evenly chosen."""
    if len(tokens) <= MOST:
        return tokens
    return tokens[torch.linspace(0, len(tokens) - 1, MOST).round().long()]


def summary(numbers: Mapping[str, Any]) -> str:
    """The scatter in one sentence."""
    found = numbers["scatter"]
    parts = [_scattered(f"{kind} tokens", found[kind]) for kind in ("query", "answer", "final")]
    count = len(numbers["answers"])
    if not numbers["tokens"]["answer"]:
        parts[1], answers = "there are no answer tokens", "no answer was sampled"
    else:
        answers = f"{count} different answers" if count > 1 else "every answer is the same"
    return f"Over {numbers['runs']} runs {', '.join(parts)}; {answers}."


def _scattered(name: str, entry: Mapping[str, Any]) -> str:
    if entry["relative"] is None:
        return f"{name} share no place, so there is no scatter"
    if entry["identical"]:
        return f"{name} coincide exactly"
    return f"{name} scatter by {entry['relative']:.1%} of their size"
