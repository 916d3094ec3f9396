"""The output of commands: tables, and progress as a live bar in a terminal or as plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from sqa.progress import Display, Interrupted, StepReport, lasting

TABLE_WIDTH = 80
"""Columns that every table fits. A narrower terminal wraps the lines: cutting them would change figures."""

SILENCE = 10.0
"""Seconds without a word after which a command says what it is doing."""


class OutputClosed(Interrupted):
    """The reader of standard output has closed it."""


def output_closed() -> OutputClosed:
    """The error to raise after a BrokenPipeError. Further writes to standard output are discarded."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return OutputClosed("standard output was closed by its reader")


class _Console(Console):
    """A console that prints text unchanged: no markup in brackets, no emoji for `:key:`, no coloured numbers."""

    def __init__(self) -> None:
        super().__init__(quiet=not is_main(), markup=False, emoji=False, highlight=False)

    def on_broken_pipe(self) -> None:
        """Rich would end the process without a word. It writes nothing more after this."""
        self.quiet = True
        raise output_closed()


def is_main() -> bool:
    """Whether this process prints and writes: it is the first that torchrun or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def make_console() -> Console:
    """Standard output for tables and text, silent in all processes but the first."""
    console = _Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console


class Pulse:
    """Calls `remind` from a thread, inside the `with` block, whenever nothing was heard for SILENCE seconds.

    If `remind` finds standard output closed, the next call of `heard` raises OutputClosed.
    """

    def __init__(self, remind: Callable[[], None]) -> None:
        self._remind, self._over = remind, threading.Event()
        self._last, self._closed = time.monotonic(), False

    def heard(self) -> None:
        """Count the silence from now on."""
        if self._closed:
            raise output_closed()
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(max(0.1, self._last + SILENCE - time.monotonic())):
            if time.monotonic() - self._last < SILENCE:
                continue
            self._last = time.monotonic()
            try:
                self._remind()
            except OutputClosed:
                self._closed = True
                return

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


class LogSpeaker(logging.Handler):
    """Prints log records on standard error, at most one in `pause` seconds; after a silence, the last one again."""

    def __init__(self, pause: float) -> None:
        super().__init__(logging.INFO)
        self.pulse, self._pause = Pulse(self._remind), pause
        self._latest, self._since, self._spoke = "preparing", time.monotonic(), time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self._latest, self._since = self.format(record), time.monotonic()
        if self._since - self._spoke >= self._pause:
            self._say(self._latest)
            self.pulse.heard()

    def _remind(self) -> None:
        self._say(_so_far(self._latest, self._since))

    def _say(self, text: str) -> None:
        self._spoke = time.monotonic()
        # sys.stderr as it is now: a live bar replaces it, so that lines stand above the bar
        print(text, file=sys.stderr, flush=True)


def say_what_is_logged(name: str) -> None:
    """Print the records of this logger on standard error from now on."""
    logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger(name).addHandler(LogSpeaker(pause=0))


def speak_of(name: str) -> Pulse:
    """Give this logger a LogSpeaker alone. In the `with` block of the result, it also prints reminders."""
    logger, speaker = logging.getLogger(name), LogSpeaker(pause=SILENCE / 2)
    logger.setLevel(logging.INFO)
    logger.handlers[:] = [speaker]
    return speaker.pulse


def _so_far(text: str, since: float) -> str:
    return f"{text}, {lasting(time.monotonic() - since)} so far"


class _Voice:
    """What displays of one view share: standard output, and reminders after a long silence."""

    def __init__(self, console: Console) -> None:
        self.console, self._whole = console, not console.is_terminal  # a file keeps lines whole
        self.pulse = Pulse(self._remind)
        self.phases: dict[_SpeakingDisplay, None] = {}
        self._latest, self._since = "preparing", time.monotonic()

    def say(self, text: str) -> None:
        self.pulse.heard()
        self.console.print(text, soft_wrap=self._whole)
        self._latest, self._since = text, time.monotonic()

    def _remind(self) -> None:
        lines = [phase.state() for phase in list(self.phases)] or [_so_far(self._latest, self._since)]
        for line in lines:
            if line is not None:
                self.console.print(line, soft_wrap=self._whole)


class _SpeakingDisplay(Display):
    """A display that prints notes and reminders. It is used in a `with` block."""

    def __init__(self, console: Console, beside: Self | None = None) -> None:
        self._voice: _Voice = beside._voice if beside else _Voice(console)

    def __enter__(self) -> Self:
        self._voice.pulse.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._voice.pulse.__exit__()

    def note(self, text: str) -> None:
        self._voice.say(text)

    def state(self) -> str | None:
        """What a reminder says of the phase. Nothing by default."""
        return None

    def beside(self) -> Self:
        """A display in the same view, for another phase at the same time."""
        return type(self)(self._voice.console, self)


class _Lasting(ProgressColumn):
    """The time left, or if that is not known the time since the last step."""

    def render(self, task: Task) -> Text:
        if task.time_remaining and not task.finished:
            return Text(f"{lasting(task.time_remaining)} left")
        return Text(lasting(time.monotonic() - task.fields["moved"]))


class LiveDisplay(_SpeakingDisplay):
    """One bar: variant, step, loss, tokens a second, time left. While it moves, no reminder is needed."""

    def __init__(self, console: Console, beside: LiveDisplay | None = None) -> None:
        super().__init__(console, beside)
        self._progress: Progress = beside._progress if beside else Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            _Lasting(),
            console=console,
            transient=True,
            expand=True,
        )  # fmt: skip
        self._task: TaskID | None = None

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        self._progress.stop()

    def start(self, label: str, steps: int) -> None:
        self._clear()  # a phase may be interrupted by another one
        self._progress.start()
        self._task = self._progress.add_task(label, total=steps, figures="", moved=time.monotonic())
        self._speed = _Speed()
        self._voice.phases[self] = None

    def step(self, report: StepReport | None) -> None:
        assert self._task is not None
        if report is None:
            self._progress.update(self._task, advance=1, moved=time.monotonic())
            return
        figures = f"loss {report.loss:.3f}  {self._speed.of(report):,.0f} tok/s"
        self._progress.update(self._task, completed=report.step, figures=figures, moved=time.monotonic())

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
            del self._voice.phases[self]

    def finish(self, text: str) -> None:
        self._clear()
        if not self._progress.tasks:
            self._progress.stop()
        if text:
            self.note(text)


class PlainDisplay(_SpeakingDisplay):
    """Prints a line at the start, each tenth and the end of a phase, and after SILENCE seconds without one."""

    def start(self, label: str, steps: int) -> None:
        self._label, self._steps, self._tenth, self._done = label, steps, 0, 0
        self._report: StepReport | None = None
        self._speed, self._since = _Speed(), time.monotonic()
        self.note(f"{label}: {steps} step{'s' * (steps != 1)}")
        self._voice.phases[self] = None

    def step(self, report: StepReport | None) -> None:
        self._done = report.step if report else self._done + 1
        if report is None:
            return
        self._report, self._rate = report, self._speed.of(report)
        if (tenth := 10 * self._done // self._steps) > self._tenth:
            self._tenth = tenth
            self.note(self.state())

    def state(self) -> str:
        """How far the phase is. The first line after a step has its loss, later ones the time since the phase began."""
        where, to_do = f"{self._label}: step {self._done}/{self._steps}", self._steps - self._done
        report, self._report = self._report, None
        if report is not None:
            left = lasting(to_do * self._speed.step_seconds)
            return f"{where}  loss {report.loss:.3f}  {self._rate:,.0f} tok/s  {left} left"
        seconds = time.monotonic() - self._since
        a_step = self._speed.step_seconds or seconds / max(self._done, 1)
        left = f", {lasting(to_do * a_step)} left" if self._done and to_do else ""
        return f"{where}, {lasting(seconds)} so far{left}"

    def finish(self, text: str) -> None:
        self._voice.phases.pop(self, None)
        if text:
            self.note(text)


class _Speed:
    """Tokens a second and seconds a step since this process began the run, without those before it was resumed.

    After the first step of this process, they are those of the whole run.
    """

    def __init__(self) -> None:
        self._first: StepReport | None = None
        self.step_seconds = 0.0

    def of(self, report: StepReport) -> float:
        if self._first is None or report.step <= self._first.step:  # a lost run goes on from further back
            self._first, self.step_seconds = report, report.seconds / report.step
            return report.tokens / max(report.seconds, 1e-9)
        seconds = report.seconds - self._first.seconds
        self.step_seconds = seconds / (report.step - self._first.step)
        return (report.tokens - self._first.tokens) / max(seconds, 1e-9)


def make_display() -> LiveDisplay | PlainDisplay:
    """A display on standard output for a `with` block: a bar in a terminal, else lines."""
    console = _Console()
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
