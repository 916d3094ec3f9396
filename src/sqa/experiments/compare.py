"""Run a comparison: time every variant in turns, then train each with each seed on the same text."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate import Accelerator

from sqa.attention.kernels import Case, resolve
from sqa.config import ModelConfig
from sqa.cost import parameters
from sqa.data import Prepared, prepare
from sqa.data.batches import Batches, evaluation_batches
from sqa.errors import InputError
from sqa.experiments.directory import Directory, plan_differences
from sqa.experiments.plan import Cell, Plan
from sqa.experiments.results import Row
from sqa.files import write_text
from sqa.measure.machine import git_revision, machine, versions
from sqa.measure.timing import Timing, take_turns
from sqa.model import Transformer
from sqa.progress import Display, NonFiniteLoss, StepReport, StopFlag, stop_flag
from sqa.training.checkpoint import of_main
from sqa.training.loop import (
    Hooks,
    Learner,
    NextToken,
    Recipe,
    evaluate,
    make_accelerator,
    save_model,
    set_up,
    train,
    train_step,
)
from sqa.training.probes import Prober, probe_steps

if TYPE_CHECKING:
    from sqa.experiments.tracking import TensorBoard


def make_batches(plan: Plan, data: Prepared, seed: int) -> Batches:
    """The training batches of a plan, the same for every variant of a seed."""
    return Batches(
        data.train,
        layout=plan.layout,
        batch_size=plan.batch_size,
        context_length=plan.context,
        pad_id=data.tokenizer.pad_id,
        seed=seed,
    )


def make_recipe(plan: Plan, name: str, steps: int) -> Recipe:
    """The part of a plan that the training loop needs for one variant."""
    shared = {field.name: getattr(plan, field.name) for field in fields(Recipe) if field.name != "steps"}
    return Recipe(steps=steps, **shared | {"learning_rate": plan.learning_rates.get(name, plan.learning_rate)})


def make_learner(plan: Plan, variant: str, recipe: Recipe, accelerator: Accelerator) -> Learner[Transformer]:
    """A new model of a variant, ready to be trained as the plan says."""
    model = Transformer(plan.model_config(variant))
    model.model.activation_checkpointing = plan.activation_checkpointing
    return set_up(model, recipe, accelerator, compile=plan.compile)


def kernel_of(plan: Plan, config: ModelConfig, device: str) -> str:
    """Names of the kernels that the layers of a model use in training, as a result row holds them."""
    names = {
        resolve(
            Case.of_layer(
                layer,
                length=plan.context,
                device=device,
                dtype=getattr(torch, plan.dtype),
                documents=plan.layout == "packed",
            )
        ).kernel
        for layer in config.layers
    }
    return ", ".join(sorted(names))


def time_steps(plan: Plan, data: Prepared, accelerator: Accelerator, display: Display) -> dict[str, Timing]:
    """Seconds of a training step of each variant, all warm, in turns."""
    if not plan.timing_rounds:
        return {}
    warmup = 2
    display.start("timing all variants in turns", (plan.timing_rounds + warmup) * len(plan.variants))
    batches = make_batches(plan, data, plan.seeds[0])
    contestants = {}
    for name in plan.variants:
        recipe = make_recipe(plan, name, plan.timing_rounds)
        learner = make_learner(plan, name, recipe, accelerator)

        def step(learner: Learner[Transformer] = learner, recipe: Recipe = recipe) -> None:
            # always batch 0: each contestant does the same work
            train_step(learner, NextToken(plan.padding_in_loss), batches.batch(0), recipe, recipe.learning_rate)

        contestants[name] = step
    timings = take_turns(
        contestants,
        rounds=plan.timing_rounds,
        warmup=warmup,
        device=accelerator.device,
        on_turn=lambda: display.step(None),
    )
    accelerator.free_memory()
    display.finish("timed")
    return of_main(timings)  # a time budget must give all processes the same steps


def compare(
    plan: Plan,
    out: Path,
    display: Display,
    *,
    resume: bool = False,
    data_source: str | None = None,
    only: Sequence[Cell] | None = None,
    launcher: Literal["local", "ray"] = "local",
    tracker: type[TensorBoard] | None = None,
) -> list[Row]:
    """Run what of the plan is not finished in `out`, and return all its result rows.

    `data_source` replaces the plan's where the text lies elsewhere now; it must be the same text. `only` leaves all
    other runs to other processes, which may work in `out` at the same time. Runs follow one another here (`local`) or
    are spread over the machines of a Ray cluster; the timing phase is always here. Several processes that torchrun
    started train each run together, and process 0 writes. `tracker` gets the curves of each local run, in a folder of
    `out` named after it. Raises ValueError for whatever keeps the comparison from starting, before anything is written,
    and Interrupted when stopped.
    """
    from sqa.experiments import launch

    if plan.threads:
        torch.set_num_threads(plan.threads)
    accelerator = make_accelerator(plan.device, plan.dtype)
    main = accelerator.is_main_process
    if plan.batch_size % accelerator.num_processes:
        raise InputError(
            f"plan: batch_size must be a multiple of the {accelerator.num_processes} processes, got {plan.batch_size}"
        )
    if launcher == "ray" and accelerator.num_processes > 1:
        raise InputError(
            f"launcher: a run under ray has one process, got {accelerator.num_processes}; leave out torchrun"
        )
    directory = Directory(out)
    cells = plan.cells if only is None else only
    source = plan.data if data_source is None else data_source
    failures = []

    def settle(shown: Display, cell: Cell, outcome: Row | NonFiniteLoss) -> None:
        what = f"{cell[0]} seed {cell[1]}"
        if isinstance(outcome, NonFiniteLoss):
            failures.append(f"{what}: {outcome}")
            shown.finish(f"{what} stopped: {outcome}")
            return
        if main:
            directory.append(outcome)
        shown.finish(f"{what}: val loss {outcome['val']['loss']:.4f} after {outcome['wall_s']:.0f} s")

    with directory.claimed(cells) if main else nullcontext(), ExitStack() as session:
        with directory.writing(display.note) if main else nullcontext():
            if main and not resume:
                directory.check_holds(_stored(plan))
            todo = of_main(directory.missing(cells))
            if directory.begun and not todo:
                display.note(f"{out} holds this comparison, finished")
                return directory.rows()
            if directory.begun and not resume and only is None:
                raise InputError(f"out: {out} holds this comparison, unfinished; go on with --resume {out}")
            if launcher == "ray":
                session.enter_context(launch.cluster(plan, accelerator.device.type, len(todo)))
            stop = session.enter_context(stop_flag())  # after Ray, which sets a handler of its own
            with accelerator.main_process_first():  # the others find it in the cache
                data = prepare_data(plan, source, display.note)
            if not of_main(directory.begun):
                record = _begin(plan, data, accelerator, display)
                if main:
                    directory.write_record(record)
                accelerator.wait_for_everyone()
        record = directory.record()
        check_same_data(record, data)
        if launcher == "ray":
            launch.run_all(plan, record, directory, source, accelerator.device.type, todo, display, stop, settle)
            todo = []
        for cell in todo:
            display.start(label(plan, cell), record["steps"][cell[0]])
            try:
                row = run(plan, record, directory, data, accelerator, cell, stop, display.step, tracker)
                settle(display, cell, row)
            except NonFiniteLoss as failure:
                settle(display, cell, failure)
    if failures:
        raise NonFiniteLoss("; ".join(failures))
    return directory.rows()


def prepare_data(plan: Plan, source: str, progress: Callable[[str], None] | None = None) -> Prepared:
    """The text of `source` with the plan's tokenizer and splits."""
    return prepare(
        source,
        vocab_size=plan.model_config(plan.variants[0]).vocab_size,
        train_fraction=plan.train_fraction,
        validation_fraction=plan.validation_fraction,
        progress=progress,
    )


