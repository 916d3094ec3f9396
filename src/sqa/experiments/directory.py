"""The directory of a comparison: what is in it, who writes it, and whether it holds what is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqa.experiments.plan import Plan
from sqa.experiments.results import Row, append_result, read_results
from sqa.files import write_json

_LOCK = ".lock"


@dataclass(frozen=True)
class Directory:
    """`plan.json` (written before training), `results.jsonl` (a line a finished run), a folder `variant-seed` a run."""

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
        append_result(self.path / "results.jsonl", row)

    def record(self) -> dict[str, Any]:
        """plan.json. Raises ValueError when there is none or it is damaged."""
        path = self.path / "plan.json"
        if not path.is_file():
            raise ValueError(f"directory: {self.path} holds no comparison (no plan.json)")
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            Plan.from_dict(record["plan"])
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
            raise ValueError(f"directory: {path} is damaged: {error}") from None
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Write plan.json, whole or not at all."""
        write_json(self.path / "plan.json", record)

    def missing(self, plan: Plan) -> list[tuple[str, int]]:
        """The (variant, seed) pairs of the plan that have not finished, seeds outermost."""
        done = {(row["variant"], row["seed"]) for row in self.rows()}
        return [(name, seed) for seed in plan.seeds for name in plan.variants if (name, seed) not in done]

    def check_free(self, plan: Plan) -> None:
        """Raise ValueError when the directory holds another comparison, an unfinished one, or foreign files."""
        if all(entry.name == _LOCK for entry in self.path.iterdir()):
            return
        if not self.begun:
            raise ValueError(f"out: {self.path} already holds other files; give another --out")
        differences = plan_differences(Plan.from_dict(self.record()["plan"]), plan)
        if differences:
            raise ValueError(
                f"out: {self.path} already holds another comparison ({'; '.join(differences)}); give another --out"
            )
        if self.missing(plan):
            raise ValueError(f"out: {self.path} holds this comparison, unfinished; go on with --resume {self.path}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only writer; a directory in which nothing was begun is removed again.

        Raises ValueError with the process that is writing already.
        """
        import fcntl

        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / _LOCK, "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise ValueError(f"out: {self.path} is being written by process {lock.read().strip() or '?'}") from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            try:
                yield
            finally:
                if not self.begun:
                    (self.path / _LOCK).unlink()
                    for folder in made:
                        folder.rmdir()


def plan_differences(held: Plan, given: Plan) -> list[str]:
    """`field: held, given` for every field in which two plans differ."""
    before, after = held.to_dict(), given.to_dict()
    return [f"{name}: {before[name]!r} there, {after[name]!r} now" for name in before if before[name] != after[name]]
