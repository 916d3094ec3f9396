"""The directory of a comparison that was killed, moved or changed: it goes on, or says in one sentence why not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sqa import Transformer
from sqa.data.batches import Batches
from sqa.errors import InputError
from sqa.experiments.compare import compare
from sqa.experiments.directory import Directory
from sqa.experiments.plan import Plan
from sqa.experiments.run import prepare_data
from sqa.progress import Display


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Four steps of one variant on a text that lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    text = Path(__file__).read_text(encoding="utf-8")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text[i:]}) + "\n" for i in range(60)))
    return Plan(
        name="p",
        data="text.jsonl",
        train_fraction=0.8,
        validation_fraction=0.2,
        variants=("sqa",),
        seeds=(0, 1),
        model={"vocab_size": 300, "num_layers": 1, "d_ff": 24, "d_model": 16, "num_heads": 4},
        context=32,
        batch_size=2,
        budget="steps=4",
        timing_rounds=0,
    )


def test_a_comparison_killed_while_its_plan_is_written_starts_again(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    killed = subprocess.run(
        [
            sys.executable, "-c", "import os, sys; from pathlib import Path; from sqa.files import replacing\n"
            "with replacing(Path(sys.argv[1])) as temporary: temporary.write_text('{\"plan\": '); os._exit(9)",
            str(out / "plan.json"),
        ]
    )  # fmt: skip
    assert killed.returncode == 9
    assert len(list(out.glob(".plan.json.*"))) == 1
    (out / ".lock-sqa-0").write_text("12345")
    with pytest.raises(InputError, match="stopped before it had begun, start it without --resume"):
        Directory(out).resumed({})
    assert len(compare(plan, out).results) == 2
    assert not list(out.glob(".plan*"))


def test_a_seed_gives_the_first_weights_and_the_order_of_the_text(plan: Plan, tmp_path: Path) -> None:
    """One of them alone would make the curves of two seeds differ."""
    compare(plan, tmp_path / "out")
    data = prepare_data(plan, plan.data)
    for seed in plan.seeds:
        torch.manual_seed(seed)
        model = Transformer(plan.model_config("sqa"))
        batches = Batches(data.train, layout=plan.layout, batch_size=plan.batch_size, context_length=plan.context,
                          pad_id=data.tokenizer.pad_id, seed=seed)  # fmt: skip
        batch = batches.batch(0)
        loss = model(batch.input_ids, batch.labels, document_ids=batch.document_ids).loss
        first = Directory(tmp_path / "out").curve(("sqa", seed))[0]
        assert first.loss == pytest.approx(loss.item(), rel=1e-6)


def test_only_a_comparison_that_exists_can_be_resumed(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no comparison"):
        compare(plan, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_a_finished_run_leaves_no_checkpoint_and_its_model(plan: Plan, tmp_path: Path) -> None:
    compare(plan.replace(checkpoint_seconds=0.0), tmp_path / "out")
    kept = {path.name for path in (tmp_path / "out" / "sqa-0").iterdir()}
    assert kept == {"config.json", "curve.jsonl", "model.safetensors", "tokenizer.json"}


def test_a_resumed_comparison_says_which_path_of_its_text_leads_nowhere(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compare(plan, out, only=[("sqa", 0)])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"data: 'text\.jsonl', .* is not there from here \(.*elsewhere.*\); name it"):
        compare(Directory(out).resumed({}), out, resume=True)
    found = compare(Directory(out).resumed({}), out, resume=True, data_source=str(tmp_path / "text.jsonl"))
    assert not found.missing


def test_steps_that_were_changed_are_noticed(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(plan.replace(budget="epochs=0.5"), out, only=[("sqa", 0)])
    record = json.loads((out / "plan.json").read_text())
    record["steps"]["sqa"] += 1
    (out / "plan.json").write_text(json.dumps(record))
    (out / "results.jsonl").unlink()  # a finished run would be noticed first, for its own steps
    with pytest.raises(InputError, match=r"steps\.sqa must be \d+, which budget epochs=0\.5 gives"):
        compare(Directory(out).resumed({}), out, resume=True)


def test_a_damaged_curve_is_named_with_what_to_do(plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(plan, out)
    curve = out / "sqa-0" / "curve.jsonl"
    assert [report.step for report in Directory(out).curve(("sqa", 0))] == [1, 2, 3, 4]
    lines = curve.read_text().splitlines(keepends=True)
    curve.write_text("".join([lines[0], lines[1][:9], *lines[2:]]))
    with pytest.raises(InputError, match=r"line 2 of .*sqa-0/curve\.jsonl is damaged; delete the file"):
        Directory(out).curve(("sqa", 0))
    curve.unlink()
    assert Directory(out).curve(("sqa", 0)) == []


class Quiet(Display):
    def start(self, label: str, steps: int) -> None:
        raise AssertionError(f"{label} has begun")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "tokens=20"}, "budget tokens=20 is less than one step of sqa"),
        ({"probes": 2, "context": 20_000}, "plan: probes need a validation document of more than context=20000 tokens"),
    ],
)
def test_a_plan_that_cannot_be_run_is_found_before_its_timing_phase(
    plan: Plan, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare(plan.replace(timing_rounds=1, **changes), tmp_path / "out", Quiet())
    assert not (tmp_path / "out").exists()


def test_a_split_without_a_token_to_predict_is_found_before_training(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    shutil.copy(tmp_path / "text.jsonl", folder / "train.jsonl")
    (folder / "validation.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="validation"):
        compare(plan, tmp_path / "out", data_source=str(folder))
    assert not (tmp_path / "out").exists()
