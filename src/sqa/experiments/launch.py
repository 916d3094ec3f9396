"""Launchers train the runs of a comparison, one after another in this process or as Ray tasks on a cluster.

All machines of a cluster must see the run directory, the text and this package under the same paths. Only the driver,
the process that called `compare`, writes plan.json and results.jsonl.
"""

import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sqa.errors import InputError, MissingExtraError, load_extra
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Cell, Plan, cell_name
from sqa.experiments.results import Record, RunResult
from sqa.experiments.run import Session, label, outcome_text, prepare_data, run
from sqa.files import LOCK, locked
from sqa.progress import Display, Interrupted, NonFiniteLoss, StepReport, stop_flag
from sqa.training.loop import make_accelerator

Outcomes = Generator[tuple[Cell, RunResult | NonFiniteLoss], None, None]


@dataclass(frozen=True)
class Launcher:
    """A way of training runs.

    `opened(plan, device, num_runs)` is a context with what it needs, and raises InputError or MissingExtraError when
    that is missing. `run(session, cells, display)` yields each cell with its outcome as soon as there is one. It raises
    Interrupted when asked to stop, after the runs in progress have saved checkpoints.
    """

    opened: Callable[[Plan, str, int], AbstractContextManager[None]]
    run: Callable[[Session, Sequence[Cell], Display], Outcomes]


def run_local(session: Session, cells: Sequence[Cell], display: Display) -> Outcomes:
    """One run after another in this process, or in all processes that torchrun started."""
    all_cells = session.plan.cells
    for cell in cells:
        place = f"run {all_cells.index(cell) + 1} of {len(all_cells)}"
        display.start(f"{place}: {label(session.plan, cell)}", session.record.steps[cell[0]])
        try:
            outcome: RunResult | NonFiniteLoss = run(session, cell, display.step)
        except NonFiniteLoss as failure:
            outcome = failure
        display.finish(outcome_text(cell, outcome))
        yield cell, outcome


LOCAL = Launcher(lambda plan, device, num_runs: nullcontext(), run_local)

_RETRIES = 3
_POLL_SECONDS = 0.5
_STOP_SECONDS = 120.0


def _resources(device: str) -> dict[str, int]:
    """What a run needs of Ray: as many CPUs as this process has threads, or a GPU."""
    return {"CPU": 1, "GPU": 1} if device == "cuda" else {"CPU": torch.get_num_threads()}


@contextmanager
def cluster(plan: Plan, device: str, num_runs: int) -> Iterator[None]:
    """Join the Ray cluster of $RAY_ADDRESS or of this machine's last `ray start`, or else start one on this machine.

    Raises MissingExtraError without the extra `ray`, and InputError under torchrun, when no machine has room for a run,
    and when a budget in time would be spent by several runs on one processor.
    """
    if torch.distributed.is_initialized() and (count := torch.distributed.get_world_size()) > 1:
        raise InputError(f"launcher: a run under ray has one process, got {count}; leave out torchrun")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # otherwise warns that this will be its default
    ray = load_extra("ray", "--launcher ray needs Ray", "ray")
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
        together = min(room, num_runs)
        if plan.budget_kind == "time" and device == "cpu" and together > 1:
            raise InputError(
                f"launcher: with budget {plan.budget} each run needs a machine alone, but {together} would share one; "
                f"give --threads its cores, or a budget in steps"
            )
        yield
    finally:
        if joining:
            ray.shutdown()


def run_ray(session: Session, cells: Sequence[Cell], display: Display) -> Outcomes:
    """All cells as tasks of the joined cluster.

    A run whose worker or machine is lost starts again from its last checkpoint, on another machine if necessary. After
    too many losses its outcome is Interrupted, which is raised when all others have ended.
    """
    import ray

    plan, record, device = session.plan, session.record, session.accelerator.device.type
    wanted = _resources(device)
    task = ray.remote(num_cpus=wanted["CPU"], num_gpus=wanted.get("GPU", 0), max_retries=_RETRIES)(_task)
    shared = Directory(session.directory.path.resolve())
    source = os.path.abspath(session.source) if Path(session.source).exists() else session.source
    how = source, device, wanted["CPU"], session.any_kernel
    running = {task.remote(record, shared, how, cell): cell for cell in cells}
    shown: dict[Cell, Display] = {}
    seen: dict[Cell, int] = {}
    unfinished = []
    stopping = False

    def cancel() -> None:
        """Interrupt the tasks, as Ctrl-C does a local run: those that train save a checkpoint and end."""
        for reference in running:
            ray.cancel(reference)

    with session.stop.held():  # the tasks save what they have first
        try:
            while running:
                done, _ = ray.wait(list(running), timeout=_POLL_SECONDS)
                if session.stop.signal is not None and not stopping:
                    stopping = True
                    cancel()
                for reference, cell in running.items():
                    report = _last_report(shared.run_folder(*cell) / "curve.jsonl")
                    if cell not in shown and (report is not None or reference in done):
                        shown[cell] = display.beside()
                        shown[cell].start(label(plan, cell), record.steps[cell[0]])
                    if report is not None and report.step != seen.get(cell):
                        seen[cell] = report.step
                        shown[cell].step(report)
                for reference in done:
                    cell, outcome = running.pop(reference), _outcome(reference)
                    if isinstance(outcome, Interrupted):
                        unfinished.append(f"{cell_name(cell)}: {outcome}")
                        shown[cell].finish(unfinished[-1])
                    elif isinstance(outcome, Exception) and not isinstance(outcome, NonFiniteLoss):
                        raise outcome
                    else:
                        shown[cell].finish(outcome_text(cell, outcome))
                        yield cell, outcome
        finally:
            if running and not stopping:
                cancel()
                ray.wait(list(running), num_returns=len(running), timeout=_STOP_SECONDS)
    if unfinished:
        what = f"stopped with {len(unfinished)} of {len(cells)} runs unfinished"
        raise Interrupted(what if stopping else "; ".join(unfinished))


def _outcome(reference: Any) -> Any:
    """What a task returned; Interrupted where it was lost too often or cancelled before it began."""
    import ray

    lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
    try:
        return ray.get(reference)
    except lost:
        return Interrupted(f"its worker was lost {_RETRIES + 1} times")
    except ray.exceptions.TaskCancelledError:
        return Interrupted("not begun")


def _task(record: Record, directory: Directory, how: tuple[str, str, int, bool], cell: Cell) -> RunResult | Exception:
    """One run in a worker. Errors that a user can fix are returned: Ray would wrap a raised one in its traceback."""
    source, device, threads, any_kernel = how
    torch.set_num_threads(threads)
    folder = directory.run_folder(*cell)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # a worker of a killed driver may still be saving here
        with stop_flag() as stop, locked(folder / LOCK, waiting=print):
            session = Session(
                record=record,
                directory=directory,
                source=source,
                data=prepare_data(record.plan, source),
                accelerator=make_accelerator(device, record.plan.dtype),
                stop=stop,
                any_kernel=any_kernel,
            )
            return run(session, cell)
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


RAY = Launcher(cluster, run_ray)
