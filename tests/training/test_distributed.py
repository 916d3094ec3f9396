"""Two real processes train as one does; stopped, killed and resumed with another number they go on from the same step.

The yardstick for rounding is one process that takes a step's rows in two parts: the same sums in another order.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_worker import SignalAt
from safetensors import safe_open
from typer.testing import CliRunner

from sqa import Transformer
from sqa.cli import app
from sqa.data.batches import Batch
from sqa.experiments.compare import compare
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Plan
from sqa.interop import load_model
from sqa.progress import Interrupted
from sqa.training.loop import _share_of

STEPS, CONTEXT = 12, 38
STOPPED_ALONE, STOPPED_TOGETHER, KILLED = 3, 7, 6
WORKER = Path(__file__).with_name("distributed_worker.py")
ROOT = Path(__file__).resolve().parents[2]


def launch(module: str, options: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes, on a free port."""
    command = [sys.executable, "-m", module, *options.split(), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            out, errors = launcher.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends its processes; killed, it would leave them behind
            raise
    return subprocess.CompletedProcess(command, launcher.returncode, out, errors)


def alone(plan: Plan, out: Path) -> Path:
    """The comparison in this process."""
    compare(plan, out, SignalAt(0, 0))
    return out


def losses(out: Path) -> torch.Tensor:
    lines = (out / "sqa-0" / "curve.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(line)["loss"] for line in lines], dtype=torch.float64)


def validation(out: Path) -> dict[str, Any]:
    (line,) = (out / "results.jsonl").read_text().splitlines()
    return json.loads(line)["val"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of documents of 5 to 60 words: rows of a padded batch weigh differently."""
    folder = tmp_path_factory.mktemp("distributed")
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, len(words), 10):
            file.write(json.dumps({"text": " ".join(words[start : start + 5 + start * 7 % 56])}) + "\n")
    return folder


@pytest.fixture(scope="module")
def plans(folder: Path) -> dict[str, Plan]:
    common: dict[str, Any] = {
        "data": str(folder / "text.jsonl"),
        "variants": ("sqa",),
        "model": {"vocab_size": 320, "num_layers": 2, "d_ff": 48, "d_model": 32, "num_heads": 4},
        "context": CONTEXT,
        "batch_size": 4,
        "budget": f"steps={STEPS}",
        "learning_rate": 5e-3,
        "clip_norm": 1.0,
        "evaluation_tokens": 10_000,
        "train_fraction": 0.8,
        "validation_fraction": 0.2,
        "timing_rounds": 0,
        "checkpoint_seconds": 0.0,
        "device": "cpu",
        "threads": 1,
    }
    tied = {**common["model"], "tie_embeddings": True}
    return {
        "ddp": Plan(name="ddp", **common | {"layout": "padded", "padding_in_loss": False}),
        "full": Plan(name="full", **common | {"model": tied, "sharding": "full", "activation_checkpointing": True}),
    }


@pytest.fixture(scope="module")
def noise(folder: Path, plans: dict[str, Plan]) -> dict[str, float]:
    """What another order of summing changes in the losses of one process, of each plan."""
    return {
        name: float(
            (
                losses(alone(plan, folder / f"{name}-one"))
                - losses(alone(plan.replace(micro_batch_size=2), folder / f"{name}-parts"))
            )
            .abs()
            .max()
        )
        for name, plan in plans.items()
    }


@pytest.fixture(scope="module")
def launched(folder: Path, plans: dict[str, Plan]) -> subprocess.CompletedProcess[str]:
    """Two processes that finish two runs, go on with one that a single process began, and end when one is killed."""
    assert stop_alone(plans["full"], folder / "grown") == STOPPED_ALONE
    term, kill = ({"number": n, "step": s} for n, s in ((signal.SIGTERM, STOPPED_TOGETHER), (signal.SIGKILL, KILLED)))
    jobs = [
        {"out": str(folder / "ddp"), "plan": plans["ddp"].to_dict()},
        {"out": str(folder / "full"), "plan": plans["full"].to_dict()},
        {"out": str(folder / "grown"), "resume": True, "signal": term},
        {"out": str(folder / "killed"), "plan": plans["ddp"].to_dict(), "signal": kill},
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return launch("torch.distributed.run", "--standalone --nproc-per-node 2", WORKER, folder / "jobs.json")


def stop_alone(plan: Plan, out: Path) -> int:
    with pytest.raises(Interrupted) as stopped:
        compare(plan, out, SignalAt(signal.SIGTERM, STOPPED_ALONE))
    found = re.search(r"after step (\d+)", str(stopped.value))
    assert found
    return int(found[1])


def test_two_processes_give_bitwise_the_losses_of_two_micro_batches(
    folder: Path, noise: dict[str, float], launched: object
) -> None:
    """Halving and doubling are exact, and of two parts there is one sum."""
    assert torch.equal(losses(folder / "ddp"), losses(folder / "ddp-parts"))
    assert losses(folder / "ddp")[-1] < losses(folder / "ddp")[0] - 0.3  # constant losses would agree too
    model, reference = (Transformer.load(folder / out / "sqa-0").state_dict() for out in ("ddp", "ddp-parts"))
    assert all(torch.equal(model[name], tensor) for name, tensor in reference.items())


@pytest.mark.parametrize("name", ["ddp", "full"])
def test_two_processes_agree_with_one(folder: Path, noise: dict[str, float], launched: object, name: str) -> None:
    assert 0 < noise[name] < 1e-4
    off = (losses(folder / name) - losses(folder / f"{name}-one")).abs().max()
    assert off <= 4 * noise[name]
    if name == "full":  # the last batch has one row, and one process none
        tokens = json.loads((folder / name / "plan.json").read_text())["data"]["validation_tokens"]
        assert -(-(tokens - 1) // CONTEXT) % 4 == 1
    one, two = validation(folder / f"{name}-one"), validation(folder / name)
    assert two["tokens"] == one["tokens"]  # none twice, none dropped
    assert two["loss"] == pytest.approx(one["loss"], abs=4 * noise[name])
    assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=4 * noise[name])
    assert two["loss_all_positions"] == pytest.approx(one["loss_all_positions"], abs=4 * noise[name])


def test_a_sharded_model_is_half_on_each_process(folder: Path, launched: object) -> None:
    held = [json.loads((folder / "full" / f"shards-{rank}.json").read_text()) for rank in (0, 1)]
    assert "model.embed_tokens.weight" in held[0]
    assert "lm_head.weight" not in held[0]  # tied: sharded once
    for own in held:
        for name, (is_dtensor, local, whole) in own.items():
            assert is_dtensor, name
            assert 2 * local == whole, name


def test_a_sharded_step_shares_gradients_once_however_many_parts_it_has(folder: Path, launched: object) -> None:
    for rank in (0, 1):
        whole, parts = json.loads((folder / "full" / f"reductions-{rank}.json").read_text())
        assert whole == parts > 0


def test_a_signal_to_one_process_stops_both_at_one_step(folder: Path, launched: object) -> None:
    stopped = {(folder / "grown" / f"interrupted-{rank}").read_text() for rank in (0, 1)}
    assert stopped == {f"stopped after step {STOPPED_TOGETHER} of {STEPS}"}
    checkpoint = folder / "grown" / "sqa-0" / "checkpoints" / f"step-{STOPPED_TOGETHER}"
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) == 2
    assert files[0].stat().st_size == pytest.approx(files[1].stat().st_size, rel=0.1)
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert file.get_slice("model.embed_tokens.weight.exp_avg").get_shape() == [160, 32]


def test_one_process_to_two_and_back_to_one(
    folder: Path, noise: dict[str, float], launched: object, tmp_path: Path
) -> None:
    run = folder / "grown" / "sqa-0"
    done = CliRunner().invoke(app, ["export", str(run), str(tmp_path / "half")])  # the shards as one model
    assert done.exit_code == 0, done.output
    assert f"unfinished: the model after step {STOPPED_TOGETHER}" in done.output
    exported = load_model(tmp_path / "half")
    compare(Directory(folder / "grown").resumed({}), folder / "grown", SignalAt(0, 0), resume=True)
    off = (losses(folder / "grown") - losses(folder / "full-one")).abs().max()
    assert off <= 4 * noise["full"]
    assert validation(folder / "grown")["loss"] == pytest.approx(
        validation(folder / "full-one")["loss"], abs=4 * noise["full"]
    )
    finished = Transformer.load(run)
    distance = max(
        float((a - b).detach().abs().max()) for a, b in zip(exported.parameters(), finished.parameters(), strict=True)
    )
    assert 0 < distance < STEPS * 5e-3  # AdamW moves a weight by about the learning rate a step


def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint(
    folder: Path, noise: dict[str, float], launched: subprocess.CompletedProcess[str]
) -> None:
    assert launched.returncode != 0
    assert "Signal 9 (SIGKILL)" in launched.stderr  # torchrun names the process
    assert "Traceback" in launched.stderr
    assert not (folder / "killed" / "results.jsonl").exists()
    steps = [int(path.name[5:]) for path in (folder / "killed" / "sqa-0" / "checkpoints").glob("step-*")]
    assert KILLED - 3 <= max(steps) < KILLED  # the one before may still have been on its way to the disk
    compare(Directory(folder / "killed").resumed({}), folder / "killed", SignalAt(0, 0), resume=True)
    curve, parts, one = (losses(folder / out) for out in ("killed", "ddp-parts", "ddp-one"))
    assert torch.equal(curve[: max(steps)], parts[: max(steps)])
    assert (curve - one).abs().max() <= 4 * noise["ddp"]


def test_accelerate_launches_the_command_and_one_process_speaks(folder: Path, plans: dict[str, Plan]) -> None:
    """--multi_gpu starts the processes, --device cpu keeps them on the CPU."""
    model = "\n".join(f"{name} = {value}" for name, value in plans["ddp"].model.items())
    text = f'variants = ["sqa"]\ndata = "{folder / "text.jsonl"}"\ncontext = 32\nbatch_size = 4\n[model]\n{model}\n'
    (folder / "plan.toml").write_text(text)
    done = launch(
        "accelerate.commands.launch",
        "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no "
        "-m sqa train --device cpu --max-steps 4",
        folder / "plan.toml",
        "--out",
        folder / "cli",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sqa: 4 steps") == 1
    assert done.stdout.count("sqa seed 0: val loss") == done.stdout.count("Report: ") == 1
    assert json.loads((folder / "cli" / "plan.json").read_text())["processes"] == 2
    assert len(losses(folder / "cli")) == 4
    assert validation(folder / "cli")["loss"] > 0


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_every_row_is_evaluated_by_one_process(processes: int) -> None:
    rows = torch.arange(4)[:, None].expand(4, 3).contiguous()
    batch = Batch(input_ids=rows, labels=rows + 10, labels_all_positions=rows + 20, document_ids=None)
    shares = [
        _share_of(batch, SimpleNamespace(process_index=index, num_processes=processes))  # type: ignore[arg-type]
        for index in range(processes)
    ]
    assert all(len(share.input_ids) for share in shares)  # a sharded model runs on all processes or on none
    for name, shift in (("labels", 10), ("labels_all_positions", 20)):
        labels = torch.cat([getattr(share, name) for share in shares])
        ids = torch.cat([share.input_ids for share in shares])
        real = labels[:, 0] != -100
        assert sorted(labels[real, 0].tolist()) == [shift, shift + 1, shift + 2, shift + 3]
        assert torch.equal(labels[real], ids[real] + shift)
