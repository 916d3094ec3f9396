"""All benchmarks of one machine within a few minutes, in one file, with GQA and SQA trained for comparison."""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from sqa.bench.attention import run_attention
from sqa.bench.decode import run_decode
from sqa.bench.lineup import Models
from sqa.bench.measurement import Measurement
from sqa.bench.prefill import run_prefill
from sqa.bench.report import BenchResult
from sqa.bench.step import run_step
from sqa.config import unknown
from sqa.errors import first_line
from sqa.experiments.compare import compare
from sqa.experiments.plan import Plan
from sqa.measure.machine import find_device
from sqa.measure.timing import TimeLimit
from sqa.progress import Display, Interrupted

logger = logging.getLogger(__name__)

SIZES = ("full", "tiny")
COMPARE_SHARE = 3 / 8
"""The share of the budget for the comparison: 3 of 8 minutes."""


def measure_everything(
    display: Display, *, device: str = "cuda", budget: float = 480.0, size: str = "full"
) -> BenchResult:
    """Attention with every kernel pinned and checked, training steps, prefill, decoding, and a comparison.

    Each part gets a share of the `budget` (seconds) and stops when that is spent. A part that fails becomes a note, and
    the others still run. Needs no network and no `datasets`. Raises InputError, before anything is measured, for an
    unknown size and for a device that is missing or that a plan cannot name.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    find_device(device)
    plan = Plan.read("demo").replace(variants=("gqa", "sqa"), device=device, dtype="bfloat16")
    whole = TimeLimit(seconds=budget)
    parts = _parts(device, full=size == "full")
    rows: list[Measurement] = []
    notes: dict[str, None] = {}
    for done, (name, part) in enumerate(parts.items()):
        left = whole.left - COMPARE_SHARE * budget
        if left <= 0:
            notes[f"The budget was spent before: {', '.join(list(parts)[done:])}."] = None
            break
        display.note(f"{name}: {left:.0f} s left")
        with _noted(name, notes):
            # a share and a half: parts that stop early leave time to others
            result = part(budget=min(left, 1.5 * left / (len(parts) - done)))
            rows += result.rows
            notes |= dict.fromkeys(result.notes)
        torch.compiler.reset()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    if whole.left > 0:
        with _noted("comparison", notes):
            rows += _trained(display, plan, whole.left)
    return BenchResult.of(rows, device=device, settings={"size": size, "budget": budget}, notes=notes)


@contextmanager
def _noted(name: str, notes: dict[str, None]) -> Iterator[None]:
    """Add an error of the block to the notes: the other parts are still worth having."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        logger.exception("%s failed", name)
        notes[f"{name} failed: {type(error).__name__}: {first_line(error)}"] = None


def _parts(device: str, *, full: bool) -> dict[str, Callable[..., BenchResult]]:
    """The benchmarks by name, the most informative first; each takes a `budget`."""
    attention = partial(run_attention, num_heads=16 if full else 8, device=device)
    lengths = (1024, 4096, 16_384, 65_536, 131_072) if full else (64, 128)
    kernels = ("flash", "cudnn", "efficient") if full else ("flash", "math")
    models = Models.of_preset("published" if full else "demo")
    prompts = (1024, 4096, 16_384, 32_768, 131_072, 200_000) if full else (64,)
    parts: dict[str, Callable[..., BenchResult]] = {}
    for head_dim in (16, 64, 128) if full else (16,):
        name = f"attention, head_dim {head_dim}"
        parts[name] = partial(attention, lengths=lengths, head_dims=(head_dim,), kernels=kernels)
    for batch_size in (8, 32, 128) if full else (1, 2):
        parts[f"step, batch {batch_size}"] = partial(
            run_step, models, dtypes=("bf16",), compile=full, device=device, batch_size=batch_size,
            length=1024 if full else 32,
        )  # fmt: skip
    parts["prefill"] = partial(run_prefill, models, lengths=prompts, compile=full, device=device)
    parts["decode"] = partial(run_decode, models, lengths=(1024, 32_768) if full else (32,), device=device)
    if full:  # compiled and tuned for every shape, which takes long: last
        parts["attention with flex"] = partial(
            attention, lengths=(8192, 65_536), head_dims=(16, 64, 128), kernels=("flex",)
        )
    return parts


def _trained(display: Display, plan: Plan, seconds: float) -> Iterator[Measurement]:
    """Train the plan's two variants, each for a third of the time; timing and evaluation have the rest."""
    plan = plan.replace(budget=f"time={max(1, round(seconds / 3))}s")
    with tempfile.TemporaryDirectory() as folder:
        results = compare(plan, Path(folder) / "compare", display).results
    for result in results:
        yield Measurement(
            kind="compare",
            variant=result.variant,
            kernel=result.kernel,
            dtype=plan.dtype,
            loss=result.val.loss,
            steps=result.steps,
            tokens=result.tokens,
            seconds=result.step_s,
        )
