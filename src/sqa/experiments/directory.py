"""The directory of a comparison: its files, and the locks of the processes that work in it."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqa.errors import InputError
from sqa.experiments.plan import Cell, Plan
from sqa.experiments.results import Comparison, Record, RunResult
from sqa.files import LOCK, locked, sync_directory
from sqa.progress import StepReport
from sqa.records import differences, read_lines, to_json
from sqa.storage import in_file
from sqa.training.probes import Probe


@dataclass(frozen=True)
class Directory:
    """`plan.json`, written before training; `results.jsonl`, a line for each finished run; a folder for each run.

    Several processes may work in it, each on the cells that it has claimed.
    """

    path: Path

    def run_folder(self, variant: str, seed: int) -> Path:
        """The folder of a run, with its curve, probes, checkpoints and model."""
        return self.path / f"{variant}-{seed}"

    @property
    def begun(self) -> bool:
        """Whether a comparison was started here."""
        return (self.path / "plan.json").exists()

    def read(self) -> Comparison:
        """The comparison, as far as it has run. Raises InputError when there is none or a file is damaged."""
        with in_file(self.path):
            return Comparison(record=self.record(), results=self.results())

    def results(self) -> list[RunResult]:
        """The finished runs. Raises InputError for a damaged line, unless it is the last and torn."""
        advice = "remove it (a run without its result trains again)"
        return read_lines(RunResult, self.path / "results.jsonl", advice)

    def curve(self, cell: Cell) -> list[StepReport]:
        """A run's reports of its steps; none if the file is gone."""
        return self._lines(StepReport, cell, "curve.jsonl")

    def probes(self, cell: Cell) -> list[Probe]:
        """A run's probes; none if the plan has none."""
        return self._lines(Probe, cell, "probes.jsonl")

    def _lines(self, kind: type[Any], cell: Cell, name: str) -> list[Any]:
        return read_lines(kind, self.run_folder(*cell) / name, "delete the file to leave this run out of the figures")

    def finish(self, result: RunResult) -> None:
        """Add a finished run, synced before returning, and delete its checkpoints.

        A torn line that a crash left at the end is dropped.
        """
        path = self.path / "results.jsonl"
        with self.writing(), open(path, "ab") as file:
            before, newline, _ = path.read_bytes().rpartition(b"\n")
            file.truncate(len(before + newline))
            file.write(json.dumps(result, default=to_json).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            sync_directory(self.path)  # the file may be new
        shutil.rmtree(self.run_folder(*result.cell) / "checkpoints", ignore_errors=True)

    def record(self) -> Record:
        """plan.json. Raises InputError when there is none or it is damaged."""
        path = self.path / "plan.json"
        if not path.is_file():
            early = any(self.path.glob(".plan.json.*"))  # the name of a file that was to become it
            why = "; it was stopped before it had begun, start it without --resume" if early else " (no plan.json)"
            raise InputError(f"directory: {self.path} holds no comparison{why}")
        return Record.read(path)

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that have not finished, in the same order."""
        done = {result.cell for result in self.read().results} if self.begun else set()
        return [cell for cell in cells if cell not in done]

    def resumed(self, changes: Mapping[str, Any]) -> Plan:
        """The plan in the directory. Raises InputError when `changes`, except that of `data`, would make it another."""
        plan = self.record().plan
        if changed := differences(plan.to_dict(), plan.replace(**{**changes, "data": plan.data}).to_dict()):
            raise InputError(f"resume: {self.path} was begun with another plan ({'; '.join(changed)})")
        return plan

    def check_holds(self, plan: Plan) -> None:
        """Raise InputError when the directory holds another comparison, or foreign files."""
        if all(entry.name.startswith(".") for entry in self.path.iterdir()):  # locks and temporary files
            return
        if not self.begun:
            raise InputError(f"out: {self.path} already holds other files; give another --out")
        if changed := differences(self.record().plan.to_dict(), plan.to_dict()):
            raise InputError(
                f"out: {self.path} already holds another comparison ({'; '.join(changed)}); give another --out"
            )

    @contextmanager
    def claimed(self, cells: Iterable[Cell]) -> Iterator[None]:
        """Lock these cells for this process. Removes the directory afterwards if no comparison was begun in it.

        Raises InputError, which names the process, when another one has a cell.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as held:
                for name, seed in cells:
                    held.enter_context(locked(self.path / f"{LOCK}-{name}-{seed}"))
                yield
        finally:
            if not self.begun:
                with suppress(OSError):  # another process waits there to begin it
                    for folder in made:
                        folder.rmdir()

    def writing(self, waiting: Callable[[str], None] = lambda text: None) -> AbstractContextManager[None]:
        """Lock plan.json and results.jsonl for writing. `waiting` is told which process to wait for."""
        return locked(self.path / LOCK, waiting)
