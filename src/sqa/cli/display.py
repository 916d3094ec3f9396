"""What commands print: tables, and the progress of long work, a live bar in a terminal and plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sqa.progress import Display, Interrupted, StepReport

TABLE_WIDTH = 80
"""Every table fits it. A narrower terminal wraps the lines: cutting them would change figures."""


SILENCE = 10.0
"""Seconds after which a display in a file says how far it is."""


class OutputClosed(Interrupted):
    """The other end of a pipe has closed standard output: nobody reads on."""


def output_closed() -> OutputClosed:
    """The error to raise after a BrokenPipeError; what is still written to standard output goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return OutputClosed("standard output was closed by its reader")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process without a word. It writes nothing more after this."""
        self.quiet = True
        raise output_closed()


def is_main() -> bool:
    """Whether this process prints and writes: the first of those that torchrun or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def make_console() -> Console:
    """Standard output for tables and text, of the first process alone."""
    console = _Console(quiet=not is_main())
    console.width = max(console.width, TABLE_WIDTH)
    return console


class Heartbeat(logging.Handler):
    """Says on standard error what is logged, once there was silence for half of SILENCE seconds."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._spoke = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() - self._spoke >= SILENCE / 2:
            print(self.format(record), file=sys.stderr, flush=True)
            self._spoke = time.monotonic()


class LiveDisplay:
    """One bar: variant, step, loss, tokens a second, time left."""

    def __init__(self, console: Console, progress: Progress | None = None) -> None:
        self._progress = progress or Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            expand=True,
        )
        self._console = console
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def start(self, label: str, steps: int) -> None:
        self._progress.start()
        self._task = self._progress.add_task(label, total=steps, figures="")
        self._speed = _Speed()

    def step(self, report: StepReport | None) -> None:
        assert self._task is not None
        if report is None:
            self._progress.advance(self._task)
            return
        figures = f"loss {report.loss:.3f}  {self._speed.of(report):,.0f} tok/s"
        self._progress.update(self._task, completed=report.step, figures=figures)

    def finish(self, text: str) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        if not self._progress.tasks:
            self._progress.stop()
        self.note(text)

    def beside(self) -> LiveDisplay:
        """Another bar under this one."""
        return LiveDisplay(self._console, self._progress)


class PlainDisplay:
    """A line at the start and the end of a phase, at every tenth of it, and after SILENCE seconds without one."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)
        self._spoke = time.monotonic()

    def start(self, label: str, steps: int) -> None:
        self._label, self._steps, self._shown, self._done = label, steps, 0, 0
        self._speed = _Speed()
        self.note(f"{label}: {steps} steps")

    def step(self, report: StepReport | None) -> None:
        self._done = report.step if report else self._done + 1
        tenth = 10 * self._done // self._steps
        speed = self._speed.of(report) if report else 0.0
        long_silent = time.monotonic() - self._spoke > SILENCE
        if tenth <= self._shown and not long_silent:
            return
        self._shown = tenth
        if report is None:
            if long_silent:
                self.note(f"{self._label}: step {self._done}/{self._steps}")
        else:
            left = (self._steps - report.step) * self._speed.step_seconds
            self.note(
                f"{self._label}: step {report.step}/{self._steps}  loss {report.loss:.3f}  "
                f"{speed:,.0f} tok/s  {left:,.0f} s left"
            )

    def finish(self, text: str) -> None:
        self.note(text)

    def beside(self) -> PlainDisplay:
        """For another phase at the same time."""
        return PlainDisplay(self._console)


class _Speed:
    """Tokens a second and seconds a step since this process began the run (a resumed run has earlier ones)."""

    def __init__(self) -> None:
        self._first: StepReport | None = None
        self.step_seconds = 0.0

    def of(self, report: StepReport) -> float:
        if self._first is None or report.step <= self._first.step:  # a lost run goes on from further back
            self._first = report
            return report.tokens / max(report.seconds, 1e-9)
        seconds = report.seconds - self._first.seconds
        self.step_seconds = seconds / (report.step - self._first.step)
        return (report.tokens - self._first.tokens) / max(seconds, 1e-9)


def make_display() -> Display:
    """A display on standard output, as it suits a terminal or a file."""
    console = _Console(quiet=not is_main())
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
