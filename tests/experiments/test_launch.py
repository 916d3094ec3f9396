"""Runs of one comparison in several processes: by hand, and on a Ray cluster of two processors, one worker killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sqa.cli.display import PlainDisplay
from sqa.experiments import launch
from sqa.experiments.compare import compare
from sqa.experiments.plan import Plan
from sqa.files import locked

ROOT = Path(__file__).resolve().parents[2]
CELLS = ("gqa-0", "sqa-0", "gqa-1", "sqa-1")
STEPS = 300
PLAN = f"""
data = "text.jsonl"
variants = ["gqa", "sqa"]
seeds = [0, 1]
context = 32
batch_size = 4
budget = "steps={STEPS}"
timing_rounds = 1
checkpoint_seconds = 0.2
evaluation_tokens = 500
train_fraction = 0.9
validation_fraction = 0.1
threads = 1
[model]
vocab_size = 320
num_layers = 2
d_ff = 48
d_model = 32
num_heads = 4
"""
ON_TWO_CPUS = """
import ray, sys
from sqa.cli import main
ray.init(num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus, a plan of four runs, and `whole`, where they ran one after another here."""
    folder = tmp_path_factory.mktemp("launch")
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, len(words), 20):
            file.write(json.dumps({"text": " ".join(words[start : start + 40])}) + "\n")
    (folder / "tiny.toml").write_text(PLAN, encoding="utf-8")
    here(folder, "whole")
    return folder


def here(folder: Path, out: str, *only: str, resume: bool = False) -> str:
    """Run in this process, and return what was shown."""
    plan, shown = Plan.read(str(folder / "tiny.toml")), Console(file=StringIO(), record=True)
    compare(
        plan, folder / out, PlainDisplay(shown), resume=resume, data_source=str(folder / "text.jsonl"),
        only=plan.find_cells(only) if only else None,
    )  # fmt: skip
    return shown.export_text()


def begin(folder: Path, *arguments: str, script: tuple[str, ...] = ("-m", "sqa")) -> subprocess.Popen[str]:
    command = [sys.executable, *script, "compare", *arguments]
    environment = {**os.environ, "COLUMNS": "200", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """What it printed on both streams, when it has ended."""
    texts = process.communicate(timeout=120)
    assert process.returncode == code, texts
    return texts


def wait_for(condition: Callable[[], object], *processes: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def outcome(out: Path) -> dict[tuple[str, int], tuple[object, list[float]]]:
    """Validation figures and the loss of every step of every run; each run is there once."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert sorted(f"{row['variant']}-{row['seed']}" for row in rows) == sorted(CELLS)
    found = {}
    for row in rows:
        curve = (out / f"{row['variant']}-{row['seed']}" / "curve.jsonl").read_text().splitlines()
        found[row["variant"], row["seed"]] = row["val"], [json.loads(line)["loss"] for line in curve]
        assert len(curve) == STEPS
    return found


def test_processes_share_a_comparison_run_by_run(folder: Path) -> None:
    """As a scheduler would: the same command for each run, all at once, in a directory that is not there yet."""
    out = folder / "shared"
    processes = [begin(folder, "tiny.toml", "--out", "shared", "--only", only) for only in ("gqa:0", "SQA:0")]
    texts = [end(process)[0] for process in processes]
    assert sum("timing all variants in turns: " in text for text in texts) == 1
    assert any("Missing: gqa:1, sqa:1" in text for text in texts)
    with pytest.raises(ValueError, match="unfinished; go on with --resume"):
        here(folder, "shared")
    with locked(out / ".lock-gqa-1"):
        for only in ((), ("sqa:1", "gqa:1")):
            with pytest.raises(ValueError, match=f"shared/gqa-1 is being written by process {os.getpid()}$"):
                here(folder, "shared", *only)
        assert "sqa seed 1: step" in here(folder, "shared", "sqa:1", "gqa:0")
    text = here(folder, "shared", resume=True)
    assert [cell for cell in ("gqa seed 0", "sqa seed 0", "gqa seed 1", "sqa seed 1") if cell in text] == ["gqa seed 1"]
    assert "run 3 of 4: gqa seed 1" in text  # its place in the plan, whoever ran the others
    assert outcome(out) == outcome(folder / "whole")
    assert not list(out.glob(".lock*"))
    with pytest.raises(ValueError, match=r"only: 'sqa:2' is not a run of the plan.*seeds 0, 1"):
        here(folder, "shared", "sqa:2")


def test_ray_gives_the_sequential_losses_though_a_worker_is_killed(folder: Path) -> None:
    pytest.importorskip("ray")
    out, script = folder / "spread", ("-c", ON_TWO_CPUS)
    process = begin(folder, "tiny.toml", "--out", "spread", "--launcher", "ray", script=script)
    wait_for(lambda: list(out.glob("sqa-0/checkpoints/step-*")), process)
    process.send_signal(signal.SIGTERM)
    errors = end(process, 130)[1]
    assert "sqa: stopped with" in errors
    assert "go on with: sqa compare --resume spread --launcher ray" in errors
    process = begin(folder, "--resume", "spread", "--launcher", "ray", script=script)
    run = out / "sqa-1"
    wait_for(lambda: list(run.glob("checkpoints/step-*")), process)
    first_step = (run / "curve.jsonl").read_text().splitlines()[0]
    worker = (run / ".lock").read_text()
    os.kill(int(worker), signal.SIGKILL)
    wait_for(lambda: (run / ".lock").read_text() not in ("", worker), process)
    text = end(process)[0]
    assert "sqa seed 1: step 300/300" in text
    assert outcome(out) == outcome(folder / "whole")
    # its seconds never come out the same twice: the second worker went on from the first one's checkpoint
    assert (run / "curve.jsonl").read_text().splitlines()[0] == first_step


def test_what_ray_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    plan = Plan(name="x", budget="time=1m", threads=2)

    def refusal(plan: Plan, device: str, num_runs: int, **resources: float) -> str:
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])
        monkeypatch.setattr(launch.torch, "get_num_threads", lambda: plan.threads)
        try:
            with launch.cluster(plan, device, num_runs):
                return ""
        except ValueError as error:
            return str(error)

    assert "with budget time=1m each run needs a machine alone, but 4 would share one" in refusal(plan, "cpu", 9, CPU=8)
    assert "but 3 would share one" in refusal(plan, "cpu", 3, CPU=8)
    assert not refusal(plan, "cpu", 1, CPU=8)
    assert not refusal(plan, "cpu", 9, CPU=3)
    assert not refusal(plan, "cuda", 9, CPU=8, GPU=8)
    assert not refusal(plan.replace(budget="steps=9"), "cpu", 9, CPU=8)
    assert "a run needs 2 CPU, which no machine" in refusal(plan, "cpu", 9, CPU=1)
    assert "a run needs 1 CPU and 1 GPU, which no machine" in refusal(plan, "cuda", 9, CPU=8)
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ImportError, match=r"pip install .* '\.\[ray\]'"),
        launch.cluster(plan, "cpu", 1),
    ):
        pass
