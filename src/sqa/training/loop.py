"""The training loop: batches are a function of the step, all tokens weigh the same, and resuming is exact.

It minimises a `Task`, so that next-token training and distillation share it.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, Protocol, Self, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from sqa.data.batches import Batch
from sqa.errors import InputError
from sqa.files import naming, write_text
from sqa.losses import IGNORE
from sqa.model import Transformer
from sqa.progress import Interrupted, NonFiniteLoss, StepReport, StopFlag
from sqa.records import read_value
from sqa.training.checkpoint import Checkpoints, Progress


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    micro_batch_size: rows that go through the model at a time, on each process (0: all). clip_norm: 0 for none.
    output_projection_rate: the learning rate of attention's output projections over that of the rest. sharding: "full"
    (for a Transformer) gives each process a part of parameters, gradients and optimiser state, "none" all of them.
    """

    steps: int
    micro_batch_size: int
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    clip_norm: float
    checkpoint_seconds: float
    output_projection_rate: float = 1.0
    sharding: Literal["none", "full"] = "none"


class Rows(Protocol):
    """A batch of any kind: rows that can be split."""

    def __len__(self) -> int:
        """How many rows it has."""

    def take(self, rows: slice, device: torch.device, /) -> Self:
        """Some of the rows, on `device`."""


B = TypeVar("B", bound=Rows)
B_contra = TypeVar("B_contra", bound=Rows, contravariant=True)


class Task(Protocol[B_contra]):
    """The objective of a step: the sum of `loss_sum` over the parts of a batch, divided by its `count`."""

    def count(self, batch: B_contra, /) -> int:
        """The number of tokens of a whole batch that are learnt from."""

    def loss_sum(self, model: nn.Module, part: B_contra, /) -> Tensor:
        """The summed loss of some of the rows, a scalar with a gradient.

        Call `model` as a function: it may be a wrapper that shares gradients with other processes.
        """


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token. With `padding_in_loss`, padding is a target too (the published convention)."""

    padding_in_loss: bool = False

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.labels_all_positions if self.padding_in_loss else batch.labels
        assert labels is not None  # padding_in_loss needs padded batches, which have them
        return labels

    def count(self, batch: Batch) -> int:
        """The number of targets."""
        return int((self._labels(batch) != IGNORE).sum())

    def loss_sum(self, model: nn.Module, part: Batch) -> Tensor:
        """Nats, fp32."""
        total: Tensor = model(part.input_ids, self._labels(part), document_ids=part.document_ids).nll_sum
        return total


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Learner(Generic[M]):
    """A model and all that a training step needs. `called` is what a task calls: the model, wrapped for processes."""

    model: M
    called: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator


@dataclass(frozen=True)
class Hooks:
    """`on_step` gets a report of each step, off the clock, and may raise Interrupted. `stop` ends the run."""

    on_step: Callable[[StepReport], None] = lambda report: None
    stop: StopFlag = field(default_factory=StopFlag)


class _Accelerator(Accelerator):
    """An Accelerator with its own precision: accelerate keeps the precision of a process's first one for all others."""

    def __init__(self, *, cpu: bool, dtype: str) -> None:
        super().__init__(
            cpu=cpu,  # accelerate joins CPU processes only when told
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no gradients twice
        )
        self._low_precision = dtype == "bfloat16"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._low_precision)


def make_accelerator(device: str, dtype: str) -> Accelerator:
    """An Accelerator for `device` ("auto", "cpu", "cuda") with autocast for dtype bfloat16.

    It joins the processes that torchrun or `accelerate launch` started. Raises InputError when the device is missing
    and when the launcher asks accelerate to shard.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("plan: device is 'cuda', but PyTorch sees none here; use 'auto' or 'cpu'")
    accelerator = _Accelerator(cpu=device == "cpu" or not torch.accelerator.is_available(), dtype=dtype)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            f"launcher: accelerate must not shard, got {accelerator.distributed_type.value}; use sharding = 'full'"
        )
    return accelerator


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of step 0 .. steps - 1: linear warm-up, then a cosine to zero after the last step."""
    warmup = round(recipe.warmup_fraction * recipe.steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """Fused AdamW: one pass over each parameter."""
    groups: dict[float, list[nn.Parameter]] = {}  # by their factor on the learning rate
    for name, parameter in model.named_parameters():
        groups.setdefault(recipe.output_projection_rate if ".o_proj." in name else 1.0, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "rate": rate} for rate, parameters in groups.items()],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def set_up(model: M, recipe: Recipe, accelerator: Accelerator, *, compile: bool = False) -> Learner[M]:
    """Put a model on the accelerator's device, ready to train its parameters that require gradients.

    `compile` calls the model's own `compile`. Every process must give the same model.
    """
    called: nn.Module = model
    if recipe.sharding == "full" and accelerator.num_processes > 1:
        assert isinstance(model, Transformer)
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        register_fsdp_forward_method(model, "token_losses")
        optimizer = accelerator.prepare(make_optimizer(model, recipe))
    else:
        called, optimizer = accelerator.prepare(model, make_optimizer(model, recipe))
    if compile:
        model.compile()
    return Learner(model, called, optimizer, accelerator)


