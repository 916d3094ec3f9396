"""A comparison that is stopped, in every phase, and goes on; with another kernel only where that is allowed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sqa import native
from sqa.attention import fused
from sqa.experiments.compare import compare
from sqa.experiments.plan import Plan
from sqa.files import default_cache_dir
from sqa.progress import Interrupted, StepReport

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
    lines = [json.dumps({"text": " ".join(words[i : i + 40])}) + "\n" for i in range(0, len(words), 20)]
    (tmp_path / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    return Plan(
        name="tiny",
        data=str(tmp_path / "text.jsonl"),
        variants=("sqa",),
        model={"vocab_size": 320, "num_layers": 2, "d_ff": 48, "d_model": 64, "num_heads": 4},
        context=32,
        batch_size=4,
        budget=f"steps={STEPS}",
        timing_rounds=1,
        evaluation_tokens=500,
        train_fraction=0.9,
        validation_fraction=0.1,
        device="cpu",
    )


class SignalAt:
    """Sends this process a signal after a step, or when a phase begins whose label has these words."""

    def __init__(self, step: int = 0, phase: str = "-") -> None:
        self._step, self._phase = step, phase

    def note(self, text: str) -> None:
        if self._phase in text:
            os.kill(os.getpid(), signal.SIGTERM)

    def start(self, label: str, steps: int) -> None:
        self.note(label)

    def step(self, report: StepReport | None) -> None:
        if report is not None and report.step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, text: str) -> None: ...

    def beside(self) -> "SignalAt":
        return self


def test_a_run_goes_on_with_another_kernel_only_where_that_is_allowed(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused.lacks():
        pytest.skip("gpu: the fused kernel runs on CPUs with a compiler")
    with pytest.raises(Interrupted, match=f"after step 3 of {STEPS}"):
        compare(plan, tmp_path / "out", SignalAt(step=3))
    monkeypatch.setattr(fused, "lacks", lambda: "no C++ compiler")
    with pytest.raises(ValueError, match=r"sqa was begun with fused, but would run with \w+ here.*--any-kernel"):
        compare(plan, tmp_path / "out", resume=True)
    (result,) = compare(plan, tmp_path / "out", resume=True, any_kernel=True).results
    here, begun = sorted(result.kernel.split(", "), reverse=result.kernel.startswith("fused"))
    assert begun == "fused"
    assert here != "fused"


@pytest.mark.parametrize("phase", ["Training a tokenizer", "Encoding text.jsonl (validation)", "timing all variants"])
def test_a_signal_before_the_first_run_leaves_what_the_same_command_starts_from(
    plan: Plan, tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(Interrupted, match="stopped"):
        compare(plan, tmp_path / "out", SignalAt(phase=phase))
    assert not (tmp_path / "out").exists()
    assert len(compare(plan, tmp_path / "out").results) == 1


def test_a_signal_while_a_run_is_evaluated_does_not_train_again(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqa.experiments import run

    def evaluated(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        pytest.fail("went on")

    whole = run.evaluate
    monkeypatch.setattr(run, "evaluate", evaluated)
    with pytest.raises(Interrupted, match="stopped"):
        compare(plan, tmp_path / "out")
    monkeypatch.setattr(run, "evaluate", whole)
    trained = (tmp_path / "out" / "sqa-0" / "curve.jsonl").read_text()
    (result,) = compare(plan, tmp_path / "out", resume=True).results
    assert (tmp_path / "out" / "sqa-0" / "curve.jsonl").read_text() == trained
    assert result.steps == STEPS


@pytest.mark.parametrize("limit", [3_000, 20_000, 90_000])
def test_a_full_disk_is_one_sentence_that_names_a_file(plan: Plan, tmp_path: Path, limit: int) -> None:
    """A limit on the size of files stands for the disk; every file is whole, and a disk with room goes on."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from sqa.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "main()"
    )
    model = "\n".join(f"{name} = {value}" for name, value in plan.model.items())
    (tmp_path / "tiny.toml").write_text(
        f'data = "text.jsonl"\nvariants = ["sqa"]\ncontext = 32\nbatch_size = 4\nbudget = "steps={STEPS}"\n'
        f"timing_rounds = 0\ntrain_fraction = 0.9\nvalidation_fraction = 0.1\ncompile = false\n[model]\n{model}\n"
    )
    command = ["compare", "tiny.toml", "--out", "out"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    # Built before: without room for it another kernel would begin the run.
    native.load(Path(fused.__file__).with_name("fused.cpp"))
    (tmp_path / "cache" / "sqa").mkdir(parents=True)
    (tmp_path / "cache" / "sqa" / "kernels").symlink_to(default_cache_dir() / "kernels")
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("sqa: ")
    assert done.stderr.splitlines()[-1].endswith(": File too large")
    assert "Traceback" not in done.stderr
    if (tmp_path / "out" / "plan.json").exists():
        command = ["compare", "--resume", "out"]
    again = [sys.executable, "-m", "sqa", *command]
    assert subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
