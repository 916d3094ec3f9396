"""Allocation of a total of query heads to layers: the cost of fewer heads in each, and the cheapest choice.

Shapes: d = d_model, F = Hq * D features of an output projection.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sqa.config import AttentionConfig
from sqa.conversion.importance import best_heads, l2_norms
from sqa.conversion.moments import Moments
from sqa.conversion.subject import AttentionView, Subject, joined, watched
from sqa.conversion.surgery import Plan, plan_heads, plan_without, solve_damped
from sqa.errors import InputError

_DAMPING = 1e-4  # of surgery.DAMPING the penalty that serves most layers best


@dataclass(frozen=True)
class Choice:
    """A plan for a layer, and its cost in nats a token."""

    plan: Plan
    cost: float


def layer_choices(
    original: Subject, batches: Iterable[Any], counts: Sequence[Sequence[tuple[int, int]]]
) -> list[dict[int, Choice]]:
    """For each layer, the cheapest choice for each number of query heads.

    `batches`: calibration text. `counts`: for each layer the pairs of query and KV heads to try.

    The cost is the second-order estimate of KL(original || converted) when that layer alone changes: E[(g . e)^2] / 2,
    with e the error of the refitted attention output and g the gradient of a token's loss by that output (the empirical
    Fisher matrix, as in optimal brain surgeon, arXiv 2203.07259). With g and e independent it is
    tr(E[g g^T] E[e e^T]) / 2. The heads with the largest L2 norms stay.
    """
    views = original.views
    moments = [Moments(view.o.in_features, 0, constant=view.o.bias is not None) for view in views]
    slopes = [torch.zeros(view.o.out_features, view.o.out_features, dtype=torch.float64) for view in views]
    tokens = 0
    with watched([view.o for view in views]) as seen, torch.enable_grad():
        for batch in batches:
            loss = original.loss(batch)
            reads, given = zip(*seen, strict=True)
            count = len(original.tokens(reads[0], batch))
            tokens += count
            gradients = torch.autograd.grad(loss * count, given)  # of the sum over tokens
            for m, slope, read, gradient in zip(moments, slopes, reads, gradients, strict=True):
                m.add(original.tokens(read, batch))
                g = original.tokens(gradient, batch).cpu().double()
                slope += g.T @ g
    found: list[dict[int, Choice]] = []
    for view, m, slope, pairs in zip(views, moments, slopes, counts, strict=True):
        norms, cheapest = l2_norms(view, m), dict[int, Choice]()
        for num_query_heads, num_kv_heads in pairs:
            plan = plan_layer(view.config, norms, num_query_heads, num_kv_heads)
            choice = Choice(plan, _cost(view, m.gram, norms, plan, slope) / tokens**2)
            if num_query_heads not in cheapest or choice.cost < cheapest[num_query_heads].cost:
                cheapest[num_query_heads] = choice
        found.append(cheapest)
    return found


def plan_layer(config: AttentionConfig, norms: Tensor, num_query_heads: int, num_kv_heads: int) -> Plan:
    """The layer with so many heads. It keeps the KV heads whose best query heads have the largest `norms` (Hq,).

    In multi-head attention each KV head stays or goes with its query head, and any heads may stay.
    """
    if config.num_query_heads == config.num_kv_heads:
        return plan_heads(config, num_query_heads, None)
    best = norms.square().view(config.num_kv_heads, -1).topk(num_query_heads // num_kv_heads).values.sum(1)
    return plan_without(config, num_query_heads, sorted(best.topk(num_kv_heads).indices.tolist()))


def _cost(view: AttentionView, gram: Tensor, norms: Tensor, plan: Plan, slope: Tensor) -> float:
    """tr(slope error gram error^T) / 2, where slope (d, d) and gram (F, F) are sums over tokens."""
    after, pools = plan
    kept = best_heads(norms, pools, after.num_query_heads // len(pools))
    size, weight = view.config.head_dim, joined(view.o)
    columns = [head * size + i for head in kept for i in range(size)] + list(range(view.o.in_features, weight.shape[1]))
    error = weight.clone()
    error[:, columns] = 0.0  # the error when the other heads go
    error[:, columns] -= solve_damped(gram[columns][:, columns], error @ gram[:, columns], _DAMPING)
    return float(((slope @ error @ gram) * error).sum()) / 2


def cheapest(choices: Sequence[Mapping[int, Choice]], total: int) -> list[Plan]:
    """The plan of each layer, by the cheapest of its `choices` that have `total` query heads in all."""
    counts = allocate([{count: choice.cost for count, choice in layer.items()} for layer in choices], total)
    return [layer[count].plan for layer, count in zip(choices, counts, strict=True)]


def allocate(costs: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """The number of heads for each layer that add up to `total` at the lowest sum of costs.

    Raises InputError, with the nearest possible totals, when none add up to it.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for layer in costs:
        extended: dict[int, tuple[float, list[int]]] = {}
        for spent, (cost, counts) in best.items():
            for count, more in layer.items():
                if spent + count not in extended or cost + more < extended[spent + count][0]:
                    extended[spent + count] = cost + more, [*counts, count]
        best = extended
    if total not in best:
        below, above = sorted(n for n in best if n < total), sorted(n for n in best if n > total)
        near = " or ".join(str(n) for n in below[-1:] + above[:1])
        raise InputError(f"convert: no allocation to {len(costs)} layers has {total} query heads in all; try {near}")
    return best[total][1]
