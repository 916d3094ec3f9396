"""The timing phase: every variant has its turns, and the memory of one model is enough."""

import gc
import json
from pathlib import Path

import pytest
import torch

from sqa.cost import parameters
from sqa.experiments import step_times
from sqa.experiments.plan import Plan
from sqa.experiments.run import prepare_data
from sqa.progress import Display
from sqa.training.loop import make_accelerator


def bytes_of_tensors() -> int:
    """What all tensors that live now hold."""
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_variants_are_timed_in_the_memory_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text[i:]}) + "\n" for i in range(60)))
    plan = Plan(
        name="p",
        data=str(tmp_path / "text.jsonl"),
        train_fraction=0.8,
        validation_fraction=0.2,
        variants=("gqa", "sqa", "xsqa", "mha"),
        model={"vocab_size": 300, "num_layers": 2, "d_ff": 96, "d_model": 32, "num_heads": 4},
        context=32,
        batch_size=2,
        timing_rounds=3,
    )
    largest = 4 * max(parameters(plan.model_config(name)) for name in plan.variants)
    held: list[int] = []
    losses: list[float] = []
    real_step = step_times.train_step

    def step(*arguments: object) -> tuple[float, int]:
        found = real_step(*arguments)  # type: ignore[arg-type]
        losses.append(found[0])
        held.append(bytes_of_tensors())
        return found

    gc.collect()
    before = bytes_of_tensors()
    monkeypatch.setattr(step_times, "train_step", step)
    data = prepare_data(plan, plan.data)
    timings = step_times.time_steps(plan, data, make_accelerator("cpu", "float32"), Display())
    assert list(timings) == list(plan.variants)
    assert {timing.rounds for timing in timings.values()} == {3}
    assert len(held) == 4 * (3 + 2)
    assert all(0 < loss < 7 for loss in losses)  # ln 300 is 5.7
    assert max(held) - before < 1.5 * 3 * largest  # all four of them at once would be 4 times 3
