"""Benchmark of decoding from a filled cache. Reading cache and weights takes the time, so SQA gains little."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from sqa import cost
from sqa.attention.cache import KVCache
from sqa.bench.lineup import Models, Runner, Task, line_up, measure
from sqa.bench.measurement import Measurement
from sqa.bench.report import BenchResult
from sqa.config import ModelConfig
from sqa.dtypes import find_dtype
from sqa.measure.machine import find_device
from sqa.measure.timing import TimeLimit
from sqa.records import at_least_one

DECODED_VARIANTS = ("mha", "gqa", "mqa", "sqa", "xsqa", "wide-gqa")
"""The variants that decode by default, among them those with other numbers of KV heads."""

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

    Weights and cache are in `dtype`. The cache grows by `steps` tokens in each turn. `budget` is in seconds. Raises
    InputError for bad options.
    """
    at_least_one("benchmark", lengths=min(lengths, default=0), batch_size=batch_size, steps=steps, rounds=rounds)
    where, torch_dtype, limit = find_device(device), find_dtype(dtype), TimeLimit(seconds=budget)
    room = steps * (rounds + 1)
    models = models.fitted(max(lengths) + room, ())
    lineup = line_up(models, (), compile=False, device=where)
    rows: list[Measurement] = []
    notes = [NOTE, f"{steps} tokens a turn, eager; the cache grows from N to at most N + {room}."]
    for runner in lineup.runners:
        runner.module.to(torch_dtype).eval()
    for n in limit.fitting(sorted(lengths), notes):
        task = Task(
            kind="decode", preset=models.name, dtype=dtype, batch_size=batch_size, n=n, new_tokens=steps, device=where
        )

        def work(runner: Runner, n: int = n) -> Callable[[], None]:
            config = models.configs[runner.variant]
            cache = filled_cache(config, n, batch_size=batch_size, room=room, dtype=torch_dtype, device=where)
            return partial(_decode, runner.module, cache, steps)

        for m in measure(lineup, task, work, models.configs, rounds=rounds, limit=limit):
            a_row = cost.kv_cache_bytes(models.configs[m.variant], n, bytes_per_element=torch_dtype.itemsize)
            rows.append(replace(m, cache_bytes=batch_size * a_row))
    options = {"preset": models.name, "rounds": rounds, "steps": steps}
    return BenchResult.of(rows, device=device, settings=options, notes=notes)


@torch.inference_mode()
def _decode(model: nn.Module, cache: KVCache, steps: int) -> None:
    token = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=cache.layers[0].keys.device)
    for _ in range(steps):
        logits = model(token, cache=cache, num_logits=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
