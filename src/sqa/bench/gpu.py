"""`bench all`: everything worth knowing about one machine within a few minutes, in one file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from sqa.bench.attention import run_attention
from sqa.bench.decode import run_decode
from sqa.bench.prefill import run_prefill
from sqa.bench.report import BenchResult, Row
from sqa.bench.step import run_step
from sqa.config import unknown
from sqa.measure.machine import find_device
from sqa.measure.timing import Budget, first_line

logger = logging.getLogger(__name__)

VARIANTS = ("gqa", "sqa", "xsqa", "wide-gqa")
SIZES = ("full", "tiny")
COMPARE_SHARE = 3 / 8
"""Of the whole budget, for the comparison: 3 of 8 minutes."""


def run_all(
    *,
    device: str = "cuda",
    budget: float = 480.0,
    size: str = "full",
    compare: Callable[[float], list[Row]] | None = None,
) -> BenchResult:
    """Attention with every kernel pinned and checked, training steps, prefill, decoding, and a comparison.

    Each part gets a share of the `budget` (seconds) and stops when that is spent. `compare(seconds)` trains variants
    for so long and returns its rows. A part that fails becomes a row with a note, and the others still run. Needs
    neither a network nor `datasets`. Raises ValueError for an unknown size or a device that is not there.
    """
    if size not in SIZES:
        raise unknown("size", size, SIZES)
    find_device(device)
    whole, full = Budget(seconds=budget), size == "full"
    reserved = COMPARE_SHARE * budget if compare is not None else 0.0
    num_heads, head_dims = (16, (16, 64, 128)) if full else (8, (16,))
    preset = "published" if full else "demo"
    attention = partial(run_attention, variants=VARIANTS, num_heads=num_heads, device=device)
    lengths = (1024, 4096, 16_384, 65_536, 131_072) if full else (64, 128)
    kernels = ("flash", "cudnn", "efficient") if full else ("flash", "math")
    step = partial(run_step, preset=preset, variants=VARIANTS, dtypes=("bf16",), compile=full, device=device)
    parts: dict[str, Callable[..., BenchResult]] = {}
    for d in head_dims:
        parts[f"attention, head_dim {d}"] = partial(attention, lengths=lengths, d_model=d * num_heads, kernels=kernels)
    for b in (8, 32, 128) if full else (1, 2):
        parts[f"step, batch {b}"] = partial(step, batch_size=b, length=1024 if full else 32)
    parts["prefill"] = partial(run_prefill, preset=preset, max_n=200_000 if full else 64, compile=full, device=device)
    parts["decode"] = partial(run_decode, preset=preset, lengths=(1024, 32_768) if full else (32,), device=device)
    # compiled and tuned for every shape, which takes long: last
    for d in head_dims if full else ():
        parts[f"attention with flex, head_dim {d}"] = partial(
            attention, lengths=(8192, 65_536), d_model=d * num_heads, kernels=("flex",)
        )
    rows: list[Row] = []
    notes: dict[str, None] = {}
    for done, (name, part) in enumerate(parts.items()):
        left = whole.left - reserved
        if left <= 0:
            notes[f"The budget was spent before: {', '.join(list(parts)[done:])}."] = None
            break
        logger.info("%s: %.0f s left", name, left)
        try:
            # a share and a half: parts that stop early leave time to others
            result = part(budget=min(left, 1.5 * left / (len(parts) - done)))
        except Exception as error:  # far from whoever can fix it, the other parts are worth having
            logger.exception("%s failed", name)
            notes[f"{name} failed: {type(error).__name__}: {first_line(error)}"] = None
        else:
            rows += result.rows
            notes |= dict.fromkeys(result.header["notes"])
        torch.compiler.reset()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    if compare is not None:
        rows += compare(max(whole.left, 1.0))
    return BenchResult.of(rows, device=device, settings={"size": size, "budget": budget}, notes=notes)
