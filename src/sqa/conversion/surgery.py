"""Fewer heads in closed form: projections cut to the heads that stay, KV heads pooled, the output projection refitted.

Shapes: D = head_dim, d = d_model, F = Hq * D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sqa.config import AttentionConfig
from sqa.conversion.moments import Moments
from sqa.conversion.subject import AttentionView
from sqa.errors import InputError

DAMPING = (1e-8, 1e-6, 1e-4, 1e-2, 1e-1, 1.0)
"""Shares of the mean of the diagonal that are tried as ridge penalty."""


def plan_heads(
    config: AttentionConfig, num_query_heads: int, num_kv_heads: int | None
) -> tuple[AttentionConfig, list[range]]:
    """The layer with fewer heads, and the pools of query heads of which it keeps the same number each.

    Without `num_kv_heads` a layer keeps its own, and one of multi-head attention as many as query heads. Query heads
    that share a KV head stay together, so a pool is what will share one; where each query head has a KV head of its
    own and keeps it, all heads are one pool. Raises ValueError with the numbers that would fit.
    """
    heads, kv_heads = config.num_query_heads, config.num_kv_heads
    if heads < kv_heads:
        raise InputError(f"convert: a layer with fewer query than KV heads ({heads} and {kv_heads}) is not supported")
    multi_head = heads == kv_heads
    kept_kv = num_kv_heads or (num_query_heads if multi_head else kv_heads)
    one_pool = multi_head and kept_kv == num_query_heads
    if one_pool and not 1 <= num_query_heads <= heads:
        raise InputError(f"convert: query_heads must be 1 to {heads}, got {num_query_heads}")
    if not one_pool and (kept_kv < 1 or kv_heads % kept_kv):
        fits = ", ".join(str(n) for n in range(1, kv_heads + 1) if kv_heads % n == 0)
        raise InputError(f"convert: kv_heads must divide the model's {kv_heads} KV heads ({fits}), got {kept_kv}")
    if num_query_heads % kept_kv or not 1 <= num_query_heads <= heads:
        fits = ", ".join(str(n) for n in range(kept_kv, heads + 1, kept_kv))
        raise InputError(
            f"convert: query_heads must be a multiple of {kept_kv} KV heads, at most {heads} ({fits}), "
            f"got {num_query_heads}"
        )
    size = heads if one_pool else heads // kept_kv
    pools = [range(start, start + size) for start in range(0, heads, size)]
    return config.replace(num_query_heads=num_query_heads, num_kv_heads=kept_kv), pools


def cut(
    view: AttentionView, num_kv_heads: int, kept: Sequence[int], inputs: Moments | None = None
) -> tuple[dict[str, Tensor], bool]:
    """Weights of a layer with the query heads `kept` (in rising order), by the names of AttentionView's projections.

    Where several KV heads that are still read come into one pool, their mean takes their place; with the moments of
    the layer's `inputs` (d and the constant 1 as features) they are turned to agree first: values by any rotation,
    undone in the output projection; keys and their queries by rotations inside rotary pairs, which positions do not
    see (not under QK-norm, whose weights they would not pass). Returns whether any were pooled as well: if not, each
    kept head computes what it computed before.
    """
    pooled = False
    config, size = view.config, view.config.head_dim
    shared = config.num_query_heads // config.num_kv_heads
    parts = {name: _by_head(getattr(view, name), size, columns=name == "o") for name in "qkvo"}
    q, o = ({head: parts[name][head] for head in kept} for name in "qo")
    keys: list[Tensor] = []
    values: list[Tensor] = []
    share = len(kept) // num_kv_heads
    for first in range(0, len(kept), share):
        own = kept[first : first + share]
        sources = sorted({head // shared for head in own})
        pooled |= len(sources) > 1
        turns = {name: [torch.eye(size, dtype=torch.float64)] * len(sources) for name in "kv"}
        if inputs is not None and len(sources) > 1:
            turns["v"] = _align([parts["v"][s] for s in sources], inputs.gram, pairs=None)
            if not config.qk_norm:
                turns["k"] = _align([parts["k"][s] for s in sources], inputs.gram, pairs=_rotary_pairs(config))
        for name, pool in (("k", keys), ("v", values)):
            turned = [turn @ parts[name][s] for turn, s in zip(turns[name], sources, strict=True)]
            pool.append(torch.stack(turned).mean(0))
        for head in own:
            place = sources.index(head // shared)
            q[head] = turns["k"][place] @ q[head]
            o[head] = o[head] @ turns["v"][place].T
    weights: dict[str, Tensor] = {}
    for name, blocks in (("q", list(q.values())), ("k", keys), ("v", values)):
        stacked = torch.cat(blocks)
        weights[f"{name}.weight"] = stacked[:, : config.d_model]
        if getattr(view, name).bias is not None:
            weights[f"{name}.bias"] = stacked[:, config.d_model]
    weights["o.weight"] = torch.cat(list(o.values()), dim=1)
    if view.o.bias is not None:
        weights["o.bias"] = view.o.bias.detach().double()
    return weights, pooled


def _by_head(linear: torch.nn.Linear, size: int, *, columns: bool) -> list[Tensor]:
    """Each head's part in fp64: rows (D, d + 1) with the bias (or zero) as last column; or output columns (d, D)."""
    weight = linear.weight.detach().double().cpu()
    if columns:
        return list(weight.split(size, dim=1))
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double().cpu()
    return list(torch.cat([weight, bias[:, None]], dim=1).split(size))


def _rotary_pairs(config: AttentionConfig) -> Tensor | None:
    """(D / 2, 2): which dimensions of a head are rotated together; None without rotary positions."""
    if config.rope is None:
        return None
    order = torch.arange(config.head_dim)
    return order.view(-1, 2) if config.rope.interleaved else order.view(2, -1).T


def _align(blocks: Sequence[Tensor], gram: Tensor, pairs: Tensor | None) -> list[Tensor]:
    """Rotations (D, D) that bring the outputs of `blocks` (D, d + 1) on inputs of moments `gram` close to their mean.

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
    """The output projection (d, F) that makes the features that are left give the targets: ridge least squares.

    The penalty is on the change from `weight`, so the error on the text fitted on never grows; how strong it is, is
    what serves `held_out` best. `weight` itself is the answer where nothing does better.
    """
    scale = float(fit.gram.diagonal().mean())
    missing = fit.cross - weight @ fit.gram
    best, lowest = weight, held_out.error(weight)
    for share in DAMPING:
        damped = fit.gram + share * scale * torch.eye(len(fit.gram), dtype=torch.float64)
        fitted = weight + torch.linalg.solve(damped, missing.T).T
        error = held_out.error(fitted)
        if error < lowest:
            best, lowest = fitted, error
    return best
