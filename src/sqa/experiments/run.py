"""One run of a comparison: data, batches and recipe, training, evaluation, and the result."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from sqa.attention.call import Call
from sqa.attention.kernels import resolve
from sqa.config import ModelConfig
from sqa.cost import parameters
from sqa.data import Prepared, prepare
from sqa.data.batches import Batches, evaluation_batches
from sqa.dtypes import find_dtype
from sqa.errors import InputError
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Cell, Plan, cell_name
from sqa.experiments.results import Record, RunResult
from sqa.files import write_text
from sqa.model import Transformer
from sqa.progress import NonFiniteLoss, StepReport, StopFlag
from sqa.records import to_json
from sqa.training.loop import Hooks, Learner, NextToken, Recipe, evaluate, save_model, set_up, train
from sqa.training.probes import Prober, probe_steps


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the runs of one process share. `source`: where the text is here. `track`: write curves for TensorBoard.

    `any_kernel`: continue runs even with another kernel than at the comparison's start. Raises InputError when `data`
    is not the text of the comparison's start.
    """

    record: Record
    directory: Directory
    source: str
    data: Prepared
    accelerator: Accelerator
    stop: StopFlag
    track: bool = False
    any_kernel: bool = False

    def __post_init__(self) -> None:
        if (begun := self.record.data.fingerprint) != (here := self.data.fingerprint):
            raise InputError(
                f"data: the comparison was begun on other text (fingerprint {begun[:12]}, now {here[:12]})"
            )

    @property
    def plan(self) -> Plan:
        """The plan of the comparison."""
        return self.record.plan


def prepare_data(plan: Plan, source: str, note: Callable[[str], None] = lambda text: None) -> Prepared:
    """The text of `source` with the plan's tokenizer and splits.

    Raises InputError for too little text, and where the plan has probes but no validation document is long enough.
    """
    data = prepare(
        source,
        vocab_size=plan.model_config(plan.variants[0]).vocab_size,
        train_fraction=plan.train_fraction,
        validation_fraction=plan.validation_fraction,
        note=note,
    )
    if int(np.max(data.validation.lengths)) < 2:
        raise InputError("data: the validation split has no token to predict; give longer validation documents")
    if plan.probes:
        make_prober(plan, data)
    return data


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


def make_prober(plan: Plan, data: Prepared) -> Prober:
    """The probes of a plan, the same for every run. Raises InputError where no document is as long as the context."""
    return Prober(
        data.validation,
        context_length=plan.context,
        vocab_size=data.tokenizer.vocab_size,
        batch_size=plan.batch_size,
    )


def make_recipe(plan: Plan, name: str, steps: int) -> Recipe:
    """A variant's recipe for the training loop."""
    shared = {field.name: getattr(plan, field.name) for field in fields(Recipe) if field.name != "steps"}
    return Recipe(steps=steps, **shared | {"learning_rate": plan.rate(name)})


def make_learner(plan: Plan, name: str, recipe: Recipe, accelerator: Accelerator) -> Learner[Transformer]:
    """A new model of a variant, ready to train."""
    model = Transformer(plan.model_config(name))
    model.model.activation_checkpointing = plan.activation_checkpointing
    return set_up(model, recipe, accelerator, compile=plan.compile)


def kernel_of(plan: Plan, config: ModelConfig, device: str) -> str:
    """The names of the kernels that a model's layers use in training, separated by ", "."""
    dtype, documents = find_dtype(plan.dtype), plan.layout == "packed"
    calls = (
        Call.of_layer(layer, length=plan.context, device=device, dtype=dtype, documents=documents)
        for layer in config.layers
    )
    return ", ".join(sorted({resolve(call).kernel for call in calls}))


def label(plan: Plan, cell: Cell) -> str:
    """A run's name for a display."""
    return cell_name(cell) if len(plan.seeds) > 1 else cell[0]


def outcome_text(cell: Cell, outcome: RunResult | NonFiniteLoss) -> str:
    """A display's line about a run that has ended."""
    if isinstance(outcome, NonFiniteLoss):
        return f"{cell_name(cell)} stopped: {outcome}"
    return f"{cell_name(cell)}: val loss {outcome.val.loss:.4f} after {outcome.wall_s:.0f} s"


