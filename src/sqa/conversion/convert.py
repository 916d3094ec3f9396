"""`sqa convert`: heads chosen, cut and refitted, the rest healed, and what it cost measured at every stage."""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from sqa import storage
from sqa.conversion.healing import Objective, distillation, heal, layerwise
from sqa.conversion.operation import operate
from sqa.conversion.settings import Job, subject_class
from sqa.conversion.subject import Subject
from sqa.data import open_corpus
from sqa.errors import InputError
from sqa.files import LOCK, locked, write_json
from sqa.measure.machine import git_revision, machine, versions
from sqa.measure.timing import take_turns
from sqa.progress import Display, StepReport

MEASUREMENTS = 4  # of quality while a phase of healing runs

State = dict[str, Any]


def convert(job: Job, display: Display, should_stop: Callable[[], bool] = lambda: False) -> State:
    """Run a conversion, or go on with one that was stopped; returns what `conversion.json` holds.

    `job.out` appears whole at the end, `job.work` beside it goes. Raises ValueError for too little text, and when
    another process or an unfinished conversion with other settings is in the way; Interrupted when stopped; and
    NonFiniteLoss.
    """
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with locked(job.work.with_name(f"{LOCK}-{job.out.name}")):
        return _convert(job, display, should_stop)


def _convert(job: Job, display: Display, should_stop: Callable[[], bool]) -> State:
    settings, start = job.settings, time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    state = _begin(job)
    kind = subject_class(job.source)
    original = kind.load(job.source)
    corpus = open_corpus(job.calibration)
    training, validation = corpus.documents("train"), corpus.documents("validation")
    display.note(f"reading {corpus.name}")
    read = partial(original.batches, job.source, length=settings.length, batch_size=settings.batch_size)
    held_out = read(training, settings.sequences // 8)
    fit = read(training, settings.sequences - settings.sequences // 8)
    healing = read(training, settings.batch_size * settings.steps)
    evaluation = read(validation, settings.evaluation_tokens // settings.length)
    reference = original.outputs(evaluation)
    job.work.mkdir(parents=True, exist_ok=True)

    def record(stage: str, subject: Subject, tokens: int = 0) -> None:
        measured = subject.measure(evaluation, original, reference)
        others = [row for row in state["stages"] if (row["stage"], row["tokens"]) != (stage, tokens)]
        state["stages"] = [*others, {"stage": stage, "tokens": tokens, **measured}]
        write_json(job.work / "state.json", state)

    if not (job.work / "refitted").is_dir():
        record("original", original)
        dropped, refitted, state["layers"] = operate(job, original, fit, held_out, display)
        record("dropped", dropped)
        record("refitted", refitted)
        with storage.new_directory(job.work / "refitted") as folder:
            refitted.save(folder, job.source, torch.float32)
        del dropped, refitted
    student = kind.load(job.work / "refitted")

    def phase(stage: str, subject: Subject, objective: Objective, batches: Sequence[Any], offset: int = 0) -> None:
        if not batches:
            return
        display.start(f"healing: {stage}", len(batches))
        marks = {round(len(batches) * (i + 1) / MEASUREMENTS) for i in range(MEASUREMENTS)}
        trained = list(subject.model.parameters())
        if settings.train == "attention" or stage == "layers healed":
            trained = [p for view in subject.views for linear in view.projections for p in linear.parameters()]

        def on_step(report: StepReport) -> None:
            display.step(report)
            if report.step in marks:
                record(stage, subject, (offset + report.step) * settings.tokens_per_step)

        progress = heal(
            subject.model,
            objective,
            batches,
            settings,
            trained=trained,
            folder=job.work / stage.replace(" ", "-"),
            on_step=on_step,
            should_stop=should_stop,
        )
        display.finish(f"{stage}: {progress.tokens:,} tokens in {progress.wall_s:.0f} s")

    first = settings.layerwise_steps
    phase("layers healed", student, layerwise(student, original), healing[:first])
    phase("distilled", student, distillation(student, original), healing[first:], first)
    if settings.control:
        control = copy.deepcopy(original)
        phase("control", control, control.loss, healing)
    state |= {
        "cost": {
            name: {"parameters": sum(parameter.numel() for parameter in subject.model.parameters())}
            for name, subject in (("before", original), ("after", student))
        },
        "speed": _speed(job, original, student, display),
        # of this process: what came before a resumption is not in it
        "wall_s": time.perf_counter() - start,
        "peak_bytes": _peak_bytes(),
        "machine": machine("cpu"),
        "versions": versions(),
        "git": git_revision(),
    }
    with storage.new_directory(job.out) as folder:
        student.save(folder, job.source, original.dtype)
        write_json(folder / "conversion.json", state)
    shutil.rmtree(job.work)
    return state


def _begin(job: Job) -> State:
    """The state of this conversion: new, or what an earlier process left."""
    settings: State = {"calibration": open_corpus(job.calibration).fingerprint} | asdict(job.settings)
    settings = json.loads(json.dumps(settings))
    path = job.work / "state.json"
    if not path.is_file():
        return {"settings": settings, "stages": [], "layers": []}
    state = storage.read_json(path)
    held = state.get("settings", {})
    changed = [
        f"{name}: {held.get(name)!r} there, {settings.get(name)!r} now"
        for name in settings | held
        if held.get(name) != settings.get(name)
    ]
    if changed:
        raise InputError(
            f"output: {job.work} holds an unfinished conversion with other settings ({'; '.join(changed)}); "
            f"give those, or delete the folder"
        )
    return state


def _peak_bytes() -> int | None:
    """The most memory that this process had so far; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _speed(job: Job, before: Subject, after: Subject, display: Display) -> list[State]:
    """Seconds of prefill and of forward and backward at each length, before and after in turns."""
    dtype = getattr(torch, job.settings.dtype)

    def timed(subject: Subject, what: str, n: int) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            if what == "prefill":
                with torch.no_grad():
                    subject.prefill(subject.row(n))
                return
            loss = subject.loss(subject.row(n))
        loss.backward()
        subject.model.zero_grad()

    contestants = {
        (what, n, name): partial(timed, subject, what, n)
        for n in job.speed_at
        for what in ("prefill", "forward and backward")
        for name, subject in (("before", before), ("after", after))
    }
    display.start("timing before and after in turns", 4 * len(contestants))
    timings = take_turns(contestants, rounds=3, on_turn=lambda: display.step(None))
    display.finish("timed")
    return [
        {
            "what": what,
            "n": n,
            "before": timings[what, n, "before"].to_dict(),
            "after": timing.to_dict(),
            "ratio": timings[what, n, "before"].median / timing.median,
        }
        for (what, n, name), timing in timings.items()
        if name == "after"
    ]
