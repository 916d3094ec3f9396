"""Progress reports of long work, and how it is asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from sqa.records import check_least

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The report of a training step for displays. `tokens` and `seconds` count the whole run so far."""

    step: int
    loss: float
    tokens: int
    seconds: float

    def __post_init__(self) -> None:
        check_least(self, 1, "step")
        check_least(self, 0, "tokens", "seconds")


class Display:
    """Shows the progress of long work, one phase after another. This class itself shows nothing."""

    def note(self, text: str) -> None:
        """Show one line of text."""

    def start(self, label: str, steps: int) -> None:
        """Begin a phase of `steps` steps."""

    def step(self, report: StepReport | None) -> None:
        """Count one step of the phase; `report` is None where nothing is trained."""

    def finish(self, text: str) -> None:
        """End the phase, and show a line of text unless it is empty."""

    def beside(self) -> Display:
        """A display in the same view, for a phase that runs at the same time."""
        return self


def lasting(seconds: float) -> str:
    """A duration in words: "42 s", "3 min" or "1 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def interruptible(call: Callable[[], T]) -> T:
    """Run a library's long call so that Ctrl-C ends the waiting at once, and return its result.

    The call runs in a daemon thread, which goes on after an interruption. The library must release Python's lock.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not wait([future], timeout=0.1).done:
        pass
    return future.result()


class NonFiniteLoss(RuntimeError):
    """The loss became nan or infinite; the run stops here, others may go on."""


class Interrupted(RuntimeError):
    """The work was asked to stop, and can go on from what it has saved."""


class StopFlag:
    """Handles SIGTERM and Ctrl-C. They end the work at once, which leaves only whole files on disk.

    In a `held()` block the first signal only sets `signal`, so that the work can save something before it ends. A
    second signal ends that too.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._held = False

    def __call__(self, number: int, frame: object) -> None:
        """Handle a signal. KeyboardInterrupt, because no `except Exception` of a library catches it."""
        again, self.signal = self.signal is not None, number
        if again or not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """In the block, the first signal sets `signal` and does nothing else."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """In the block, a signal raises Interrupted with this message; so does one that came before it."""
        before = self._held
        try:
            if self.signal is not None:
                raise KeyboardInterrupt
            self._held = False
            yield
        except KeyboardInterrupt:
            raise Interrupted(message) from None
        finally:
            self._held = before


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Handle SIGTERM and Ctrl-C in the block: they end it with Interrupted, unless the flag is held."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with flag.at_once("stopped"):
            yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
