"""Run a comparison: time every variant in turns, then train each with each seed on the same text."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from sqa.cost import train_step_flops
from sqa.data import Prepared
from sqa.errors import InputError, load_extra
from sqa.experiments.directory import Directory
from sqa.experiments.launch import LOCAL, Launcher
from sqa.experiments.plan import Cell, Plan, cell_name
from sqa.experiments.results import Comparison, DataFacts, Record
from sqa.experiments.run import Session, kernel_of, make_batches, prepare_data, text_here
from sqa.experiments.step_times import time_steps
from sqa.files import write_json
from sqa.measure.machine import cpu_threads, git_revision, machine, slow_dtype, versions
from sqa.progress import Display, NonFiniteLoss, lasting, stop_flag
from sqa.training.checkpoint import of_main
from sqa.training.loop import make_accelerator


def compare(
    plan: Plan,
    out: Path,
    display: Display | None = None,
    *,
    resume: bool = False,
    data_source: str | None = None,
    only: Sequence[Cell] | None = None,
    launcher: Launcher = LOCAL,
    track: bool = False,
    any_kernel: bool = False,
) -> Comparison:
    """Train the runs of the plan that are not finished in the folder `out`, and return all results.

    `resume` continues the comparison in `out` (its plan is `Directory(out).resumed({})`). `data_source` is where the
    plan's text is now, if it moved. `only`: train these runs alone; other processes may train others in `out` at the
    same time. LOCAL trains one run after another in this process, RAY on a Ray cluster; the timing phase is always
    here. Processes that torchrun started train each run together, and process 0 writes. `track` writes the curves of
    each local run for TensorBoard, in `out`/tensorboard. `any_kernel` lets runs continue with another attention kernel,
    which rounds differently.

    Raises InputError for whatever keeps the comparison from starting and MissingExtraError for a missing library,
    before anything is written, Interrupted when stopped, and NonFiniteLoss at the end when that happened to a run.
    """
    display = display or Display()
    if track:
        if launcher is not LOCAL:
            raise InputError("track: curves can be followed in this process only; leave it out with another launcher")
        load_extra("tensorboard", "--track needs tensorboard", "track")
    with ExitStack() as stack:
        stack.enter_context(cpu_threads(plan.threads))
        accelerator = make_accelerator(plan.device, plan.dtype)
        main = accelerator.is_main_process
        if plan.batch_size % accelerator.num_processes:
            raise InputError(
                f"plan: batch_size must be a multiple of the {accelerator.num_processes} processes, "
                f"got {plan.batch_size}"
            )
        if (slow := slow_dtype(plan.dtype, accelerator.device.type)) is not None:
            display.note(slow)
        directory = Directory(out)
        cells = plan.cells if only is None else only
        stack.enter_context(directory.claimed(cells) if main else nullcontext())
        with directory.writing(display.note) if main else nullcontext():
            if main and resume:
                directory.record()  # raises an InputError if there is none
            elif main:
                directory.check_holds(_stored(plan))
            todo = of_main(directory.missing(cells))
            if directory.begun and not todo:
                display.note(f"{out} holds {'this comparison' if only is None else 'these runs'}, finished")
                return directory.read()
            if directory.begun and not resume and only is None:
                raise InputError(f"out: {out} holds this comparison, unfinished; go on with --resume {out}")
            source = text_here(plan, data_source, resuming=resume)
            stack.enter_context(launcher.opened(plan, accelerator.device.type, len(todo)))
            stop = stack.enter_context(stop_flag())  # after Ray, which sets a handler of its own
            with accelerator.main_process_first():  # the others find it in the cache
                data = prepare_data(plan, source, display.note)
            if not of_main(directory.begun):
                record = _begin(plan, data, accelerator, display)
                if main:
                    write_json(out / "plan.json", record)
                accelerator.wait_for_everyone()
        record = directory.record()
        session = Session(
            record=record,
            directory=directory,
            source=source,
            data=data,
            accelerator=accelerator,
            stop=stop,
            track=track,
            any_kernel=any_kernel,
        )
        record.check_steps(make_batches(plan, data, plan.seeds[0]).batches_per_epoch)
        failures = []
        left = _Left(record, todo)
        display.note(left.text(of=len(cells)))
        outcomes = stack.enter_context(closing(launcher.run(session, todo, display)))
        for cell, outcome in outcomes:
            if isinstance(outcome, NonFiniteLoss):
                failures.append(f"{cell_name(cell)}: {outcome}")
            elif main:
                directory.finish(outcome)
            if left.without(cell):
                display.note(left.text(of=len(cells)))
    if failures:
        raise NonFiniteLoss("; ".join(failures))
    return directory.read()


class _Left:
    """The runs that are left and an estimate of their time, from the timing phase and later from finished runs."""

    def __init__(self, record: Record, cells: Sequence[Cell]) -> None:
        plan = record.plan
        flops = {name: train_step_flops(plan.model_config(name), plan.context) for name in plan.variants}
        step = record.step_seconds or flops
        self._work = {(name, seed): record.steps[name] * step[name] for name, seed in cells}
        self._all, self._start = sum(self._work.values()), time.monotonic()
        self._seconds = self._all if record.step_s else None

    def without(self, cell: Cell) -> bool:
        """Remove a run that has ended. Returns whether any is left."""
        del self._work[cell]
        rest = sum(self._work.values())
        self._seconds = (time.monotonic() - self._start) * rest / (self._all - rest)
        return bool(self._work)

    def text(self, *, of: int) -> str:
        runs = f"{len(self._work)} of {of} runs left"
        return runs if self._seconds is None else f"{runs}, about {lasting(self._seconds)}"


def _stored(plan: Plan) -> Plan:
    """The plan without an absolute path."""
    return plan.replace(data=os.path.relpath(plan.data)) if os.path.isabs(plan.data) else plan


def _begin(plan: Plan, data: Prepared, accelerator: Accelerator, display: Display) -> Record:
    """Time the variants, and make the content of plan.json."""
    batches_per_epoch = make_batches(plan, data, plan.seeds[0]).batches_per_epoch
    if plan.budget_kind != "time":  # a budget of less than one step is refused before anything is timed
        plan.steps(batches_per_epoch=batches_per_epoch, step_seconds={})
    timings = time_steps(plan, data, accelerator, display)
    medians = {name: timing.median for name, timing in timings.items()}
    device = accelerator.device.type
    return Record(
        plan=_stored(plan),
        steps=plan.steps(batches_per_epoch=batches_per_epoch, step_seconds=medians),
        step_s=timings,
        kernel={name: kernel_of(plan, plan.model_config(name), device) for name in plan.variants},
        machine=machine(str(accelerator.device)).to_dict(),
        processes=accelerator.num_processes,
        versions=versions(),
        git=git_revision(),
        data=DataFacts(
            name=data.corpus.name,
            fingerprint=data.fingerprint,
            train_documents=data.train.num_documents,
            train_tokens=data.train.num_tokens,
            validation_documents=data.validation.num_documents,
            validation_tokens=data.validation.num_tokens,
            unigram_entropy=unigram_entropy(data),
        ),
    )


def unigram_entropy(data: Prepared) -> float:
    """Nats a token of the validation text by its token frequencies: the best loss of a model without context."""
    tokens = torch.from_numpy(data.validation.tokens(0, data.validation.num_tokens).astype("int64"))
    frequencies = tokens.bincount().double() / len(tokens)
    frequencies = frequencies[frequencies > 0]
    return float(-(frequencies * frequencies.log()).sum())
