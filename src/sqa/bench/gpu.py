"""`bench all`: everything worth knowing about one machine within a few minutes, in one file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sqa.bench.attention import run_attention
from sqa.bench.decode import run_decode
from sqa.bench.machine import find_device
from sqa.bench.prefill import run_prefill
from sqa.bench.report import BenchResult, Row
from sqa.bench.step import run_step
from sqa.bench.timing import Budget
from sqa.config import nearest

logger = logging.getLogger(__name__)

VARIANTS = ("gqa", "sqa", "xsqa", "wide-gqa")
COMPARE_SHARE = 3 / 8
"""Of the whole budget, for the comparison: 3 of 8 minutes."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large each part is."""

    num_heads: int
    head_dims: tuple[int, ...]
    lengths: tuple[int, ...]
    kernels: tuple[str, ...]
    flex_lengths: tuple[int, ...]
    preset: str
    batch_sizes: tuple[int, ...]
    step_length: int
    max_n: int
    decode_lengths: tuple[int, ...]
    compile: bool


SIZES = {
    "full": Sizes(
        num_heads=16,
        head_dims=(16, 64, 128),
        lengths=(1024, 4096, 16_384, 65_536, 131_072),
        kernels=("flash", "cudnn", "efficient"),
        flex_lengths=(8192, 65_536),
        preset="published",
        batch_sizes=(8, 32, 128),
        step_length=1024,
        max_n=200_000,
        decode_lengths=(1024, 32_768),
        compile=True,
    ),
    "tiny": Sizes(
        num_heads=8,
        head_dims=(16,),
        lengths=(64, 128),
        kernels=("flash", "math"),
        flex_lengths=(),
        preset="demo",
        batch_sizes=(1, 2),
        step_length=32,
        max_n=64,
        decode_lengths=(32,),
        compile=False,
    ),
}


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
        raise ValueError(f"size: {size!r} is unknown{nearest(size, list(SIZES))} (sizes: {', '.join(SIZES)})")
    find_device(device)
    sizes, whole = SIZES[size], Budget(seconds=budget)
    reserved = COMPARE_SHARE * budget if compare is not None else 0.0
    attention = partial(run_attention, variants=VARIANTS, num_heads=sizes.num_heads, device=device)
    step = partial(run_step, preset=sizes.preset, variants=VARIANTS, dtypes=("bf16",), length=sizes.step_length)
    parts: dict[str, Callable[..., BenchResult]] = {}
    for d in sizes.head_dims:
        parts[f"attention, head_dim {d}"] = partial(
            attention, lengths=sizes.lengths, d_model=d * sizes.num_heads, kernels=sizes.kernels
        )
    for batch_size in sizes.batch_sizes:
        parts[f"step, batch {batch_size}"] = partial(step, batch_size=batch_size, compile=sizes.compile, device=device)
    parts["prefill"] = partial(
        run_prefill, preset=sizes.preset, max_n=sizes.max_n, compile=sizes.compile, device=device
    )
    parts["decode"] = partial(run_decode, preset=sizes.preset, lengths=sizes.decode_lengths, device=device)
    # compiled and tuned for every shape, which takes long: last
    for d in sizes.head_dims if sizes.flex_lengths else ():
        parts[f"attention with flex, head_dim {d}"] = partial(
            attention, lengths=sizes.flex_lengths, d_model=d * sizes.num_heads, kernels=("flex",)
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
            notes[f"{name} failed: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"] = None
        else:
            rows += result.rows
            notes |= dict.fromkeys(result.header["notes"])
        torch.compiler.reset()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    if compare is not None:
        rows += compare(max(whole.left, 1.0))
    return BenchResult.of(rows, device=device, settings={"size": size, "budget": budget}, notes=tuple(notes))
