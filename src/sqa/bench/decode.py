"""Decoding one token at a time from a filled cache: bound by reading the cache and the weights, so SQA wins little."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sqa import cost
from sqa.attention.cache import KVCache
from sqa.attention.call import Call
from sqa.attention.kernels import resolve
from sqa.bench.peers import OURS, model_row
from sqa.bench.report import BenchResult, Row, add_ratios, choose_baseline, timed
from sqa.config import ModelConfig
from sqa.measure.machine import find_device, find_dtype
from sqa.measure.timing import Budget, at_least_one, take_turns
from sqa.model import Transformer
from sqa.variants import preset as model_preset

VARIANTS = ("mha", "gqa", "mqa", "sqa", "xsqa", "wide-gqa")

NOTE = (
    "SQA wins little here: each new token reads the whole cache and all weights once, and the cache's size follows the "
    "KV heads, not the query heads. SQA has GQA's cache; only fewer KV heads (mqa, xsmqa) or a window shrink it."
)


def filled_cache(
    config: ModelConfig, n: int, *, batch_size: int, room: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """A cache that holds `n` random tokens a row, with room for more."""
    cache = KVCache(config, batch_size=batch_size, capacity=n + room, dtype=dtype, device=device)
    for index, layer in enumerate(config.layers):
        shape = (batch_size, n, layer.num_kv_heads, layer.head_dim)
        k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        cache.extend(index, cache.begin(index, (batch_size, n)), k, v)
    return cache


def run_decode(
    *,
    preset: str = "published",
    variants: Sequence[str] = VARIANTS,
    lengths: Sequence[int] = (1024, 8192, 32_768),
    batch_size: int = 1,
    steps: int = 16,
    dtype: str = "bf16",
    rounds: int = 5,
    device: str = "cpu",
    budget: float | None = None,
) -> BenchResult:
    """Time `steps` new tokens after `n` cached ones, eager; variants of one length take turns.

    Weights and cache are in `dtype`. The cache goes on filling from turn to turn, by `steps` tokens each.
    Raises ValueError for bad options.
    """
    lowest = min(lengths, default=0)
    at_least_one(variants=len(variants), lengths=lowest, batch_size=batch_size, steps=steps, rounds=rounds)
    where, torch_dtype, left = find_device(device), find_dtype(dtype), Budget(seconds=budget)
    room, baseline = steps * (rounds + 1), choose_baseline(variants)
    rows: list[Row] = []
    notes = [NOTE, f"{steps} tokens a turn, eager; the cache grows from N to at most N + {room}."]
    for n in left.fitting(sorted(lengths), notes):
        contestants, group = {}, {}
        for name in variants:
            config = model_preset(preset, name, max_seq_len=n + room)
            model = Transformer(config).to(where, torch_dtype).eval()
            cache = filled_cache(config, n, batch_size=batch_size, room=room, dtype=torch_dtype, device=where)
            contestants[name] = _decode(model, cache, torch.zeros(batch_size, 1, dtype=torch.long, device=where), steps)
            bytes_per_element = torch.finfo(torch_dtype).bits // 8
            cache_bytes = batch_size * cost.kv_cache_bytes(config, n, bytes_per_element=bytes_per_element)
            group[name] = model_row(
                "decode", preset, OURS, name, config, dtype, batch_size=batch_size, n=n, device=where, grad=False
            ) | {"cache_bytes": cache_bytes}
            layer = config.layers[0]
            call = Call.of_layer(layer, length=n, num_queries=1, device=where.type, dtype=torch_dtype, grad=False)
            group[name]["kernel"] = resolve(call).kernel
        for name, timing in take_turns(contestants, rounds=rounds, device=where, budget=left).items():
            group[name] |= timed(timing) | {"tokens_per_s": batch_size * steps / timing.median}
        add_ratios(group.values(), same=(), baseline=baseline)
        rows += group.values()
    return BenchResult.of(
        rows, device=device, settings={"preset": preset, "rounds": rounds, "steps": steps}, notes=tuple(notes)
    )


def _decode(model: Transformer, cache: KVCache, first: torch.Tensor, steps: int) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        token = first
        for _ in range(steps):
            logits = model(token, cache=cache, num_logits=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    return run
