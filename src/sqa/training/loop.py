"""One model trained once: batches that are a function of the step, losses weighted by tokens, exact resumption.

What is minimised is a `Task`, so that training on next tokens and distillation share this loop.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, Protocol, Self, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from sqa.data.batches import Batch
from sqa.errors import InputError
from sqa.losses import IGNORE
from sqa.model import Transformer
from sqa.progress import Interrupted, NonFiniteLoss, StepReport
from sqa.training.checkpoint import Checkpoints, Progress


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    micro_batch_size rows of a batch at a time (0: all) go through the model, on each process; clip_norm 0 is no
    clipping. sharding "full", for a Transformer, gives each process its part of the parameters, gradients and optimiser
    state, "none" all. A checkpoint is written every checkpoint_seconds.
    """

    steps: int
    micro_batch_size: int
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    clip_norm: float
    checkpoint_seconds: float
    sharding: Literal["none", "full"] = "none"


class Rows(Protocol):
    """A batch, of whatever kind: rows that can be taken apart."""

    def __len__(self) -> int:
        """How many rows it has."""

    def take(self, rows: slice, device: torch.device, /) -> Self:
        """Some of the rows, on `device`."""


B = TypeVar("B", bound=Rows)
B_contra = TypeVar("B_contra", bound=Rows, contravariant=True)


class Task(Protocol[B_contra]):
    """What a step minimises: the sum of `loss_sum` over the parts of a batch, divided by its `count`."""

    def count(self, batch: B_contra, /) -> int:
        """How many tokens of a whole batch are learnt from. The run counts them."""

    def loss_sum(self, model: nn.Module, part: B_contra, /) -> Tensor:
        """The loss of some of the rows, as a scalar that can be differentiated: its mean over tokens times their count.

        `model` is to be called as a function: it may be wrapped, and shares gradients with other processes.
        """


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token; with `padding_in_loss`, padding is a target too (the published convention)."""

    padding_in_loss: bool = False

    def _labels(self, batch: Batch) -> Tensor:
        labels = batch.labels_all_positions if self.padding_in_loss else batch.labels
        assert labels is not None  # padding_in_loss needs padded batches, which have them
        return labels

    def count(self, batch: Batch) -> int:
        """The targets."""
        return int((self._labels(batch) != IGNORE).sum())

    def loss_sum(self, model: nn.Module, part: Batch) -> Tensor:
        """Nats, fp32."""
        total: Tensor = model(part.input_ids, self._labels(part), document_ids=part.document_ids).nll_sum
        return total


M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Learner(Generic[M]):
    """A model with all that a step needs. `called` is the model as a task calls it, shared between processes."""

    model: M
    called: nn.Module
    optimizer: torch.optim.Optimizer
    accelerator: Accelerator


@dataclass(frozen=True)
class Hooks:
    """`on_step` is told of each step; `should_stop` is asked after each. A step's time has neither in it."""

    on_step: Callable[[StepReport], None] = lambda report: None
    should_stop: Callable[[], bool] = lambda: False


def make_accelerator(device: str, dtype: str) -> Accelerator:
    """An Accelerator for `device` ("auto", "cpu", "cuda") with autocast for dtype bfloat16.

    It joins the processes that torchrun or `accelerate launch` started. Raises ValueError when the device is not there
    and when the launcher asks accelerate to shard.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("plan: device is 'cuda', but PyTorch sees none here; use 'auto' or 'cpu'")
    AcceleratorState._reset_state()  # accelerate keeps the first precision of a process for ever
    accelerator = Accelerator(
        cpu=device == "cpu" or not torch.accelerator.is_available(),  # accelerate joins CPU processes only when told
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy of gradients
    )
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
    """AdamW in its fused form: one pass over each parameter."""
    return torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def set_up(model: M, recipe: Recipe, accelerator: Accelerator, *, compile: bool = False) -> Learner[M]:
    """A model ready to be trained, on the accelerator's device; `compile` calls the model's own `compile`.

    Its parameters that require gradients are trained. Every process must give the same model.
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
    """One optimiser step on one batch. Returns the mean loss over the tokens that the task counts, and that count.

    Every token of the batch weighs the same, however the rows are split over micro-batches and processes.
    """
    accelerator, optimizer = learner.accelerator, learner.optimizer
    count = task.count(batch)
    mine = _rows_of(accelerator, len(batch))
    micro = recipe.micro_batch_size or len(batch)
    total = torch.zeros((), device=accelerator.device)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for start in range(mine.start, mine.stop, micro):
        rows = slice(start, min(start + micro, mine.stop))
        part = batch.take(rows, accelerator.device)
        with nullcontext() if rows.stop == mine.stop else accelerator.no_sync(learner.called):
            with accelerator.autocast():
                loss_sum = task.loss_sum(learner.called, part)
            # processes average their gradients, hence the factor
            accelerator.backward(loss_sum * (accelerator.num_processes / count))
            total += loss_sum.detach()
    if recipe.clip_norm:
        accelerator.clip_grad_norm_(learner.model.parameters(), recipe.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(total, "sum")) / count, count


