"""Decoding one token at a time from a filled cache: bound by reading the cache and the weights, so SQA wins little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from sqa import cost
from sqa.attention.cache import KVCache
from sqa.bench.lineup import Models, Task
from sqa.bench.measurement import Measurement, choose_baseline, with_ratios
from sqa.bench.peers import OURS
from sqa.bench.report import BenchResult
from sqa.config import ModelConfig
from sqa.measure.machine import find_device, find_dtype
from sqa.measure.timing import TimeLimit, at_least_one, take_turns
from sqa.model import Transformer

DECODED_VARIANTS = ("mha", "gqa", "mqa", "sqa", "xsqa", "wide-gqa")
"""What is decoded with unless told otherwise: those that differ in their KV heads take part."""

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
    models: Models,
    *,
    lengths: Sequence[int] = (1024, 8192, 32_768),
    batch_size: int = 1,
    steps: int = 16,
    dtype: str = "bf16",
    rounds: int = 5,
    device: str = "cpu",
    budget: float | None = None,
) -> BenchResult:
    """Time `steps` new tokens after `n` cached ones, eager; variants of one length take turns.

    Weights and cache are in `dtype`. The cache goes on filling from turn to turn, by `steps` tokens each. `budget` is
    in seconds. Raises InputError for bad options.
    """
    at_least_one(lengths=min(lengths, default=0), batch_size=batch_size, steps=steps, rounds=rounds)
    where, torch_dtype, limit = find_device(device), find_dtype(dtype), TimeLimit(seconds=budget)
    room = steps * (rounds + 1)
    models = models.fitted(max(lengths) + room, ())
    baseline = choose_baseline(models.configs)
    rows: list[Measurement] = []
    notes = [NOTE, f"{steps} tokens a turn, eager; the cache grows from N to at most N + {room}."]
    built = {name: models.build(name).to(where, torch_dtype).eval() for name in models.configs}
    for n in limit.fitting(sorted(lengths), notes):
        task = Task(kind="decode", preset=models.name, dtype=dtype, batch_size=batch_size, n=n, device=where)
        contestants, group = {}, {}
        for name, config in models.configs.items():
            cache = filled_cache(config, n, batch_size=batch_size, room=room, dtype=torch_dtype, device=where)
            first = torch.zeros(batch_size, 1, dtype=torch.long, device=where)
            contestants[name] = _decode(built[name], cache, first, steps)
            per_row = cost.kv_cache_bytes(config, n, bytes_per_element=torch_dtype.itemsize)
            group[name] = replace(task.measurement(OURS, name, config), cache_bytes=batch_size * per_row)
        for name, timing in take_turns(contestants, rounds=rounds, device=where, limit=limit).items():
            group[name] = replace(group[name], seconds=timing, tokens_per_s=batch_size * steps / timing.median)
        rows += with_ratios(list(group.values()), same=lambda m: m.n, baseline=baseline)
    options = {"preset": models.name, "rounds": rounds, "steps": steps}
    return BenchResult.of(rows, device=device, settings=options, notes=notes)


def _decode(model: Transformer, cache: KVCache, first: torch.Tensor, steps: int) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        token = first
        for _ in range(steps):
            logits = model(token, cache=cache, num_logits=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    return run
