"""Timing, for everything that is timed: warm up all contestants, take turns, report median, p20 and p80."""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Self, TypeVar

import numpy as np
import torch

from sqa.errors import InputError

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one contestant's turns, over `rounds` rounds (0: not known, when read from a file).

    Raises InputError for a time that is not above 0.
    """

    p20: float
    median: float
    p80: float
    rounds: int = 0

    def __post_init__(self) -> None:
        for name in ("p20", "median", "p80"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")

    @classmethod
    def of(cls, seconds: list[float]) -> Self:
        """The timing of these turns, in seconds."""
        p20, median, p80 = np.quantile(seconds, (0.2, 0.5, 0.8)).tolist()
        return cls(p20=p20, median=median, p80=p80, rounds=len(seconds))

    def to_dict(self) -> dict[str, float]:
        """The seconds, as result files hold them."""
        return {"p20": self.p20, "median": self.median, "p80": self.p80}


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """A limit on time: seconds from the moment it is made; None is no limit."""

    seconds: float | None = None
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.seconds is not None and not self.seconds > 0:
            raise InputError(f"budget: seconds must be above 0, got {self.seconds}")

    @property
    def left(self) -> float:
        """Seconds not yet spent; negative when overspent."""
        return math.inf if self.seconds is None else self.start + self.seconds - time.monotonic()

    def fitting(self, lengths: Iterable[int], notes: list[str], what: str = "The budget") -> Iterator[int]:
        """Yield rising `lengths` while twice the time of the last one is left. A note names the first left out."""
        took = 0.0
        for n in lengths:
            before = self.left
            if before < 2 * took:
                notes.append(f"{what} was spent before N = {n:,}.")
                return
            yield n
            took = before - self.left  # nan without a limit, which compares as never too long


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done its work."""
    device = torch.device(device)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type == device.type:
        torch.accelerator.synchronize(device)


def take_turns(
    contestants: Mapping[Name, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    on_turn: Callable[[], None] = lambda: None,
    around: Callable[[Name], AbstractContextManager[None]] = lambda name: nullcontext(),
    limit: TimeLimit | None = None,
) -> dict[Name, Timing]:
    """Time each contestant `rounds` times, in turns, so that a machine that drifts slows all of them alike.

    All run `warmup` times before any is timed. Every other round runs in reverse, so that nobody always follows the
    same neighbour. `around` encloses each turn of a contestant, and `on_turn` is called after it, off the clock. With
    a limit, a round starts only if it fits into the time left; the first always runs, and all get equally many.
    """
    for name, run in contestants.items():
        for _ in range(warmup):
            with around(name):
                run()
            on_turn()
    seconds: dict[Name, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        if turn and limit is not None and limit.left < sum(times[-1] for times in seconds.values()):
            break
        for name in names if turn % 2 == 0 else reversed(names):
            with around(name):
                synchronize(device)
                start = time.perf_counter()
                contestants[name]()
                synchronize(device)
                seconds[name].append(time.perf_counter() - start)
            on_turn()
    return {name: Timing.of(values) for name, values in seconds.items()}