def _rows_of(accelerator: Accelerator, batch_size: int) -> slice:
    """The rows of a batch that this process takes: as many as the others, which work in step with it."""
    share = batch_size // accelerator.num_processes
    return slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)


def train(
    learner: Learner[M],
    task: Task[B],
    batch_at: Callable[[int], B],
    recipe: Recipe,
    folder: Path,
    hooks: Hooks = Hooks(),
) -> Progress:
    """Train to the end, or on from the last checkpoint in `folder`. Step t takes `batch_at(t)`, 0 <= t < recipe.steps.

    `folder` gets curve.jsonl (a StepReport a line) and checkpoints. The last step has one, so that a run which is over
    is not trained again. The model stays in its mode (train or eval).

    Raises NonFiniteLoss, and Interrupted after saving when `hooks.should_stop` says so.
    """
    accelerator = learner.accelerator
    checkpoints = Checkpoints(folder / "checkpoints")
    progress = checkpoints.load(learner.model, learner.optimizer) or Progress(step=0, tokens=0, wall_s=0.0)
    curve_path = folder / "curve.jsonl" if accelerator.is_main_process else Path(os.devnull)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _cut_curve(curve_path, progress.step)
    last_saved = time.monotonic()
    with open(curve_path, "a", encoding="utf-8", buffering=1) as curve:  # a line at a time: others read it meanwhile
        while progress.step < recipe.steps:
            step = progress.step
            start = time.perf_counter()
            loss, count = train_step(learner, task, batch_at(step), recipe, learning_rate(recipe, step))
            progress = Progress(
                step=step + 1,
                tokens=progress.tokens + count,
                wall_s=progress.wall_s + time.perf_counter() - start,
            )
            if not math.isfinite(loss):
                checkpoints.wait()
                kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
                raise NonFiniteLoss(
                    f"loss was {loss} at step {step + 1}; last good checkpoint: {kept[-1] if kept else 'none'}"
                )
            report = StepReport(step=step + 1, loss=loss, tokens=progress.tokens, seconds=progress.wall_s)
            curve.write(json.dumps(vars(report)) + "\n")
            hooks.on_step(report)
            due = time.monotonic() - last_saved > recipe.checkpoint_seconds
            stop, due = _any(accelerator, hooks.should_stop(), due)
            if stop or due or progress.step == recipe.steps:
                checkpoints.save(learner.model, learner.optimizer, progress)
                last_saved = time.monotonic()
            if stop:
                checkpoints.wait()
                raise Interrupted(f"stopped after step {step + 1} of {recipe.steps}")
    checkpoints.wait()
    return progress


def _any(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Whether any process says so: all must do the same thing next, or they would wait for each other."""
    if accelerator.num_processes == 1:
        return list(flags)
    given = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return [bool(flag) for flag in accelerator.reduce(given, "sum").tolist()]


def save_model(model: Transformer, folder: Path, accelerator: Accelerator) -> None:
    """Write config.json and model.safetensors; a sharded model is gathered on process 0 for it."""
    if isinstance(model, FSDPModule):
        tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        with torch.device("meta"):
            model = Transformer(model.config)
        if accelerator.is_main_process:
            model.load_state_dict(tensors, assign=True)
    if accelerator.is_main_process:
        model.save(folder)


def _cut_curve(path: Path, step: int) -> None:
    """Drop what was written after the checkpoint that training goes on from; a torn last line as well."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:step]), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measured on the validation set. Loss in nats a token over real tokens; `_all_positions` counts padding too."""

    loss: float
    perplexity: float
    accuracy: float
    bits_per_byte: float
    tokens: int
    loss_all_positions: float | None = None
    accuracy_all_positions: float | None = None


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch], token_bytes: Tensor, accelerator: Accelerator) -> Evaluation:
    """Sums over all batches and processes, divided once. `token_bytes` (V,): UTF-8 bytes each token stands for."""
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
    nll, correct, tokens, num_bytes, all_nll, all_correct, positions = map(sum, zip(*gather_object(sums), strict=True))
    if not num_bytes:
        raise InputError("data: the validation split has no token to predict; give longer validation documents")
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
    """This process's rows of a batch; where none is left, one without targets (a sharded model runs on all or none)."""
    rows = range(accelerator.process_index, len(batch.labels), accelerator.num_processes)
    share = batch.take(list(rows) or [0])
    if not rows:
        for labels in (share.labels, share.labels_all_positions):
            if labels is not None:
                labels.fill_(IGNORE)
    return share