def run(session: Session, cell: Cell, show: Callable[[StepReport], None] = lambda report: None) -> RunResult:
    """Train one run, from its last checkpoint if there is one, and evaluate it; `show` gets a report of each step.

    Raises NonFiniteLoss, and Interrupted after saving a checkpoint when the session is to stop.
    """
    name, seed = cell
    plan, record, data, accelerator = session.plan, session.record, session.data, session.accelerator
    folder = session.directory.run_folder(name, seed)
    recipe = make_recipe(plan, name, record.steps[name])
    kernel, curves = _kernel_here(session, cell), None
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        data.tokenizer.save(folder / "tokenizer.json")
        if session.track:
            from sqa.experiments.tracking import TensorBoard

            curves = TensorBoard(session.directory.path / "tensorboard" / folder.name, recipe)

    torch.manual_seed(seed)
    learner = make_learner(plan, name, recipe, accelerator)
    probe = _make_probe(session, cell, learner.model)

    def on_step(report: StepReport) -> None:
        show(report)
        if curves is not None:
            curves.step(report)
        probe(report)

    task, hooks = NextToken(plan.padding_in_loss), Hooks(on_step, session.stop)
    progress = train(learner, task, make_batches(plan, data, seed).batch, recipe, folder, hooks)
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
    accelerator.free_memory()
    if not math.isfinite(evaluation.loss):
        raise NonFiniteLoss(f"validation loss was {evaluation.loss} after the last step")
    if curves is not None:
        curves.finish(evaluation.loss)
    return RunResult(
        variant=name,
        seed=seed,
        config=learner.model.config,
        parameters=parameters(learner.model.config),
        steps=recipe.steps,
        tokens=progress.tokens,
        wall_s=progress.wall_s,
        step_s=record.step_s.get(name),
        val=evaluation,
        kernel=kernel,
        device=accelerator.device.type,
        dtype=plan.dtype,
        versions=record.versions,
        git=record.git,
        data_fingerprint=record.data.fingerprint,
    )


def _kernel_here(session: Session, cell: Cell) -> str:
    """The kernels of a run; if it continues from a checkpoint, also those of the comparison's start.

    Raises InputError when they differ and the session does not allow that.
    """
    name, plan = cell[0], session.plan
    begun, here = session.record.kernel[name], kernel_of(plan, plan.model_config(name), session.accelerator.device.type)
    if begun == here:
        return here
    if not session.any_kernel:
        raise InputError(
            f"kernel: {name} was begun with {begun}, but would run with {here} here, which rounds differently; "
            f"see what `sqa kernels` misses, or give --any-kernel"
        )
    resumed = any((session.directory.run_folder(*cell) / "checkpoints").glob("step-*"))
    return ", ".join(sorted({begun, here})) if resumed else here


def _make_probe(session: Session, cell: Cell, model: Transformer) -> Callable[[StepReport], None]:
    """A function that probes after the planned steps, and writes probes.jsonl; a step done again replaces its line."""
    plan, path = session.plan, session.directory.run_folder(*cell) / "probes.jsonl"
    due = probe_steps(session.record.steps[cell[0]], plan.probes)
    if not due:
        return lambda report: None
    prober = make_prober(plan, session.data)

    def probe(report: StepReport) -> None:
        if report.step not in due:
            return
        found = prober.measure(model, session.accelerator, step=report.step, tokens=report.tokens)
        if session.accelerator.is_main_process:
            kept = (line for line in session.directory.probes(cell) if line.step < report.step)
            write_text(path, "".join(json.dumps(line, default=to_json) + "\n" for line in (*kept, found)))

    return probe


def text_here(plan: Plan, source: str | None, *, resuming: bool) -> str:
    """Where the text is: `source`, or else the plan's path. Raises InputError if a resumed plan's path is missing."""
    if source is None and resuming and plan.data not in ("builtin", "wikipedia") and not Path(plan.data).exists():
        raise InputError(
            f"data: {plan.data!r}, as the comparison was begun, is not there from here ({os.path.abspath(plan.data)}); "
            f"name it with --data"
        )
    return plan.data if source is None else source
