"""Choice of the query heads that stay, by scores or elimination, the same number in every pool of heads."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sqa.conversion.moments import Moments, damped
from sqa.conversion.subject import AttentionView, Subject, joined, watched

Method = Literal["random", "weight", "l2", "taylor", "greedy"]

METHODS: dict[Method, str] = {
    "random": "any heads, by the seed; costs nothing more",
    "weight": "norm of the head's query rows times that of its output columns; costs nothing more",
    "l2": "L2 norm of what the head adds to the residual stream (arXiv 2407.14679); costs nothing more",
    "taylor": "gradient of the loss by a gate on the head (arXiv 1905.10650); costs a backward pass more",
    "greedy": "drop one by one the head whose loss the others make good best; costs one inverse of F x F a layer more",
}
"""What each method looks at, and its cost beside one forward pass over the calibration text."""


def choose_heads(
    method: Method,
    view: AttentionView,
    moments: Moments,
    pools: Sequence[Sequence[int]],
    keep: int,
    *,
    gate_gradients: Tensor | None,
    generator: torch.Generator,
) -> list[int]:
    """The heads that stay, `keep` of each pool, in rising order. Heads that are in no pool are dropped.

    `moments`: of the layer's own output projection. `gate_gradients`: (Hq,), for `taylor`.
    """
    if method == "greedy":
        return _eliminate(view, moments, pools, keep)
    if method == "random":
        scores = torch.rand(view.config.num_query_heads, generator=generator)
    elif method == "taylor":
        assert gate_gradients is not None
        scores = gate_gradients
    else:
        scores = weight_norms(view) if method == "weight" else l2_norms(view, moments)
    return best_heads(scores, pools, keep)


def best_heads(scores: Tensor, pools: Sequence[Sequence[int]], keep: int) -> list[int]:
    """The `keep` heads of each pool that have the highest `scores` (Hq,), in rising order."""
    best = [sorted(pool, key=lambda head: -float(scores[head]))[:keep] for pool in pools]
    return sorted(head for heads in best for head in heads)


def weight_norms(view: AttentionView) -> Tensor:
    """(Hq,): the norm of each head's query rows times that of its output columns."""
    rows = view.q.weight.detach().cpu().double().unflatten(0, (-1, view.config.head_dim))
    columns = view.o.weight.detach().cpu().double().unflatten(1, (-1, view.config.head_dim))
    return (rows.square().sum((1, 2)) * columns.square().sum((0, 2))).sqrt()


def l2_norms(view: AttentionView, moments: Moments) -> Tensor:
    """(Hq,): the L2 norm over tokens of W_h z_h, where W_h are the head's columns of the output projection."""
    size = view.config.head_dim
    columns = view.o.weight.detach().cpu().double().split(size, dim=1)
    grams = (moments.gram[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(len(columns)))
    return torch.stack([(w @ gram * w).sum() for w, gram in zip(columns, grams, strict=True)]).sqrt()


def _eliminate(view: AttentionView, moments: Moments, pools: Sequence[Sequence[int]], keep: int) -> list[int]:
    """Backward elimination: dropping head h costs tr(W_h P_hh^-1 W_h^T) after refitting, where P = gram^-1.

    This is optimal brain surgeon in blocks; after each step, P and W are those of a layer without that head.
    """
    size = view.config.head_dim
    inverse = torch.linalg.inv(damped(moments.gram, 1e-6))
    weight = joined(view.o)
    left = {head: pool for pool in map(set, pools) for head in pool}
    outside = [head for head in range(view.config.num_query_heads) if head not in left]
    while candidates := outside or [head for head, pool in left.items() if len(pool) > keep]:
        costs = {}
        for head in candidates:
            own = slice(head * size, (head + 1) * size)
            costs[head] = float((weight[:, own].T * torch.linalg.solve(inverse[own, own], weight[:, own].T)).sum())
        dropped = min(costs, key=costs.__getitem__)
        own = slice(dropped * size, (dropped + 1) * size)
        share = torch.linalg.solve(inverse[own, own], inverse[own])  # (D, F)
        weight = weight - weight[:, own] @ share
        inverse = inverse - inverse[:, own] @ share
        if outside:
            outside.remove(dropped)
        else:
            left.pop(dropped).remove(dropped)
    return sorted(left)


@torch.enable_grad()
def gate_gradients(subject: Subject, batches: Iterable[Any]) -> list[Tensor]:
    """For each layer (Hq,): the sum over sequences of |d loss / d gate|, for a gate of 1 on each head's output z.

    By the chain rule, this gradient is the sum of z * d loss / d z over the tokens and the head's dimensions.
    """
    views = subject.views
    totals = [torch.zeros(view.config.num_query_heads, dtype=torch.float64) for view in views]
    with watched([view.o for view in views]) as seen:
        for batch in batches:
            loss = subject.loss(batch) * len(batch)  # the mean over its rows, of which the last batch may have fewer
            heads = [z for z, _ in seen]
            for total, z, slope in zip(totals, heads, torch.autograd.grad(loss, heads), strict=True):
                by_head = (z.detach() * slope).double().unflatten(-1, (len(total), -1))
                total += by_head.sum((1, 3)).abs().sum(0).cpu()
    return totals
