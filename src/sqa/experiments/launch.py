"""Runs of a comparison as Ray tasks, on the machines of whatever cluster Ray finds.

All machines see the run directory, the text and this package under the same paths. Only the driver, which is the
process that `sqa compare` started, writes plan.json and results.jsonl.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sqa.errors import InputError, MissingExtraError
from sqa.experiments.compare import check_same_data, label, prepare_data, run
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Budget, Cell, Plan
from sqa.experiments.results import Row
from sqa.files import locked
from sqa.progress import Display, Interrupted, NonFiniteLoss, StepReport, StopFlag, stop_flag
from sqa.training.loop import make_accelerator

_RETRIES = 3
_POLL_SECONDS = 0.5
_STOP_SECONDS = 120.0


def _resources(device: str) -> dict[str, int]:
    """What one run asks Ray for: the threads that a run in this process would have, or a GPU."""
    return {"CPU": 1, "GPU": 1} if device == "cuda" else {"CPU": torch.get_num_threads()}


@contextmanager
def cluster(plan: Plan, device: str, num_runs: int) -> Iterator[None]:
    """Join the cluster of $RAY_ADDRESS or of this machine's last `ray start`; where there is none, be one alone.

    Raises ImportError without the extra `ray`, and ValueError when no machine can take a run, or when a budget in time
    would be spent by several runs on one processor.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise warns that this will be its default
    try:
        import ray
    except ImportError:
        raise MissingExtraError("--launcher ray needs Ray", "ray") from None
    joining = not ray.is_initialized()
    if joining:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        wanted = _resources(device)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = max(min(int(has.get(kind, 0) // count) for kind, count in wanted.items()) for has in machines)
        if not room:
            needs = " and ".join(f"{count} {kind}" for kind, count in wanted.items())
            raise InputError(f"launcher: a run needs {needs}, which no machine of the Ray cluster has; see --threads")
        if Budget.parse(plan.budget).kind == "time" and device == "cpu" and min(room, num_runs) > 1:
            raise InputError(
                f"launcher: with budget {plan.budget} each run needs a machine alone, but {room} would share one; "
                f"give --threads its cores, or a budget in steps"
            )
        yield
    finally:
        if joining:
            ray.shutdown()


def run_all(
    plan: Plan,
    record: dict[str, Any],
    directory: Directory,
    source: str,
    device: str,
    cells: Sequence[Cell],
    display: Display,
    stop: StopFlag,
    settle: Callable[[Display, Cell, Row | NonFiniteLoss], None],
) -> None:
    """Run all cells as tasks of the joined cluster and hand each outcome to `settle` as it comes.

    A run whose worker or machine is lost starts again, elsewhere if need be, from its last checkpoint. Raises
    Interrupted when asked to stop, after the tasks have saved theirs, or at the end when a run lost too many workers.
    """
    import ray

    wanted = _resources(device)
    task = ray.remote(num_cpus=wanted["CPU"], num_gpus=wanted.get("GPU", 0), max_retries=_RETRIES)(_task)
    shared = Directory(directory.path.resolve())
    source = os.path.abspath(source) if Path(source).exists() else source
    running = {task.remote(plan, record, shared, source, device, wanted["CPU"], cell): cell for cell in cells}
    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    shown: dict[Cell, Display] = {}
    seen: dict[Cell, int] = {}
    unfinished = []
    stopping = False
    try:
        while running:
            done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
            if stop.signal is not None and not stopping:
                stopping = True
                _cancel(running)
            for reference, cell in running.items():
                report = _last_report(shared.run_folder(*cell) / "curve.jsonl")
                if cell not in shown and (report is not None or reference in done):
                    shown[cell] = display.beside()
                    shown[cell].start(label(plan, cell), record["steps"][cell[0]])
                if report is not None and report.step != seen.get(cell):
                    seen[cell] = report.step
                    shown[cell].step(report)
            for reference in done:
                cell = running.pop(reference)
                try:
                    outcome = ray.get(reference)
                except lost:
                    outcome = Interrupted(f"its worker was lost {_RETRIES + 1} times")
                except ray.exceptions.TaskCancelledError:
                    outcome = Interrupted("not begun")
                if isinstance(outcome, Interrupted):
                    unfinished.append(f"{cell[0]} seed {cell[1]}: {outcome}")
                    shown[cell].finish(unfinished[-1])
                elif isinstance(outcome, Exception) and not isinstance(outcome, NonFiniteLoss):
                    raise outcome
                else:
                    settle(shown[cell], cell, outcome)
    finally:
        if running and not stopping:
            _cancel(running)
            ray.wait(list(running), num_returns=len(running), timeout=_STOP_SECONDS)
    if unfinished:
        what = f"stopped with {len(unfinished)} of {len(cells)} runs unfinished"
        raise Interrupted(what if stopping else "; ".join(unfinished))


def _cancel(references: Iterable[Any]) -> None:
    """What Ctrl-C is to a run here: one that trains saves a checkpoint and ends."""
    import ray

    for reference in references:
        ray.cancel(reference)


def _task(
    plan: Plan, record: dict[str, Any], directory: Directory, source: str, device: str, threads: int, cell: Cell
) -> Row | Exception:
    """One run in a worker. What a user can act on comes back as a value: raised here, Ray would wrap its traceback."""
    torch.set_num_threads(threads)
    folder = directory.run_folder(*cell)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # a worker whose driver was killed may still be saving here
        with stop_flag() as stop, locked(folder / ".lock", waiting=print):
            data = prepare_data(plan, source)
            check_same_data(record, data)
            return run(plan, record, directory, data, make_accelerator(device, plan.dtype), cell, stop)
    except (Interrupted, NonFiniteLoss, InputError, MissingExtraError, OSError) as error:
        return error


def _last_report(curve: Path) -> StepReport | None:
    """The last whole line of a curve; None before the first."""
    try:
        with open(curve, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1024))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    return StepReport(**json.loads(lines[-1])) if lines else None
