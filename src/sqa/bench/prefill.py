"""Benchmark of prefill, as in the preprint: a forward pass over N tokens, with the last position's logits only."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from sqa import cost
from sqa.bench.lineup import LineUp, Models, Runner, Task, line_up, measure
from sqa.bench.measurement import Measurement, choose_baseline, with_shares
from sqa.bench.peers import OURS, check_peers
from sqa.bench.report import BenchResult
from sqa.config import ModelConfig
from sqa.dtypes import find_dtype
from sqa.measure.machine import find_device
from sqa.measure.peak import Peak, measure_peak
from sqa.measure.timing import TimeLimit
from sqa.records import at_least_one

PREPRINT_SECONDS: dict[int, dict[str, float]] = {
    1_024: {"xsqa": 0.0570, "sqa": 0.0642, "ssqa": 0.0669, "mqa": 0.0760, "gqa": 0.0785, "mha": 0.0869},
    4_096: {"xsqa": 0.0637, "sqa": 0.0750, "ssqa": 0.0793, "mqa": 0.1001, "gqa": 0.1027, "mha": 0.1114},
    32_768: {"xsqa": 0.1348, "sqa": 0.1991, "ssqa": 0.2117, "mqa": 0.3612, "gqa": 0.3637, "mha": 0.3727},
    131_072: {"xsqa": 0.3759, "sqa": 0.6308, "ssqa": 0.6630, "mqa": 1.2530, "gqa": 1.2558, "mha": 1.2648},
    200_000: {"xsqa": 0.8194, "sqa": 1.4116, "ssqa": 1.4824, "mqa": 2.8555, "gqa": 2.8596, "mha": 2.8734},
}
"""arXiv 2510.01817, forward pass of the published model on an A100: 131,072 tokens a step, one sequence of 200,000."""


def preprint_ratio(variant: str, baseline: str, n: int) -> float | None:
    """The baseline's time over a variant's in the preprint; None if it has no figure for N."""
    seconds = PREPRINT_SECONDS.get(n, {})
    return seconds[baseline] / seconds[variant] if {variant, baseline} <= seconds.keys() else None


def run_prefill(
    models: Models,
    *,
    peers: Sequence[str] = (),
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16_384),
    dtype: str = "bf16",
    compile: bool = True,
    rounds: int = 5,
    device: str = "cpu",
    budget: float | None = None,
) -> BenchResult:
    """Time one forward pass of one sequence of each length, logits of the last position only; all take turns.

    Weights are in `dtype`; peers as in run_step, and llama.cpp with weights in F32, BF16 and Q8_0, of which the best
    counts. `budget` (seconds): longer N are left out when they would not fit. Raises InputError for bad options.
    """
    at_least_one("benchmark", lengths=min(lengths, default=0), rounds=rounds)
    check_peers(peers, training=False)
    where, torch_dtype, limit = find_device(device), find_dtype(dtype), TimeLimit(seconds=budget)
    models = models.fitted(max(lengths), peers)
    configs = models.configs
    baseline = choose_baseline(configs)
    peak = measure_peak(torch_dtype, where)
    lineup = line_up(models, peers, compile=compile, device=where)
    for runner in lineup.runners:  # line_up has compared them in fp32
        runner.entrant.module.to(torch_dtype).eval()
    notes = [f"{dtype}: {peak}"]
    if len(configs) > 1:
        notes.append(
            f"ratio: {baseline}'s time over the variant's. FLOPs: the same of all matrix products (Amdahl); attention "
            "is slower for each FLOP than they are, so times can differ by more. preprint: on an A100, 131,072 tokens "
            "a step."
        )
    rows: list[Measurement] = []
    for n in limit.fitting(sorted(lengths), notes):
        input_ids = torch.randint(models.vocab_size, (1, n), device=where)
        task = Task(kind="prefill", preset=models.name, dtype=dtype, batch_size=1, n=n, device=where)
        taking_part = lineup if n == min(lengths) else LineUp(lineup.runners, {})
        best = measure(taking_part, task, partial(_forward, input_ids), configs, rounds=rounds, limit=limit)
        rows += (_compared(m, configs, baseline, n, peak) for m in best)
    options = {"preset": models.name, "rounds": rounds, "compile": compile}
    return BenchResult.of(rows, device=device, settings=options, notes=notes)


def _compared(m: Measurement, configs: Mapping[str, ModelConfig], baseline: str, n: int, peak: Peak) -> Measurement:
    """Add the shares of the peak and, to our own, the ratios of the FLOPs and of the preprint."""
    flops = {name: cost.prefill_flops(configs[name], n) for name in (baseline, m.variant)}
    m = with_shares(m, flops[m.variant], peak)
    if m.implementation != OURS or m.ratio is None or len(configs) == 1:
        return m
    printed = preprint_ratio(m.variant, baseline, n) if m.preset == "published" else None
    return replace(m, limit=flops[baseline] / flops[m.variant], preprint_ratio=printed)


def _forward(input_ids: torch.Tensor, runner: Runner) -> Callable[[], None]:
    @torch.inference_mode()
    def run() -> None:
        runner.entrant.last_logits(runner.module, input_ids)

    return run
