"""The record of one measurement of a benchmark, and what compares measurements."""

import itertools
import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from sqa.errors import first_line
from sqa.measure.peak import Peak
from sqa.measure.timing import TimeLimit, Timing, synchronize, take_turns
from sqa.variants import BASELINE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One contestant in one setting. A field that does not apply is None.

    `seconds` is the time of one turn; without it, `note` says why. `ratio` is the time of the variant `baseline` over
    this one's. `share_of_peak` is the rate as a share of a large matrix product's in the same run, and
    `share_of_processor` as a share of the processor's own multiply-adds. `tried` holds the medians of all settings of
    the contestant, of which this is the best.
    """

    kind: str
    preset: str | None = None
    d_model: int | None = None
    implementation: str | None = None
    variant: str
    num_query_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    batch_size: int | None = None
    n: int | None = None
    dtype: str | None = None
    mask: str | None = None
    window: int | None = None
    kernel: str | None = None
    what: str | None = None
    scores: int | None = None
    flops: int | None = None
    limit_seconds: float | None = None
    setting: str | None = None
    checked: bool | None = None
    note: str | None = None
    seconds: Timing | None = None
    tokens_per_s: float | None = None
    tried: Mapping[str, float] | None = None
    ratio: float | None = None
    baseline: str | None = None
    flops_per_s: float | None = None
    share_of_peak: float | None = None
    share_of_processor: float | None = None
    limit: float | None = None
    share_of_limit: float | None = None
    ratio_to_full: float | None = None
    ratio_to_sdpa: float | None = None
    ratio_to_peer: float | None = None
    preprint_ratio: float | None = None
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    memory_to_peer: float | None = None
    loss: float | None = None
    steps: int | None = None
    tokens: int | None = None

    @property
    def heads(self) -> str:
        """Hq/HkvxD."""
        return f"{self.num_query_heads}/{self.num_kv_heads}x{self.head_dim}"

    @property
    def median(self) -> float:
        """Seconds, of a measurement that has them."""
        assert self.seconds is not None
        return self.seconds.median

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None, for result files, with `rounds` beside `seconds`."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        if self.seconds is not None:
            values |= {"seconds": self.seconds.to_dict(), "rounds": self.seconds.rounds}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s output. Raises KeyError, TypeError or ValueError for anything else."""
        given = dict(values)
        rounds = given.pop("rounds", 0)
        if "seconds" in given:
            given["seconds"] = Timing(**given["seconds"], rounds=rounds)
        return cls(**given)


Contestant = tuple[Measurement, Callable[[], Callable[[], object]] | None]
"""What is known before timing, and what makes the call to time; None if the measurement already has a note."""


def time_all(
    contestants: Iterable[Contestant], *, rounds: int, warmup: int, device: torch.device, limit: TimeLimit
) -> list[Measurement]:
    """Time all contestants in turns: each measurement with its time, or a note why it cannot be made or run."""
    measured: list[Measurement] = []
    running: dict[int, Callable[[], object]] = {}
    for measurement, make in contestants:
        if make is not None:
            try:
                run = make()
                run()
                synchronize(device)
                running[len(measured)] = run
            except RuntimeError as error:  # the kernel cannot do the shape, memory, no compiler
                measurement = replace(measurement, note=f"cannot run: {first_line(error)}")
        measured.append(measurement)
    turns = itertools.count(1)

    def tell() -> None:
        logger.info("timing: turn %d of at most %d", next(turns), (warmup + rounds) * len(running))

    timings = take_turns(running, rounds=rounds, warmup=warmup, device=device, limit=limit, on_turn=tell)
    for index, timing in timings.items():
        measured[index] = replace(measured[index], seconds=timing)
    return measured


def with_ratios(
    measurements: Sequence[Measurement], *, same: Callable[[Measurement], Hashable], baseline: str
) -> list[Measurement]:
    """Set `ratio` where the variant `baseline` was timed too, among measurements with the same value of `same`."""
    times = {same(m): m.median for m in measurements if m.seconds is not None and m.variant == baseline}
    return [
        replace(m, ratio=times[same(m)] / m.median, baseline=baseline)
        if m.seconds is not None and same(m) in times
        else m
        for m in measurements
    ]


def with_shares(m: Measurement, flops: int, peak: Peak) -> Measurement:
    """Set the shares of the peaks that a turn of so many FLOPs reached, if it was timed."""
    if m.seconds is None:
        return m
    rate = flops / m.median
    processor = None if peak.processor is None else rate / peak.processor
    return replace(m, share_of_peak=rate / peak.product, share_of_processor=processor)


def choose_baseline(variants: Collection[str]) -> str:
    """The variant that ratios compare with: BASELINE if it takes part, else the first."""
    return BASELINE if BASELINE in variants else next(iter(variants))
