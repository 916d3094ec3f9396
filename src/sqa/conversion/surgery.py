"""Fewer heads in closed form: projections cut to the heads that stay, KV heads pooled, the output projection refitted.

Shapes: D = head_dim, d = d_model, F = Hq * D.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sqa.config import AttentionConfig
from sqa.conversion.moments import Moments, damped
from sqa.conversion.subject import AttentionView, AttentionWeights, joined
from sqa.errors import InputError

DAMPING = (1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 1.0)
"""The ridge penalties to try, as shares of the mean of the diagonal."""
ROUNDING = 2**-16
"""The share of energy that rounding to bf16 loses. A smaller error needs no refit."""

Plan = tuple[AttentionConfig, list[range]]
"""A layer's new shape, and its pools of query heads. It keeps as many heads of one pool as of another."""


def plan_heads(config: AttentionConfig, num_query_heads: int, num_kv_heads: int | None) -> Plan:
    """The layer with fewer heads.

    Without `num_kv_heads` a layer keeps all of its KV heads; multi-head attention keeps one for each query head. Query
    heads that will share a KV head are one pool. If each query head keeps a KV head of its own, all heads are one
    pool. Raises InputError with the numbers that would fit.
    """
    heads, kv_heads = config.num_query_heads, config.num_kv_heads
    check_heads(config)
    multi_head = heads == kv_heads
    if num_kv_heads is None:
        num_kv_heads = num_query_heads if multi_head else kv_heads
    one_pool = multi_head and num_kv_heads == num_query_heads
    if one_pool and not 1 <= num_query_heads <= heads:
        raise InputError(f"convert: query_heads must be 1 to {heads}, got {num_query_heads}")
    if not one_pool and (num_kv_heads < 1 or kv_heads % num_kv_heads):
        fits = ", ".join(str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0)
        raise InputError(f"convert: kv_heads must divide the model's {kv_heads} KV heads ({fits}), got {num_kv_heads}")
    if num_query_heads % num_kv_heads or not 1 <= num_query_heads <= heads:
        fits = ", ".join(str(n) for n in range(num_kv_heads, heads + 1, num_kv_heads))
        raise InputError(
            f"convert: query_heads must be a multiple of {num_kv_heads} KV heads, at most {heads} ({fits}), "
            f"got {num_query_heads}"
        )
    size = heads if one_pool else heads // num_kv_heads
    pools = [range(start, start + size) for start in range(0, heads, size)]
    return config.replace(num_query_heads=num_query_heads, num_kv_heads=num_kv_heads), pools


def check_heads(config: AttentionConfig) -> None:
    """Raise InputError for a layer with fewer query than KV heads."""
    heads, kv_heads = config.num_query_heads, config.num_kv_heads
    if heads < kv_heads:
        raise InputError(f"convert: a layer with fewer query than KV heads ({heads} and {kv_heads}) is not supported")


def plan_without(config: AttentionConfig, num_query_heads: int, kv_heads: Sequence[int]) -> Plan:
    """The layer that keeps these KV heads unchanged and loses the others, with all query heads that read those.

    The query heads that read a KV head are a pool.
    """
    size = config.num_query_heads // config.num_kv_heads
    pools = [range(head * size, (head + 1) * size) for head in kv_heads]
    return config.replace(num_query_heads=num_query_heads, num_kv_heads=len(pools)), pools


