"""`sqa convert`: heads chosen, cut and refitted, the rest healed, and what it cost measured at every stage."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from sqa.bench.machine import git_revision, machine, versions
from sqa.bench.timing import take_turns
from sqa.conversion.healing import distillation, heal, layerwise
from sqa.conversion.operation import operate
from sqa.conversion.settings import Job, subject_class
from sqa.conversion.subject import Subject
from sqa.data import open_corpus
from sqa.files import LOCK, locked, write_json
from sqa.interop import native
from sqa.training.loop import Display, StepReport

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
    original: Subject = subject_class(job.source).load(job.source)
    corpus = open_corpus(job.calibration)
    training, validation = corpus.documents("train"), corpus.documents("validation")
    display.note(f"reading {corpus.name}")

    def read(documents: Iterator[str], rows: int) -> list[Any]:
        return original.batches(job.source, documents, rows, settings.length, settings.batch_size)

    held_out = read(training, settings.sequences // 8)
    fit = read(training, settings.sequences - settings.sequences // 8)
    healing = read(training, settings.batch_size * settings.steps)
    evaluation = read(validation, settings.evaluation_tokens // settings.length)
    reference = original.outputs(evaluation)

    job.work.mkdir(parents=True, exist_ok=True)

    def record(stage: str, subject: Subject, tokens: int) -> None:
        measured = subject.measure(evaluation, original, reference)
        others = [row for row in state["stages"] if (row["stage"], row["tokens"]) != (stage, tokens)]
        state["stages"] = [*others, {"stage": stage, "tokens": tokens, **measured}]
        write_json(job.work / "state.json", state)

    if not (job.work / "refitted").is_dir():
        record("original", original, 0)
        dropped, refitted, state["layers"] = operate(job, original, fit, held_out, display)
        record("dropped", dropped, 0)
        record("refitted", refitted, 0)
        with native.new_directory(job.work / "refitted") as folder:
            refitted.keep(folder)
        del dropped, refitted
    student = original.restored(job.work / "refitted")
    first = settings.layerwise_steps
    phases = [
        ("layers healed", student, layerwise(student, original), 0, healing[:first]),
        ("distilled", student, distillation(student, original), first, healing[first:]),
    ]
    if settings.control:
        control = copy.deepcopy(original)
        phases.append(("control", control, control.loss, 0, healing))
    for stage, subject, objective, offset, batches in phases:
        if not batches:
            continue
        everything = list(subject.model.parameters())
        attention = [p for view in subject.views for linear in view.projections for p in linear.parameters()]
        display.start(f"healing: {stage}", len(batches))
        marks = {round(len(batches) * (i + 1) / MEASUREMENTS) for i in range(MEASUREMENTS)}

        def on_step(
            report: StepReport, stage: str = stage, subject: Any = subject, offset: int = offset, marks: Any = marks
        ) -> None:
            display.step(report)
            if report.step in marks:
                record(stage, subject, (offset + report.step) * settings.tokens_per_step)

        progress = heal(
            subject.model,
            objective,
            batches,
            tokens_per_step=settings.tokens_per_step,
            learning_rate=settings.learning_rate,
            dtype=getattr(torch, settings.dtype),
            trained=attention if settings.train == "attention" or stage == "layers healed" else everything,
            folder=job.work / stage.replace(" ", "-"),
            on_step=on_step,
            should_stop=should_stop,
        )
        display.finish(f"{stage}: {progress.tokens:,} tokens in {progress.wall_s:.0f} s")
    state |= {
        "cost": {name: model.cost(settings.length) for name, model in (("before", original), ("after", student))},
        "speed": _speed(job, original, student, display),
        # of this process: what came before a resumption is not in it
        "wall_s": time.perf_counter() - start,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "machine": machine("cpu"),
        "versions": versions(),
        "git": git_revision(),
    }
    with native.new_directory(job.out) as folder:
        student.save(folder, job.source)
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
    state = native.read_json(path)
    held = state["settings"]
    changed = [f"{name}: {held[name]!r} there, {settings[name]!r} now" for name in held if held[name] != settings[name]]
    if changed:
        raise ValueError(
            f"output: {job.work} holds an unfinished conversion with other settings ({'; '.join(changed)}); "
            f"give those, or delete the folder"
        )
    return state


def _speed(job: Job, before: Subject, after: Subject, display: Display) -> list[State]:
    """Seconds of prefill and of forward and backward at each length, before and after in turns."""
    dtype = getattr(torch, job.settings.dtype)

    def timed(subject: Subject, what: str, n: int) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            if what == "prefill":
                with torch.no_grad():
                    subject.prefill(n)
                return
            loss = subject.training_loss(n)
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
