"""Which query heads stay: scores or an elimination, the same number in every pool of heads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from sqa.conversion.moments import AttentionView, Moments

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose heads: what it looks at and what that costs beside one forward pass over the calibration text."""

    about: str
    cost: str
    score: Callable[[AttentionView, Moments], Tensor] | None = None


def _weight(view: AttentionView, moments: Moments) -> Tensor:
    rows = view.q.weight.detach().double().unflatten(0, (-1, view.config.head_dim))
    columns = view.o.weight.detach().double().unflatten(1, (-1, view.config.head_dim))
    return (rows.square().sum((1, 2)) * columns.square().sum((0, 2))).sqrt()


def _l2(view: AttentionView, moments: Moments) -> Tensor:
    """Root of the sum over tokens of |W_h z_h|^2, with W_h the head's columns of the output projection."""
    size = view.config.head_dim
    weight = view.o.weight.detach().double()
    scores = []
    for start in range(0, weight.shape[1], size):
        own = slice(start, start + size)
        scores.append(((weight[:, own] @ moments.gram[own, own]) * weight[:, own]).sum())
    return torch.stack(scores).sqrt()


METHODS: dict[str, Method] = {
    "random": Method(about="any heads, by the seed", cost="nothing"),
    "weight": Method(about="norm of the head's query rows times that of its output columns", cost="nothing",
                     score=_weight),
    "l2": Method(about="L2 norm of what the head adds to the residual stream (arXiv 2407.14679)", cost="nothing",
                 score=_l2),
    "taylor": Method(about="gradient of the loss by a gate on the head (arXiv 1905.10650)", cost="a backward pass"),
    "greedy": Method(about="drop one by one the head whose loss the others make good best",
                     cost="one inverse of F x F a layer"),
}  # fmt: skip


def choose_heads(
    method: str,
    view: AttentionView,
    moments: Moments,
    pools: Sequence[Sequence[int]],
    keep: int,
    *,
    gate_gradients: Tensor | None,
    generator: torch.Generator,
) -> list[int]:
    """The heads that stay, in rising order: `keep` of each pool.

    `moments` are those of the layer's own output projection; `gate_gradients` (Hq,) is what `taylor` needs.
    """
    if method == "greedy":
        return _eliminate(view, moments, pools, keep)
    if method == "random":
        scores = torch.rand(view.config.num_query_heads, generator=generator)
    elif method == "taylor":
        assert gate_gradients is not None
        scores = gate_gradients
    else:
        score = METHODS[method].score
        assert score is not None
        scores = score(view, moments)
    best = [sorted(pool, key=lambda head: -float(scores[head]))[:keep] for pool in pools]
    return sorted(head for heads in best for head in heads)


def _eliminate(view: AttentionView, moments: Moments, pools: Sequence[Sequence[int]], keep: int) -> list[int]:
    """Backward elimination: what dropping block h costs after refitting is tr(W_h P_hh^-1 W_h^T), P = gram^-1.

    The block form of the optimal brain surgeon; P and W are updated as if that head had never been there.
    """
    size = view.config.head_dim
    gram = moments.gram
    damping = 1e-6 * gram.diagonal().mean()
    inverse = torch.linalg.inv(gram + damping * torch.eye(len(gram), dtype=gram.dtype))
    weight = view.output_weight
    left = {head: pool for pool in map(set, pools) for head in pool}
    while any(len(pool) > keep for pool in left.values()):
        costs = {}
        for head, pool in left.items():
            if len(pool) > keep:
                own = slice(head * size, (head + 1) * size)
                costs[head] = float((weight[:, own].T * torch.linalg.solve(inverse[own, own], weight[:, own].T)).sum())
        dropped = min(costs, key=costs.__getitem__)
        own = slice(dropped * size, (dropped + 1) * size)
        share = torch.linalg.solve(inverse[own, own], inverse[own])  # (D, F)
        weight = weight - weight[:, own] @ share
        inverse = inverse - inverse[:, own] @ share
        left.pop(dropped).remove(dropped)
    return sorted(left)


def gate_gradients(
    loss: Callable[[Item], Tensor], batches: Iterable[Item], views: Sequence[AttentionView]
) -> list[Tensor]:
    """For each layer (Hq,): the sum over sequences of |d loss / d gate|, with a gate of 1 on each head's output."""
    totals = [torch.zeros(view.config.num_query_heads, dtype=torch.float64) for view in views]
    gates: dict[int, Tensor] = {}

    def gated(index: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = inputs[0].unflatten(-1, (views[index].config.num_query_heads, -1))
        gates[index] = torch.ones(z.shape[0], z.shape[2], device=z.device, dtype=z.dtype, requires_grad=True)
        return ((z * gates[index][:, None, :, None]).flatten(-2),)

    handles = [view.o.register_forward_pre_hook(partial(gated, i)) for i, view in enumerate(views)]
    try:
        for batch in batches:
            value = loss(batch)
            for i, gradient in enumerate(torch.autograd.grad(value, [gates[i] for i in range(len(views))])):
                totals[i] += gradient.double().abs().sum(0).cpu()
    finally:
        for handle in handles:
            handle.remove()
    return totals