def cut(view: AttentionView, num_kv_heads: int, kept: Sequence[int], inputs: Moments | None = None) -> AttentionWeights:
    """Weights of a layer with the query heads `kept` (in rising order).

    KV heads of one pool that kept heads still read are replaced by their mean. With the moments of the layer's `inputs`
    (d and the constant 1 as features) they are rotated to agree first: values by any rotation, undone in the output
    projection; keys and their queries inside rotary pairs, which commutes with positions (but not with QK-norm, where
    keys stay). If no pool merges KV heads, each kept head computes what it did before.
    """
    config, size = view.config, view.config.head_dim
    shared = config.num_query_heads // config.num_kv_heads
    all_q, all_k, all_v = (_head_rows(linear, size) for linear in (view.q, view.k, view.v))
    output = joined(view.o)
    columns, output_bias = output[:, : view.o.in_features].split(size, dim=1), output[:, view.o.in_features :]
    queries, keys, values, outputs = (list[Tensor]() for _ in range(4))
    share = len(kept) // num_kv_heads
    for first in range(0, len(kept), share):
        own = kept[first : first + share]
        sources = sorted({head // shared for head in own})
        turn_k = turn_v = [torch.eye(size, dtype=torch.float64)] * len(sources)
        if inputs is not None and len(sources) > 1:
            turn_v = _align([all_v[s] for s in sources], inputs.gram, pairs=None)
            if not config.qk_norm:
                turn_k = _align([all_k[s] for s in sources], inputs.gram, pairs=_rotary_pairs(config))
        keys.append(torch.stack([turn @ all_k[s] for turn, s in zip(turn_k, sources, strict=True)]).mean(0))
        values.append(torch.stack([turn @ all_v[s] for turn, s in zip(turn_v, sources, strict=True)]).mean(0))
        for head in own:
            place = sources.index(head // shared)
            queries.append(turn_k[place] @ all_q[head])
            outputs.append(columns[head] @ turn_v[place].T)
    q, k, v = (torch.cat(rows) for rows in (queries, keys, values))
    return AttentionWeights(q, k, v, torch.cat([*outputs, output_bias], dim=1))


def _head_rows(linear: nn.Linear, size: int) -> tuple[Tensor, ...]:
    """The rows of each head, (D, d + 1) in fp64, with the bias or zeros as last column."""
    own = joined(linear)
    return (own if linear.bias is not None else nn.functional.pad(own, (0, 1))).split(size)


def _rotary_pairs(config: AttentionConfig) -> Tensor | None:
    """(D / 2, 2): the pairs of dimensions that rotary positions rotate; None without them."""
    if config.rope is None:
        return None
    order = torch.arange(config.head_dim)
    return order.view(-1, 2) if config.rope.interleaved else order.view(2, -1).T


def _align(blocks: Sequence[Tensor], gram: Tensor, pairs: Tensor | None) -> list[Tensor]:
    """Rotations (D, D) that bring the outputs of `blocks` (D, d + 1) close to their mean, on inputs of moments `gram`.

    Generalised Procrustes analysis in three rounds; with `pairs`, only rotations inside each pair of dimensions.
    """
    turns = [torch.eye(len(blocks[0]), dtype=torch.float64) for _ in blocks]
    target = blocks[0]
    for _ in range(3):
        turns = [_rotation(target @ gram @ block.T, pairs) for block in blocks]
        target = torch.stack([turn @ block for turn, block in zip(turns, blocks, strict=True)]).mean(0)
    return turns


def _rotation(correlation: Tensor, pairs: Tensor | None) -> Tensor:
    """The rotation R with the largest tr(R^T C) for C = sum of target x^T (D, D)."""
    if pairs is None:
        left, _, right = torch.linalg.svd(correlation)
        return left @ right
    i, j = pairs.unbind(1)
    angle = torch.atan2(correlation[j, i] - correlation[i, j], correlation[i, i] + correlation[j, j])
    turn = torch.zeros_like(correlation)
    turn[i, i] = turn[j, j] = angle.cos()
    turn[j, i], turn[i, j] = angle.sin(), -angle.sin()
    return turn


def refit(weight: Tensor, fit: Moments, held_out: Moments) -> Tensor:
    """The output projection (d, F) that fits the remaining features to the targets, by ridge least squares.

    The penalty is on the change from `weight`, so the error on the fitted text never grows. Its strength is the one
    with the lowest error on `held_out`. If none is better, or the error is tiny, the result is `weight` itself.
    """
    best, lowest = weight, held_out.error(weight)
    if max(lowest, fit.error(weight)) < ROUNDING:
        return weight
    for share in DAMPING:
        fitted = weight + solve_damped(fit.gram, fit.cross - weight @ fit.gram, share)
        error = held_out.error(fitted)
        if error < lowest:
            best, lowest = fitted, error
    return best


def solve_damped(gram: Tensor, cross: Tensor, share: float) -> Tensor:
    """W (d, F) with W damped(gram) = cross (d, F); gram (F, F)."""
    solved: Tensor = torch.linalg.solve(damped(gram, share), cross.T).T
    return solved