def train_step(learner: Learner[M], task: Task[B], batch: B, recipe: Recipe, rate: float) -> tuple[float, int]:
    """One optimiser step on one batch. Returns the mean loss a token that the task counts, and the number of them.

    Every token of the batch weighs the same, however the rows are split over micro-batches and processes.
    """
    total, count = _add_gradients(learner, task, batch, recipe)
    _update(learner, recipe, rate)
    return float(total) / count, count


def _add_gradients(learner: Learner[M], task: Task[B], batch: B, recipe: Recipe) -> tuple[Tensor, int]:
    """The summed loss of the whole batch, and the number of its tokens."""
    accelerator = learner.accelerator
    count = task.count(batch)
    share = len(batch) // accelerator.num_processes  # the same number of rows for each process
    mine = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    micro = recipe.micro_batch_size or len(batch)
    total = torch.zeros((), device=accelerator.device)
    for start in mine[::micro]:
        stop = min(start + micro, mine.stop)
        part = batch.take(slice(start, stop), accelerator.device)
        with _gradients_shared(learner.called, last=stop == mine.stop):
            with accelerator.autocast():
                loss_sum = task.loss_sum(learner.called, part)
            # processes average their gradients, hence the factor
            accelerator.backward(loss_sum * (accelerator.num_processes / count))
        total += loss_sum.detach()
    return accelerator.reduce(total, "sum"), count


@contextmanager
def _gradients_shared(called: nn.Module, *, last: bool) -> Iterator[None]:
    """Share gradients between processes only with the last part of a batch."""
    if isinstance(called, FSDPModule):
        called.set_requires_gradient_sync(last)
        yield
    elif isinstance(called, DistributedDataParallel) and not last:
        with called.no_sync():
            yield
    else:
        yield


def _update(learner: Learner[M], recipe: Recipe, rate: float) -> None:
    for group in learner.optimizer.param_groups:
        group["lr"] = rate * group.get("rate", 1.0)
    if recipe.clip_norm:
        learner.accelerator.clip_grad_norm_(learner.model.parameters(), recipe.clip_norm)
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def train(
    learner: Learner[M],
    task: Task[B],
    batch_at: Callable[[int], B],
    recipe: Recipe,
    folder: Path,
    hooks: Hooks = Hooks(),
) -> Progress:
    """Train to the end, or on from the last checkpoint in `folder`. Step t takes `batch_at(t)`, 0 <= t < recipe.steps.

    `folder` gets curve.jsonl (a StepReport a line) and checkpoints, one of them after the last step, so that a finished
    run is not trained again. The model stays in its mode (train or eval).

    Raises NonFiniteLoss, and Interrupted after saving when `hooks.stop` has a signal.
    """
    accelerator, stop = learner.accelerator, hooks.stop
    alone, main = accelerator.num_processes == 1, accelerator.is_main_process
    curve_path = folder / "curve.jsonl" if main else Path(os.devnull)
    checkpoints = Checkpoints(folder / "checkpoints")
    whole = _whole_lines(curve_path)
    progress = checkpoints.load(learner.model, learner.optimizer, at_most=len(whole))
    saved, last_saved = progress.step, time.monotonic()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(curve_path, "".join(whole[: progress.step]))  # later steps are trained again
    # written line by line, for others to read meanwhile
    with stop.held(), open(curve_path, "a", encoding="utf-8", buffering=1) as curve:

        def save() -> None:
            if main:
                os.fsync(curve)  # the curve must have every step of the checkpoint
            checkpoints.save(learner.model, learner.optimizer, progress)

        try:
            while progress.step < recipe.steps:
                start = time.perf_counter()
                # a process alone can stop within a step; several must end after the same one
                with stop.at_once(_stopped(progress, recipe)) if alone else nullcontext():
                    total, count = _add_gradients(learner, task, batch_at(progress.step), recipe)
                _update(learner, recipe, learning_rate(recipe, progress.step))
                loss = float(total) / count
                progress = Progress(
                    step=progress.step + 1,
                    tokens=progress.tokens + count,
                    wall_s=progress.wall_s + time.perf_counter() - start,
                )
                if not math.isfinite(loss):
                    good = f"step-{saved}" if saved else "none"
                    raise NonFiniteLoss(f"loss was {loss} at step {progress.step}; last good checkpoint: {good}")
                report = StepReport(step=progress.step, loss=loss, tokens=progress.tokens, seconds=progress.wall_s)
                with naming(curve_path):
                    curve.write(json.dumps(vars(report)) + "\n")
                reason = None
                try:
                    hooks.on_step(report)
                except Interrupted as error:  # all processes end together
                    reason = error
                due = time.monotonic() - last_saved > recipe.checkpoint_seconds
                stopping, due = _any(accelerator, reason is not None or stop.signal is not None, due)
                if stopping:
                    raise reason or Interrupted(_stopped(progress, recipe))
                if due or progress.step == recipe.steps:
                    save()
                    saved, last_saved = progress.step, time.monotonic()
        except Interrupted:
            if progress.step > saved:
                save()
            raise
        finally:
            checkpoints.close()
    return progress


