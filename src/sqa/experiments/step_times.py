"""The timing phase: training steps of all variants in turns, in the memory of one model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from sqa.data import Prepared
from sqa.experiments.plan import Plan
from sqa.experiments.run import make_batches, make_learner, make_recipe
from sqa.measure.timing import Timing, take_turns
from sqa.model import Transformer
from sqa.progress import Display
from sqa.training.checkpoint import of_main
from sqa.training.loop import Learner, NextToken, train_step

_WARMUP = 2


def time_steps(plan: Plan, data: Prepared, accelerator: Accelerator, display: Display) -> dict[str, Timing]:
    """Seconds of a training step of each variant, timed in turns after a warm-up; empty without timing rounds."""
    if not plan.timing_rounds:
        return {}
    display.start("timing all variants in turns", (plan.timing_rounds + _WARMUP) * len(plan.variants))
    batches, task = make_batches(plan, data, plan.seeds[0]), NextToken(plan.padding_in_loss)
    recipes = {name: make_recipe(plan, name, plan.timing_rounds) for name in plan.variants}
    held = {name: _Held(make_learner(plan, name, recipes[name], accelerator)) for name in plan.variants}

    def step(name: str) -> None:
        # always batch 0, so that all contestants do the same work
        train_step(held[name].learner, task, batches.batch(0), recipes[name], recipes[name].learning_rate)

    timings = take_turns(
        {name: partial(step, name) for name in plan.variants},
        rounds=plan.timing_rounds,
        warmup=_WARMUP,
        device=accelerator.device,
        on_turn=lambda: display.step(None),
        around=lambda name: held[name].in_memory(),
    )
    accelerator.free_memory()
    display.finish("timed")
    return of_main(timings)  # a time budget must give all processes the same steps


class _Held:
    """A learner whose parameters and moments have memory only during its turns.

    Their values are not kept, since a step's time does not depend on them: each turn starts with small random weights.
    """

    def __init__(self, learner: Learner[Transformer]) -> None:
        self.learner = learner
        self._sizes: dict[Tensor, int] = {}
        self._release()

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        with torch.no_grad():
            for tensor, size in self._sizes.items():
                tensor.untyped_storage().resize_(size)
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.normal_(std=0.02)
                else:
                    tensor.zero_()
        yield
        self._release()

    def _release(self) -> None:
        optimizer = self.learner.optimizer
        optimizer.zero_grad()
        moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        for tensor in (*self.learner.model.parameters(), *moments):
            if not isinstance(tensor, DTensor):  # each process has only a part of a sharded model
                storage = tensor.untyped_storage()
                self._sizes[tensor] = storage.nbytes()
                storage.resize_(0)
