"""The preprint's table: one forward pass over a prompt of N tokens, with the logits of the last position only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from sqa import cost
from sqa.bench.peers import OURS, Runner, line_up, measure, shapes
from sqa.bench.report import VARIANTS, BenchResult, Row, choose_baseline
from sqa.measure.machine import find_device, find_dtype
from sqa.measure.timing import Budget, at_least_one

PREPRINT_SECONDS: dict[int, dict[str, float]] = {
    1_024: {"xsqa": 0.0570, "sqa": 0.0642, "ssqa": 0.0669, "mqa": 0.0760, "gqa": 0.0785, "mha": 0.0869},
    4_096: {"xsqa": 0.0637, "sqa": 0.0750, "ssqa": 0.0793, "mqa": 0.1001, "gqa": 0.1027, "mha": 0.1114},
    32_768: {"xsqa": 0.1348, "sqa": 0.1991, "ssqa": 0.2117, "mqa": 0.3612, "gqa": 0.3637, "mha": 0.3727},
    131_072: {"xsqa": 0.3759, "sqa": 0.6308, "ssqa": 0.6630, "mqa": 1.2530, "gqa": 1.2558, "mha": 1.2648},
    200_000: {"xsqa": 0.8194, "sqa": 1.4116, "ssqa": 1.4824, "mqa": 2.8555, "gqa": 2.8596, "mha": 2.8734},
}
"""arXiv 2510.01817, forward pass of the published model on an A100: 131,072 tokens a step, one sequence of 200,000."""


def preprint_ratio(variant: str, baseline: str, n: int) -> float | None:
    """How many times faster than the baseline the preprint found a variant at N; None where it has no figure."""
    seconds = PREPRINT_SECONDS.get(n, {})
    return seconds[baseline] / seconds[variant] if {variant, baseline} <= seconds.keys() else None


def lengths_to(max_n: int) -> list[int]:
    """1,024, 2,048, 4,096 and so on, and at last `max_n` itself. Raises ValueError when that is below 1."""
    at_least_one(max_n=max_n)
    return [*itertools.takewhile(lambda n: n < max_n, (1024 << i for i in itertools.count())), max_n]


def run_prefill(
    *,
    preset: str = "published",
    variants: Sequence[str] = VARIANTS,
    peers: Sequence[str] = (),
    max_n: int = 16_384,
    dtype: str = "bf16",
    compile: bool = True,
    rounds: int = 5,
    device: str = "cpu",
    budget: float | None = None,
) -> BenchResult:
    """Time one forward pass of one sequence at N = 1,024, 2,048 ... `max_n`; contestants of one N take turns.

    Weights are in `dtype`; peers as in run_step. `budget` (seconds): longer N are left out when they would not fit.
    Raises ValueError for bad options.
    """
    lengths = lengths_to(max_n)
    at_least_one(variants=len(variants), rounds=rounds)
    where, torch_dtype, left = find_device(device), find_dtype(dtype), Budget(seconds=budget)
    configs = shapes(preset, variants, peers, length=max_n)
    baseline = choose_baseline(variants)
    runners, absent = line_up(configs, peers, compile=compile, device=where)
    for runner in runners:  # compared in fp32 first
        runner.entrant.module.to(torch_dtype).eval()
    notes = [
        f"ratio: {baseline}'s time over the variant's. FLOPs: the same of all matrix products (Amdahl); attention is "
        "slower for each FLOP than they are, so times can differ by more. preprint: on an A100, 131,072 tokens a step.",
    ]
    rows: list[Row] = []
    for n in left.fitting(lengths, notes):
        input_ids = torch.randint(configs[baseline].vocab_size, (1, n), device=where)
        best = measure(
            runners, absent if n == lengths[0] else {}, partial(_forward, input_ids), configs,
            kind="prefill", preset=preset, dtype=dtype, batch_size=1, n=n, rounds=rounds, device=where, budget=left,
        )  # fmt: skip
        for row in best:
            if row["implementation"] == OURS and "ratio" in row:
                flops = [cost.prefill_flops(configs[name], n) for name in (baseline, row["variant"])]
                row["limit"] = flops[0] / flops[1]
                printed = preprint_ratio(row["variant"], baseline, n)
                if preset == "published" and printed is not None:
                    row["preprint_ratio"] = printed
        rows += best
    options = {"preset": preset, "rounds": rounds, "compile": compile}
    return BenchResult.of(rows, device=device, settings=options, notes=notes)


def _forward(input_ids: torch.Tensor, runner: Runner) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        runner.entrant.last_logits(runner.module, input_ids)

    return run
