"""The curves as TensorBoard reads them back: while a run trains, and after one that was killed has gone on."""

import itertools
import json
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sqa.experiments.compare import compare
from sqa.experiments.plan import Plan
from sqa.experiments.run import make_recipe
from sqa.progress import StepReport
from sqa.training.loop import learning_rate

STEPS = 8


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    text = Path(__file__).read_text(encoding="utf-8").splitlines()
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line * 9}) + "\n" for line in text if line))
    return Plan(
        name="tracked",
        data=str(tmp_path / "text.jsonl"),
        train_fraction=0.9,
        validation_fraction=0.1,
        variants=("sqa",),
        seeds=(3,),
        model={"vocab_size": 300, "num_layers": 1, "d_ff": 24, "d_model": 16, "num_heads": 4},
        context=16,
        batch_size=2,
        budget=f"steps={STEPS}",
        timing_rounds=0,
    )


class Killed(BaseException):
    """What a killed process does: nothing more."""


class Watcher:
    """A display that reads along, and kills the run after a step."""

    def __init__(self, out: Path, kill_after: int | None = None) -> None:
        self._out, self._kill_after = out, kill_after

    def note(self, text: str) -> None: ...

    def start(self, label: str, steps: int) -> None: ...

    def step(self, report: StepReport | None) -> None:
        assert report is not None
        assert [line["step"] for line in curve(self._out)] == list(range(1, report.step + 1))
        if report.step > 1:
            assert events(self._out, "loss")[-1][0] == report.step - 1
        if report.step == self._kill_after:
            raise Killed

    def finish(self, text: str) -> None: ...


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "sqa-3" / "curve.jsonl").read_text().splitlines()]


def events(out: Path, tag: str) -> list[tuple[int, float]]:
    read = EventAccumulator(str(out / "tensorboard" / "sqa-3"))
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(tag)]


def test_curves_stream_and_a_killed_run_goes_on_without_duplicates(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Killed):
        compare(plan, out, Watcher(out, kill_after=5), track=True)
    (result,) = compare(plan, out, Watcher(out), resume=True, track=True).results
    assert len(list((out / "tensorboard" / "sqa-3").iterdir())) == 2
    lines = curve(out)
    recipe = make_recipe(plan, "sqa", STEPS)
    rates = [(step, learning_rate(recipe, step - 1)) for step in range(1, STEPS + 1)]
    speeds = [
        (here["step"], (here["tokens"] - before["tokens"]) / (here["seconds"] - before["seconds"]))
        for before, here in itertools.pairwise(lines)
    ]
    wanted = {
        "loss": [(line["step"], line["loss"]) for line in lines],
        "learning_rate": rates,
        "tokens_per_s": speeds,
        "validation_loss": [(STEPS, result.val.loss)],
    }
    for tag, points in wanted.items():
        found = events(out, tag)
        assert [step for step, _ in found] == [step for step, _ in points], tag
        # event files hold 32-bit floats
        assert [value for _, value in found] == pytest.approx([value for _, value in points], rel=2**-24, abs=1e-12)


def test_without_tensorboard_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, plan: Plan, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"--track needs tensorboard; .* pip install .* '\.\[track\]'"):
        compare(plan, tmp_path / "out", track=True)
    assert not (tmp_path / "out").exists()
