"""What long work tells while it runs, and how it is asked to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sqa.records import check_least

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a progress display is told after each step. `tokens` and `seconds` count the whole run so far."""

    step: int
    loss: float
    tokens: int
    seconds: float

    def __post_init__(self) -> None:
        check_least(self, 1, "step")
        check_least(self, 0, "tokens", "seconds")


class Display(Protocol):
    """What a long job tells while it runs, a phase at a time."""

    def note(self, text: str) -> None:
        """One line of what is being done."""

    def start(self, label: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def step(self, report: StepReport | None) -> None:
        """A step of the phase is done; no report where nothing is trained."""

    def finish(self, text: str) -> None:
        """The phase is over. An empty text says nothing."""

    def beside(self) -> Display:
        """A display for another phase at the same time, in the same view."""


def lasting(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


class Silent:
    """A display that shows nothing."""

    def note(self, text: str) -> None: ...

    def start(self, label: str, steps: int) -> None: ...

    def step(self, report: StepReport | None) -> None: ...

    def finish(self, text: str) -> None: ...

    def beside(self) -> Silent:
        return self


def interruptible(call: Callable[[], T]) -> T:
    """The result of a long call of a library that does not look for signals; they end the waiting, not the call.

    The call goes on in a thread that does not keep the process alive. The library must release Python's lock.
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
    """SIGTERM and Ctrl-C. They end the work at once: what is on disk is whole at any moment.

    In a block `held()` a signal only sets `signal`, for work that has something to save first and asks for it. A second
    signal ends that too.
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
        """Inside, the first signal sets `signal` and does nothing else."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Inside, and at the beginning if there was one, a signal raises Interrupted with this message."""
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
    """A flag that SIGTERM and Ctrl-C set inside the block, which they end with Interrupted unless it is held."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with flag.at_once("stopped"):
            yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
