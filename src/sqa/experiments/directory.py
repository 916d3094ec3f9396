"""The directory of a comparison: what is in it, who writes it, and whether it holds what is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqa.errors import InputError
from sqa.experiments.plan import Cell, Plan
from sqa.experiments.results import Row, append_result, read_results
from sqa.files import LOCK, locked, write_json


@dataclass(frozen=True)
class Directory:
    """`plan.json` (written before training), `results.jsonl` (a line a finished run), a folder `variant-seed` a run.

    Several processes may work in it, each on cells that it has claimed.
    """

    path: Path

    def run_folder(self, variant: str, seed: int) -> Path:
        """Where one run keeps its curve, checkpoints and model."""
        return self.path / f"{variant}-{seed}"

    @property
    def begun(self) -> bool:
        """Whether a comparison was started here."""
        return (self.path / "plan.json").exists()

    def rows(self) -> list[Row]:
        """The finished runs."""
        return read_results(self.path / "results.jsonl")

    def append(self, row: Row) -> None:
        """Record a finished run."""
        with self.writing():
            append_result(self.path / "results.jsonl", row)

    def record(self) -> dict[str, Any]:
        """plan.json. Raises ValueError when there is none or it is damaged."""
        path = self.path / "plan.json"
        if not path.is_file():
            raise InputError(f"directory: {self.path} holds no comparison (no plan.json)")
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            Plan.from_dict(record["plan"])
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
            raise InputError(f"directory: {path} is damaged: {error}") from None
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Write plan.json, whole or not at all."""
        write_json(self.path / "plan.json", record)

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those of the cells that have not finished, in their order."""
        done = {(row["variant"], row["seed"]) for row in self.rows()}
        return [cell for cell in cells if cell not in done]

    def check_holds(self, plan: Plan) -> None:
        """Raise ValueError when the directory holds another comparison, or foreign files."""
        if all(entry.name.startswith(LOCK) for entry in self.path.iterdir()):
            return
        if not self.begun:
            raise InputError(f"out: {self.path} already holds other files; give another --out")
        differences = plan_differences(Plan.from_dict(self.record()["plan"]), plan)
        if differences:
            raise InputError(
                f"out: {self.path} already holds another comparison ({'; '.join(differences)}); give another --out"
            )

    @contextmanager
    def claimed(self, cells: Iterable[Cell]) -> Iterator[None]:
        """Be the only one to run these cells; a directory in which nothing was begun is removed again.

        Raises ValueError with the process that runs one of them already.
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
        """Be the only one to write plan.json or results.jsonl, after whoever does it now; `waiting` is told who."""
        return locked(self.path / LOCK, waiting)


def plan_differences(held: Plan, given: Plan) -> list[str]:
    """`field: held, given` for every field in which two plans differ."""
    before, after = held.to_dict(), given.to_dict()
    return [f"{name}: {before[name]!r} there, {after[name]!r} now" for name in before if before[name] != after[name]]
