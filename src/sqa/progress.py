"""What long work tells while it runs, and how it is asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a progress display is told after each step. `tokens` and `seconds` count the whole run so far."""

    step: int
    loss: float
    tokens: int
    seconds: float


class Display(Protocol):
    """What a long job tells while it runs, a phase at a time."""

    def note(self, text: str) -> None:
        """One line of what is being done."""

    def start(self, label: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def step(self, report: StepReport | None) -> None:
        """A step of the phase is done; no report where nothing is trained."""

    def finish(self, text: str) -> None:
        """The phase is over."""

    def beside(self) -> Display:
        """A display for another phase at the same time, in the same view."""


class Silent:
    """A display that shows nothing."""

    def note(self, text: str) -> None: ...

    def start(self, label: str, steps: int) -> None: ...

    def step(self, report: StepReport | None) -> None: ...

    def finish(self, text: str) -> None: ...

    def beside(self) -> Silent:
        return self


class NonFiniteLoss(RuntimeError):
    """The loss became nan or infinite; the run stops here, others may go on."""


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved a checkpoint."""


class StopFlag:
    """Set by SIGTERM or Ctrl-C; the run in progress saves and ends."""

    signal: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt  # asked twice: do not wait for the step to end
        self.signal = number


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """A flag that SIGTERM and Ctrl-C set inside the block."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
