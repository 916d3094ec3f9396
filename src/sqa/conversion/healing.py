"""Healing: training after surgery to match the original, first each layer alone, then the whole model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqa.conversion.settings import Settings
from sqa.conversion.subject import Subject
from sqa.training.checkpoint import Progress
from sqa.training.loop import Hooks, Recipe, make_accelerator, set_up, train


@dataclass(frozen=True)
class Healing(ABC):
    """A training task whose loss is a mean over real tokens."""

    student: Subject

    @abstractmethod
    def mean(self, part: Any) -> Tensor:
        """The loss of some rows, per token."""

    def count(self, batch: Any) -> int:
        return self.student.count(batch)

    def loss_sum(self, model: nn.Module, part: Any) -> Tensor:
        return self.mean(part) * self.count(part)


@dataclass(frozen=True)
class Layerwise(Healing):
    """Match each layer's attention to the original's, on the original's input: squared error as a share of energy.

    Layers share no parameters, so the mean over layers trains each independently.
    """

    teacher: Subject

    def mean(self, part: Any) -> Tensor:
        with torch.no_grad():
            pairs = list(self.teacher.layers(part))
        losses = [
            (self.student.attend(i, x, part) - target).float().square().sum()
            / target.float().square().sum().clamp(min=1e-30)  # a layer's attention may add nothing at all
            for i, (x, target) in enumerate(pairs)
        ]
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Distillation(Healing):
    """Match the model's outputs to the original's (arXiv 1503.02531, at temperature 1)."""

    teacher: Subject

    def mean(self, part: Any) -> Tensor:
        with torch.no_grad():
            target = self.teacher.hidden(part)
        return self.student.distance(self.student.hidden(part), self.teacher, target, part)


@dataclass(frozen=True)
class OwnLoss(Healing):
    """Minimise the model's own loss: what training alone would do."""

    def mean(self, part: Any) -> Tensor:
        return self.student.loss(part)


def heal(
    task: Healing,
    batches: Sequence[Any],
    settings: Settings,
    trained: Sequence[nn.Parameter],
    folder: Path,
    hooks: Hooks,
) -> Progress:
    """Train the task's student on each batch once, at a warmed-up cosine rate.

    It continues from the last checkpoint in `folder`, if there is one; a finished phase does not run again. Only the
    parameters `trained` change, each of which must get a gradient. Raises as `training.loop.train` does.
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
    student = task.student
    student.model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    learner = set_up(
        student.model, recipe, make_accelerator(student.device.type, settings.dtype), compile=settings.compile
    )
    progress = train(learner, task, batches.__getitem__, recipe, folder, hooks)
    student.model.requires_grad_(True)
    return progress
