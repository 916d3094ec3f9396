"""The curves of a run as TensorBoard event files, readable while it trains. Needs the extra `track`."""

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from sqa.progress import StepReport
from sqa.training.loop import Recipe, learning_rate


class TensorBoard:
    """`loss`, `learning_rate` and `tokens_per_s` of each step of one run, then `validation_loss`.

    A process writes one file. It says from which step on the earlier files are void, since a run that is resumed trains
    the steps after its checkpoint again.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # tensorboard's own writers put the name of the host into that of the file
        self._path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._recipe = recipe
        self._last: StepReport | None = None
        self._write(Event(file_version="brain.Event:2"))

    def step(self, report: StepReport) -> None:
        """Write the figures of a step."""
        values = {"loss": report.loss, "learning_rate": learning_rate(self._recipe, report.step - 1)}
        if self._last is None:
            self._write(Event(step=report.step, session_log=SessionLog(status=SessionLog.START)))
        else:
            seconds = report.seconds - self._last.seconds
            values["tokens_per_s"] = (report.tokens - self._last.tokens) / seconds
        self._last = report
        self._add(report.step, values)

    def finish(self, validation_loss: float) -> None:
        """Write the loss of the validation text, nats a token, at the last step."""
        self._add(self._recipe.steps, {"validation_loss": validation_loss})

    def _add(self, step: int, values: dict[str, float]) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._write(Event(step=step, summary=summary))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with open(self._path, "ab") as file:
            RecordWriter(file).write(event.SerializeToString())