def _stopped(progress: Progress, recipe: Recipe) -> str:
    return f"stopped after step {progress.step} of {recipe.steps}"


def _whole_lines(curve: Path) -> list[str]:
    """The lines of a curve up to the first that is torn or out of order."""
    lines = curve.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if curve.exists() else []
    for i, line in enumerate(lines):
        try:
            whole = line.endswith("\n") and read_value(StepReport, json.loads(line), "curve").step == i + 1
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            return lines[:i]
    return lines


def _any(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Whether any process sets each flag: all must do the same next, or they would wait for each other."""
    if accelerator.num_processes == 1:
        return list(flags)
    given = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return [bool(flag) for flag in accelerator.reduce(given, "sum").tolist()]


def save_model(model: Transformer, folder: Path, accelerator: Accelerator) -> None:
    """Write config.json and model.safetensors; process 0 gathers a sharded model first."""
    if isinstance(model, FSDPModule):
        tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        with torch.device("meta"):
            model = Transformer(model.config)
        if accelerator.is_main_process:
            model.load_state_dict(tensors, assign=True)
    if accelerator.is_main_process:
        model.save(folder)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of the validation set. Loss is in nats a real token; `_all_positions` counts padding too."""

    loss: float
    perplexity: float
    accuracy: float
    bits_per_byte: float
    tokens: int
    loss_all_positions: float | None = None
    accuracy_all_positions: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (value < 0 or ("accuracy" in name and value > 1)):  # a loss may be nan
                raise InputError(f"{name} must be {'from 0 to 1' if 'accuracy' in name else '0 or more'}, got {value}")


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch], token_bytes: Tensor, accelerator: Accelerator) -> Evaluation:
    """Evaluate on all batches, over all processes. `token_bytes` (V,): UTF-8 bytes each token stands for."""
    model.eval()
    sums = [(0.0, 0, 0, 0, 0.0, 0, 0)]
    padded = False
    for batch in (_share_of(batch, accelerator) for batch in batches):
        padded |= batch.labels_all_positions is not None
        there = batch.take(slice(None), accelerator.device)
        targets = there.labels if there.labels_all_positions is None else there.labels_all_positions
        with accelerator.autocast():
            losses, hits = model.token_losses(there.input_ids, targets, document_ids=there.document_ids)
        losses, hits, real = losses.cpu().double(), hits.cpu(), batch.labels != IGNORE
        sums.append((
            float(losses[real].sum()), int(hits[real].sum()), int(real.sum()),
            int(token_bytes[batch.labels[real]].sum()),
            float(losses.sum()), int(hits.sum()), int((targets != IGNORE).sum()),
        ))  # fmt: skip
    totals = map(sum, zip(*gather_object(sums), strict=True))
    real_nll, correct, tokens, num_bytes, every_nll, all_correct, positions = totals
    if not num_bytes:
        raise InputError("data: the validation split has no token to predict; give longer validation documents")
    nll, all_nll = max(real_nll, 0.0), max(every_nll, 0.0)  # rounding may take a sure prediction below 0; nan stays
    loss = nll / tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        accuracy=correct / tokens,
        bits_per_byte=nll / math.log(2) / num_bytes,
        tokens=tokens,
        loss_all_positions=all_nll / positions if padded else None,
        accuracy_all_positions=all_correct / positions if padded else None,
    )


def _share_of(batch: Batch, accelerator: Accelerator) -> Batch:
    """This process's rows of a batch, or one row without targets: a sharded model must run in every process."""
    rows = range(accelerator.process_index, len(batch.labels), accelerator.num_processes)
    share = batch.take(list(rows) or [0])
    if not rows:
        for labels in (share.labels, share.labels_all_positions):
            if labels is not None:
                labels.fill_(IGNORE)
    return share
