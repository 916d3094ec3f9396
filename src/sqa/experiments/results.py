"""The files of a comparison: a record of its start, and a result for each finished run, with their JSON forms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch

from sqa.attention.kernels import KERNELS
from sqa.config import ModelConfig
from sqa.errors import InputError, shown
from sqa.experiments.plan import Cell, Plan
from sqa.measure.timing import Timing
from sqa.records import check_least, read_json, read_record
from sqa.training.loop import Evaluation


def _check_kernels(field: str, names: str) -> None:
    """Raise InputError unless it names one kernel, or several separated by ", "."""
    if not names or any(name not in KERNELS for name in names.split(", ")):
        raise InputError(f"{field} must be of {', '.join(KERNELS)}, got {shown(repr(names))}")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished run: a line of results.jsonl.

    `variant`: the plan's name of the model. `tokens`: targets trained on. `wall_s`: seconds of training, whatever else
    the machine did. `step_s`: the time of a step in the timing phase, None without one.
    """

    variant: str
    seed: int
    config: ModelConfig
    parameters: int
    steps: int
    tokens: int
    wall_s: float
    step_s: Timing | None
    val: Evaluation
    kernel: str
    device: str
    dtype: Literal["float32", "bfloat16"]
    versions: dict[str, str]
    git: str | None
    data_fingerprint: str

    def __post_init__(self) -> None:
        check_least(self, 1, "parameters", "steps", "tokens")
        check_least(self, 0, "seed", "wall_s")
        _check_kernels("kernel", self.kernel)
        try:
            known = torch.device(self.device).type == self.device
        except RuntimeError:
            known = False
        if not known:
            raise InputError(f"device must be a type of device that PyTorch knows, got {shown(repr(self.device))}")

    @property
    def cell(self) -> Cell:
        """Its place in the plan: variant and seed."""
        return self.variant, self.seed


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The text of a comparison. `unigram_entropy`: nats a token, of a model that knows token frequencies only."""

    name: str
    fingerprint: str
    train_documents: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int
    unigram_entropy: float

    def __post_init__(self) -> None:
        check_least(self, 1, "train_documents", "train_tokens", "validation_documents", "validation_tokens")
        check_least(self, 0, "unigram_entropy")


@dataclass(frozen=True, kw_only=True)
class Record:
    """plan.json: the plan, and the machine and text at the start. Tables are by name of the variant.

    `steps`: what the budget gives each variant. `step_s`: seconds of a step in the timing phase, empty without one.
    """

    plan: Plan
    steps: dict[str, int]
    step_s: dict[str, Timing]
    kernel: dict[str, str]
    machine: dict[str, str | int]
    processes: int = 1
    versions: dict[str, str]
    git: str | None
    data: DataFacts

    def __post_init__(self) -> None:
        check_least(self, 1, "processes")
        for name in ("steps", "kernel", "step_s"):
            table = getattr(self, name)
            optional = name == "step_s" and self.plan.budget_kind != "time"
            if set(table) != set(self.plan.variants) and not (optional and not table):
                given = shown(repr(list(table)))
                raise InputError(f"{name} must be of the variants {list(self.plan.variants)}, got {given}")
        for variant, names in self.kernel.items():
            _check_kernels(f"kernel.{variant}", names)
        if self.plan.budget_kind != "epochs":
            self.check_steps(1)

    @property
    def step_seconds(self) -> dict[str, float]:
        """The median seconds of a step of each variant that was timed."""
        return {name: timing.median for name, timing in self.step_s.items()}

    def check_steps(self, batches_per_epoch: int) -> None:
        """Raise InputError if `steps` is not what the plan's budget gives, so that the file was changed."""
        given = self.plan.steps(batches_per_epoch=batches_per_epoch, step_seconds=self.step_seconds)
        for name, steps in given.items():
            if self.steps[name] != steps:
                raise InputError(
                    f"steps.{name} must be {steps}, which budget {self.plan.budget} gives, got {self.steps[name]}"
                )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InputError, naming the file and the field, for anything but a record."""
        values = read_json(path)
        try:
            return read_record(cls, values, "plan.json")
        except InputError as error:
            raise InputError(f"{path} is damaged: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison, as far as it has run. `results` are of the same data, and of each cell at most once."""

    record: Record
    results: Sequence[RunResult] = ()

    def __post_init__(self) -> None:
        cells = [result.cell for result in self.results]
        for result in self.results:
            where = f"results: {shown(result.variant)} with seed {result.seed}"
            if result.cell not in self.plan.cells or cells.count(result.cell) > 1:
                what = "twice" if cells.count(result.cell) > 1 else "though it is not in the plan"
                raise InputError(f"{where} is there {what}")
            if result.steps != (steps := self.record.steps[result.variant]):
                raise InputError(f"{where} must have the {steps} steps of the plan, got {result.steps}")
            if result.config != self.plan.model_config(result.variant):
                raise InputError(f"{where} must have the plan's config of {result.variant}, got another one")
        if len(fingerprints := sorted({result.data_fingerprint for result in self.results})) > 1:
            raise InputError(
                f"results: rows come from different data (fingerprints {', '.join(f[:12] for f in fingerprints)}); "
                f"compare runs on one data set"
            )

    @property
    def plan(self) -> Plan:
        """The plan it was begun with."""
        return self.record.plan

    @property
    def missing(self) -> list[Cell]:
        """The runs that have not finished, in the plan's order."""
        done = {result.cell for result in self.results}
        return [cell for cell in self.plan.cells if cell not in done]
