"""Probes: what they measure, when, and that a probed run trains exactly as one that is not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sqa.data.shards import TokenShards, write_shards
from sqa.experiments.compare import compare
from sqa.experiments.plan import Plan
from sqa.progress import Display
from sqa.training.loop import make_accelerator
from sqa.training.probes import Prober, probe_steps

VOCAB = 50


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    documents = [list(np.random.default_rng(length).integers(0, VOCAB, length)) for length in (5, 70, 64, 65, 90)]
    return write_shards(tmp_path_factory.mktemp("probes") / "v", [documents], vocab_size=VOCAB, origin={})


class Copier:
    """Predicts at once what it has seen T / 2 tokens before; elsewhere its loss is the position."""

    training = True

    def eval(self) -> None:
        self.training = False

    def train(self) -> None:
        self.training = True

    def token_losses(
        self, ids: torch.Tensor, labels: torch.Tensor, *, document_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert not self.training
        assert document_ids.eq(0).all()
        rows, length = ids.shape
        losses = torch.arange(length, dtype=torch.float32).repeat(rows, 1)
        half = length // 2
        copied = torch.zeros_like(ids, dtype=torch.bool)
        copied[:, half:] = ids[:, : length - half] == ids[:, half:]
        return losses.masked_fill(copied, 0.0), copied


def test_losses_are_means_over_ranges_and_halves(shards: TokenShards) -> None:
    prober = Prober(shards, context_length=64, vocab_size=VOCAB, batch_size=3)
    model = Copier()
    found = prober.measure(model, make_accelerator("cpu", "float32"), step=7, tokens=9)  # type: ignore[arg-type]
    assert model.training
    assert (found.step, found.tokens, found.positions) == (7, 9, (0, 16, 64))
    documents = np.stack([shards.document(i)[:64] for i in (1, 3, 4)])  # those of more than 64 tokens
    losses = np.arange(64) * np.ones((3, 1))
    losses[:, 32:][documents[:, 32:] == documents[:, :32]] = 0
    assert found.loss_by_position == pytest.approx((7.5, losses[:, 16:].mean()))
    assert found.repeated_loss == 0
    assert found.unrepeated_loss == pytest.approx(np.arange(31).mean())


def test_documents_that_are_too_short_are_named(shards: TokenShards) -> None:
    with pytest.raises(ValueError, match="more than context=128 tokens, the longest has 90"):
        Prober(shards, context_length=128, vocab_size=VOCAB, batch_size=3)


@pytest.mark.parametrize(("steps", "count", "first"), [(1000, 5, 10), (3, 8, 1), (488, 1, 488)])
def test_probes_are_spread_in_log_and_end_with_the_run(steps: int, count: int, first: int) -> None:
    due = sorted(probe_steps(steps, count))
    assert due[-1] == steps
    assert len(due) <= count
    assert due[0] >= first
    assert probe_steps(steps, 0) == frozenset()
    assert probe_steps(1000, 4) == {32, 100, 316, 1000}


def test_a_probed_run_trains_as_one_that_is_not_and_rates_differ_by_variant(tmp_path: Path) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text[i : i + 900]}) + "\n" for i in range(60)))
    plan = Plan(
        name="p",
        data=str(tmp_path / "text.jsonl"),
        train_fraction=0.8,
        validation_fraction=0.2,
        variants=("gqa", "sqa"),
        learning_rates={"sqa": 5e-3},
        model={"vocab_size": 300, "num_layers": 1, "d_ff": 24, "d_model": 16, "num_heads": 4},
        context=32,
        batch_size=2,
        budget="steps=8",
        timing_rounds=0,
    )
    compare(plan, tmp_path / "plain", Display())
    compare(plan.replace(probes=4), tmp_path / "probed", Display())
    compare(plan.replace(learning_rates={}), tmp_path / "one-rate", Display())

    def losses(out: str, name: str) -> list[float]:
        lines = (tmp_path / out / f"{name}-0" / "curve.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    assert losses("plain", "gqa") == losses("probed", "gqa") == losses("one-rate", "gqa")
    assert losses("plain", "sqa") == losses("probed", "sqa") != losses("one-rate", "sqa")
    probes = [json.loads(line) for line in (tmp_path / "probed" / "sqa-0" / "probes.jsonl").read_text().splitlines()]
    assert [probe["step"] for probe in probes] == sorted(probe_steps(8, 4))
    assert all(math.isfinite(loss) for probe in probes for loss in probe["loss_by_position"])
    assert not (tmp_path / "plain" / "sqa-0" / "probes.jsonl").exists()


@pytest.mark.parametrize("rate", [0, -1.0, "high", float("inf"), True])
def test_a_rate_that_is_none_is_refused(rate: object) -> None:
    with pytest.raises(ValueError, match=r"plan: learning_rates\.gqa must be (above 0|a finite number)"):
        Plan(name="p", variants=("gqa",), learning_rates={"gqa": rate})
