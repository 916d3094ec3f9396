"""Training after surgery, against the original: each layer on its own, then the whole model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqa.conversion.settings import Settings
from sqa.conversion.subject import Subject
from sqa.progress import Interrupted, NonFiniteLoss, StepReport
from sqa.training.checkpoint import Checkpoints, Progress
from sqa.training.loop import Recipe, make_optimizer
from sqa.training.loop import learning_rate as rate_at

Objective = Callable[[Any], Tensor]


def layerwise(student: Subject, teacher: Subject) -> Objective:
    """Each layer's attention against the original's on the original's input: squared error as a share of its energy.

    Layers share nothing, so their mean trains them independently.
    """

    def objective(batch: Any) -> Tensor:
        with torch.no_grad():
            pairs = teacher.layers(batch)
        losses = [
            (student.attend(i, read, batch) - given).float().square().sum() / given.float().square().sum()
            for i, (read, given) in enumerate(pairs)
        ]
        return torch.stack(losses).mean()

    return objective


def distillation(student: Subject, teacher: Subject) -> Objective:
    """How far the model's outputs are from the original's, a token (arXiv 1503.02531, at temperature 1)."""

    def objective(batch: Any) -> Tensor:
        with torch.no_grad():
            target = teacher.hidden(batch)
        return student.distance(student.hidden(batch), teacher, target, batch)

    return objective


def heal(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Any],
    settings: Settings,
    *,
    trained: Sequence[nn.Parameter],
    folder: Path,
    on_step: Callable[[StepReport], None],
    should_stop: Callable[[], bool],
) -> Progress:
    """Train on each batch once, at a warmed-up cosine rate, or go on from the last checkpoint in `folder`.

    All but the parameters `trained` stay as they are; dtype bfloat16 means autocast. A phase that is over has a last
    checkpoint, and is not run again. Raises Interrupted after saving when `should_stop` says so, and NonFiniteLoss.
    """
    recipe = Recipe(
        steps=len(batches),
        micro_batch_size=0,
        learning_rate=settings.learning_rate,
        warmup_fraction=0.1,
        weight_decay=0.0,
        clip_norm=1.0,
        checkpoint_seconds=120.0,
    )
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    dtype = getattr(torch, settings.dtype)
    optimizer = make_optimizer(model, recipe)
    checkpoints = Checkpoints(folder)
    progress = checkpoints.load(model, optimizer) or Progress(step=0, tokens=0, wall_s=0.0)
    last_saved = time.monotonic()
    while progress.step < recipe.steps:
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, progress.step)
        with torch.autocast(trained[0].device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = objective(batches[progress.step])
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress = Progress(
            step=progress.step + 1,
            tokens=progress.tokens + settings.tokens_per_step,
            wall_s=progress.wall_s + time.perf_counter() - start,
        )
        if not math.isfinite(loss.item()):
            raise NonFiniteLoss(f"convert: loss was {loss.item()} at step {progress.step} of healing; lower its rate")
        on_step(StepReport(step=progress.step, loss=loss.item(), tokens=progress.tokens, seconds=progress.wall_s))
        stop, over = should_stop(), progress.step == recipe.steps
        if stop or over or time.monotonic() - last_saved > recipe.checkpoint_seconds:
            checkpoints.save(model, optimizer, progress)
            last_saved = time.monotonic()
        if stop and not over:
            raise Interrupted(f"stopped after step {progress.step} of {recipe.steps} of healing")
    model.requires_grad_(True)
    return progress
