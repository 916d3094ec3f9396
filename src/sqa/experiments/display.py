"""Progress of a comparison: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sqa.training.loop import StepReport


class LiveDisplay:
    """A bar a phase: variant, step, loss, tokens a second, time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
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
        self._phases: dict[str, tuple[TaskID, _Speed]] = {}

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def start(self, label: str, steps: int) -> None:
        self._progress.start()
        self._phases[label] = self._progress.add_task(label, total=steps, figures=""), _Speed()

    def step(self, label: str, report: StepReport | None) -> None:
        task, speed = self._phases[label]
        if report is None:
            self._progress.advance(task)
            return
        figures = f"loss {report.loss:.3f}  {speed.of(report):,.0f} tok/s"
        self._progress.update(task, completed=report.step, figures=figures)

    def finish(self, label: str, text: str) -> None:
        self._progress.remove_task(self._phases.pop(label)[0])
        if not self._phases:
            self._progress.stop()
        self.note(text)


class PlainDisplay:
    """A line at the start and the end of a phase, and at every tenth of it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phases: dict[str, _Phase] = {}

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def start(self, label: str, steps: int) -> None:
        self._phases[label] = _Phase(steps, _Speed())
        self.note(f"{label}: {steps} steps")

    def step(self, label: str, report: StepReport | None) -> None:
        phase = self._phases[label]
        phase.done = report.step if report else phase.done + 1
        tenth = 10 * phase.done // phase.steps
        speed = phase.speed.of(report) if report else 0.0
        if tenth <= phase.shown:
            return
        phase.shown = tenth
        if report is not None:
            left = (phase.steps - report.step) * phase.speed.step_seconds
            self.note(
                f"{label}: step {report.step}/{phase.steps}  loss {report.loss:.3f}  "
                f"{speed:,.0f} tok/s  {left:,.0f} s left"
            )

    def finish(self, label: str, text: str) -> None:
        del self._phases[label]
        self.note(text)


@dataclass
class _Phase:
    steps: int
    speed: _Speed
    done: int = 0
    shown: int = 0


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


def make_display(console: Console) -> LiveDisplay | PlainDisplay:
    """The display that fits the console."""
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)
