"""Run by torchrun in each process: the comparisons of a JSON list, some of which end by a signal to process 1.

`{"out", "plan", "resume", "signal": {"number", "step"}}`, the signal and resume optional.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from sqa.data.batches import Batch
from sqa.experiments.compare import compare
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Plan
from sqa.experiments.run import make_learner, make_recipe
from sqa.progress import Interrupted, StepReport
from sqa.training.loop import NextToken, make_accelerator, train_step


@dataclass
class SignalAt:
    """A display that shows nothing and sends this process a signal after a step."""

    number: int
    step_number: int

    def note(self, text: str) -> None: ...
    def start(self, label: str, steps: int) -> None: ...
    def finish(self, text: str) -> None: ...

    def step(self, report: StepReport | None) -> None:
        if report is not None and report.step == self.step_number:
            os.kill(os.getpid(), self.number)


def shards(plan: Plan) -> dict[str, Any]:
    """How many elements of each parameter this process holds, and of how many."""
    model = make_learner(plan, "sqa", make_recipe(plan, "sqa", 1), make_accelerator("cpu", "float32")).model
    return {
        name: [isinstance(p, DTensor), p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel()]
        for name, p in model.named_parameters()
    }


def reductions(plan: Plan) -> list[int]:
    """How often gradients are shared in one step: the rows of a process at once, and one by one."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    counts = []
    for micro in (0, 1):
        recipe = make_recipe(plan.replace(micro_batch_size=micro), "sqa", 1)
        learner = make_learner(plan, "sqa", recipe, make_accelerator("cpu", "float32"))
        ids = torch.arange(32).view(4, 8)
        batch = Batch(input_ids=ids, labels=ids, labels_all_positions=None, document_ids=torch.zeros_like(ids).int())
        with patch.object(dist, name, wraps=getattr(dist, name)) as reduce:
            train_step(learner, NextToken(), batch, recipe, rate=0.0)
        counts.append(reduce.call_count)
    return counts


def main() -> None:
    rank = os.environ["RANK"]
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(job["out"])
        plan = Directory(out).resumed({}) if job.get("resume") else Plan.from_dict(job["plan"])
        signal = job.get("signal") if rank == "1" else None
        display = SignalAt(signal["number"] if signal else 0, signal["step"] if signal else 0)
        try:
            compare(plan, out, display, resume=job.get("resume", False))
        except Interrupted as error:
            (out / f"interrupted-{rank}").write_text(str(error))
        if plan.sharding == "full":
            (out / f"shards-{rank}.json").write_text(json.dumps(shards(plan)))
            (out / f"reductions-{rank}.json").write_text(json.dumps(reductions(plan)))


if __name__ == "__main__":
    main()