def label(plan: Plan, cell: Cell) -> str:
    """What a display calls a run."""
    return f"{cell[0]} seed {cell[1]}" if len(plan.seeds) > 1 else cell[0]


def _stored(plan: Plan) -> Plan:
    """The plan without an absolute path."""
    return plan.replace(data=os.path.relpath(plan.data)) if os.path.isabs(plan.data) else plan


def _begin(plan: Plan, data: Prepared, accelerator: Accelerator, display: Display) -> dict[str, Any]:
    """Time the variants and return what plan.json holds."""
    timings = time_steps(plan, data, accelerator, display)
    medians = {name: timing.median for name, timing in timings.items()}
    batches_per_epoch = make_batches(plan, data, plan.seeds[0]).batches_per_epoch
    steps = plan.steps(batches_per_epoch=batches_per_epoch, step_seconds=medians)
    return _record(plan, data, accelerator, timings, steps)


def _record(
    plan: Plan, data: Prepared, accelerator: Accelerator, timings: dict[str, Timing], steps: dict[str, int]
) -> dict[str, Any]:
    device = accelerator.device.type
    return {
        "plan": _stored(plan).to_dict(),
        "steps": steps,
        "step_s": {name: timing.to_dict() for name, timing in timings.items()},
        "kernel": {name: kernel_of(plan, plan.model_config(name), device) for name in plan.variants},
        "machine": machine(str(accelerator.device)),
        "processes": accelerator.num_processes,
        "versions": versions(),
        "git": git_revision(),
        "data": {
            "name": data.corpus.name,
            "fingerprint": data.fingerprint,
            "train_documents": data.train.num_documents,
            "train_tokens": data.train.num_tokens,
            "validation_documents": data.validation.num_documents,
            "validation_tokens": data.validation.num_tokens,
            "unigram_entropy": unigram_entropy(data),
        },
    }


