"""One model trained once: batches that are a function of the step, losses weighted by tokens, exact resumption."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from sqa.config import ModelConfig
from sqa.data.batches import Batch, PackedBatches, PaddedBatches
from sqa.losses import IGNORE
from sqa.model import Transformer
from sqa.training.checkpoint import Progress, load_checkpoint, save_checkpoint


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained. `micro_batch_size` rows at a time go through the model; `clip_norm` 0 is no clipping."""

    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_fraction: float
    weight_decay: float
    clip_norm: float
    padding_in_loss: bool
    checkpoint_seconds: float


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a progress display is told after each step. `tokens` and `seconds` count the whole run so far."""

    step: int
    loss: float
    tokens: int
    seconds: float


class NonFiniteLoss(RuntimeError):
    """The loss became nan or infinite; the run stops here, others may go on."""


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved a checkpoint."""


def make_accelerator(device: str, dtype: str) -> Accelerator:
    """An Accelerator for `device` ("auto", "cpu", "cuda") with autocast for dtype bfloat16.

    Raises ValueError when the device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("plan: device is 'cuda', but PyTorch sees none here; use 'auto' or 'cpu'")
    AcceleratorState._reset_state()  # accelerate keeps the first precision of a process for ever
    return Accelerator(cpu=device == "cpu", mixed_precision="bf16" if dtype == "bfloat16" else "no")


def learning_rate(recipe: Recipe, step: int) -> float:
    """Rate of step 0 .. steps - 1: linear warm-up, then a cosine to zero after the last step."""
    warmup = round(recipe.warmup_fraction * recipe.steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW in its fused form: one pass over each parameter."""
    return torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    recipe: Recipe,
    batch: Batch,
    rate: float,
) -> tuple[float, int]:
    """One optimiser step on one batch. Returns the mean loss over its targets, and how many those are.

    Every target of the batch weighs the same, however the rows are split over micro-batches and processes.
    """
    labels = batch.labels_all_positions if recipe.padding_in_loss else batch.labels
    assert labels is not None  # padding_in_loss needs padded batches, which have them
    num_targets = int((labels != IGNORE).sum())
    mine = _rows_of(accelerator, labels.shape[0])
    micro = recipe.micro_batch_size or labels.shape[0]
    total = torch.zeros((), device=accelerator.device)
    for group in optimizer.param_groups:
        group["lr"] = rate
    for start in range(mine.start, mine.stop, micro):
        rows = slice(start, min(start + micro, mine.stop))
        with nullcontext() if rows.stop == mine.stop else accelerator.no_sync(model):
            output = model(
                batch.input_ids[rows].to(accelerator.device),
                labels[rows].to(accelerator.device),
                document_ids=None if batch.document_ids is None else batch.document_ids[rows].to(accelerator.device),
            )
            # processes average their gradients, hence the factor
            accelerator.backward(output.nll_sum * (accelerator.num_processes / num_targets))
            total += output.nll_sum.detach()
    if recipe.clip_norm:
        accelerator.clip_grad_norm_(model.parameters(), recipe.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(accelerator.reduce(total, "sum")) / num_targets, num_targets


def _rows_of(accelerator: Accelerator, batch_size: int) -> slice:
    """The rows of a batch that this process takes; the first processes take the odd ones."""
    share, odd = divmod(batch_size, accelerator.num_processes)
    index = accelerator.process_index
    start = index * share + min(index, odd)
    return slice(start, start + share + (index < odd))


def train(
    config: ModelConfig,
    recipe: Recipe,
    batches: PaddedBatches | PackedBatches,
    *,
    seed: int,
    folder: Path,
    accelerator: Accelerator,
    compile: bool = False,
    on_step: Callable[[StepReport], None] = lambda report: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Transformer, Progress]:
    """Train to the end, or on from the last checkpoint in `folder`; the model is saved there when done.

    `folder` gets config.json, model.safetensors, curve.jsonl (one object a step) and, while running, checkpoints.
    Raises NonFiniteLoss, and Interrupted after saving when `should_stop` says so.
    """
    torch.manual_seed(seed)
    model = Transformer(config)
    optimizer = make_optimizer(model, recipe)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    checkpoints = folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    progress = load_checkpoint(checkpoints, model, optimizer) or Progress(step=0, tokens=0, wall_s=0.0)
    _cut_curve(folder / "curve.jsonl", progress.step)
    if compile:
        model.compile()
    model.train()
    last_saved = time.monotonic()
    with open(folder / "curve.jsonl", "a", encoding="utf-8", buffering=1) as curve:  # for who reads along
        while progress.step < recipe.steps:
            step = progress.step
            start = time.perf_counter()
            rate = learning_rate(recipe, step)
            loss, targets = train_step(prepared, prepared_optimizer, accelerator, recipe, batches.batch(step), rate)
            progress = Progress(
                step=step + 1,
                tokens=progress.tokens + targets,
                wall_s=progress.wall_s + time.perf_counter() - start,
            )
            if not math.isfinite(loss):
                kept = sorted(path.name for path in checkpoints.glob("step-*"))
                raise NonFiniteLoss(
                    f"loss was {loss} at step {step + 1}; last good checkpoint: {kept[-1] if kept else 'none'}"
                )
            report = StepReport(step=step + 1, loss=loss, tokens=progress.tokens, seconds=progress.wall_s)
            curve.write(json.dumps(vars(report)) + "\n")
            on_step(report)
            stop = should_stop()
            if stop or time.monotonic() - last_saved > recipe.checkpoint_seconds:
                save_checkpoint(checkpoints, model, optimizer, progress)
                last_saved = time.monotonic()
            if stop:
                raise Interrupted(f"stopped after step {step + 1} of {recipe.steps}")
    accelerator.unwrap_model(prepared).save(folder)
    return model, progress


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
def evaluate(
    model: Transformer, batches: Iterable[Batch], token_bytes: torch.Tensor, accelerator: Accelerator
) -> Evaluation:
    """Sums over all batches, divided once. `token_bytes` (V,): UTF-8 bytes that each token stands for."""
    model.eval()
    device = accelerator.device
    nll = correct = all_nll = all_correct = 0.0
    tokens = positions = num_bytes = 0
    padded = False
    for batch in batches:
        padded |= batch.labels_all_positions is not None
        targets = batch.labels if batch.labels_all_positions is None else batch.labels_all_positions
        documents = None if batch.document_ids is None else batch.document_ids.to(device)
        with accelerator.autocast():
            losses, hits = model.token_losses(batch.input_ids.to(device), targets.to(device), document_ids=documents)
        losses, hits = losses.double().cpu(), hits.cpu()
        real = batch.labels != IGNORE
        nll += float(losses[real].sum())
        correct += int(hits[real].sum())
        tokens += int(real.sum())
        num_bytes += int(token_bytes[batch.labels[real]].sum())
        all_nll += float(losses.sum())
        all_correct += int(hits.sum())
        positions += int((targets != IGNORE).sum())
    if not num_bytes:
        raise ValueError("data: the validation split has no token to predict; give longer validation documents")
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