def unigram_entropy(data: Prepared) -> float:
    """Nats a token of the validation text under its own token frequencies: what a model without context can reach."""
    tokens = torch.from_numpy(data.validation.tokens(0, data.validation.num_tokens).astype("int64"))
    frequencies = tokens.bincount().double() / len(tokens)
    frequencies = frequencies[frequencies > 0]
    return float(-(frequencies * frequencies.log()).sum())


def check_same_data(record: dict[str, Any], data: Prepared) -> None:
    """Raise ValueError when the comparison was begun on other text."""
    held = record["data"]["fingerprint"]
    if held != data.fingerprint:
        raise InputError(
            f"data: the comparison was begun on other text (fingerprint {held[:12]}, now {data.fingerprint[:12]})"
        )


def run(
    plan: Plan,
    record: dict[str, Any],
    directory: Directory,
    data: Prepared,
    accelerator: Accelerator,
    cell: Cell,
    stop: StopFlag,
    show: Callable[[StepReport], None] = lambda report: None,
    tracker: type[TensorBoard] | None = None,
) -> Row:
    """Train one run to its end, or on from its last checkpoint, and evaluate it."""
    name, seed = cell
    main = accelerator.is_main_process
    config = plan.model_config(name)
    folder = directory.run_folder(name, seed)
    steps = record["steps"][name]
    recipe = make_recipe(plan, name, steps)
    curves = tracker(directory.path / "tensorboard" / folder.name, recipe) if tracker is not None and main else None

    if main:
        folder.mkdir(exist_ok=True)
        data.tokenizer.save(folder / "tokenizer.json")

    torch.manual_seed(seed)
    learner = make_learner(plan, name, recipe, accelerator)
    probe = _make_probe(plan, data, folder / "probes.jsonl", steps, learner)

    def on_step(report: StepReport) -> None:
        show(report)
        if curves is not None:
            curves.step(report)
        probe(report)

    progress = train(
        learner,
        NextToken(plan.padding_in_loss),
        make_batches(plan, data, seed).batch,
        recipe,
        folder,
        Hooks(on_step, lambda: stop.signal is not None),
    )
    save_model(learner.model, folder, accelerator)
    evaluation = evaluate(
        learner.model,
        evaluation_batches(
            data.validation,
            layout=plan.layout,
            batch_size=plan.micro_batch_size or plan.batch_size,
            context_length=plan.context,
            pad_id=data.tokenizer.pad_id,
            max_tokens=plan.evaluation_tokens,
        ),
        torch.from_numpy(data.tokenizer.token_bytes),
        accelerator,
    )
    if curves is not None:
        curves.finish(evaluation.loss)
    accelerator.free_memory()
    return {
        "variant": name,
        "seed": seed,
        "config": config.to_dict(),
        "parameters": parameters(config),
        "steps": steps,
        "tokens": progress.tokens,
        "wall_s": progress.wall_s,
        "step_s": record["step_s"].get(name),
        "val": asdict(evaluation),
        "kernel": record["kernel"][name],
        "device": accelerator.device.type,
        "dtype": plan.dtype,
        "versions": record["versions"],
        "git": record["git"],
        "data_fingerprint": record["data"]["fingerprint"],
    }


def _make_probe(
    plan: Plan, data: Prepared, path: Path, steps: int, learner: Learner[Transformer]
) -> Callable[[StepReport], None]:
    """What writes a line of `path` after each of the plan's probes; a step that is trained again replaces its line."""
    model, accelerator = learner.model, learner.accelerator
    due = probe_steps(steps, plan.probes)
    if not due:
        return lambda report: None
    prober = Prober(
        data.validation,
        context_length=plan.context,
        vocab_size=model.config.vocab_size,
        batch_size=plan.batch_size,
    )

    def probe(report: StepReport) -> None:
        if report.step not in due:
            return
        found = prober.measure(model, accelerator, step=report.step, tokens=report.tokens)
        if accelerator.is_main_process:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] < report.step]
            write_text(path, "".join(line + "\n" for line in [*kept, json.dumps(asdict(found))]))

    return probe


def open_resumed(path: Path, overrides: dict[str, Any]) -> Plan:
    """The plan that `path` was begun with. Raises ValueError when `overrides` (but `data`) would change it."""
    plan = Plan.from_dict(Directory(path).record()["plan"])
    changed = {name: value for name, value in overrides.items() if name != "data"}
    differences = plan_differences(plan, plan.replace(**changed))
    if differences:
        raise InputError(f"resume: {path} was begun with another plan ({'; '.join(differences)})")
    return plan
