"""Healing: its losses against plain ones, layers on their own, exact resumption."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sqa import ModelConfig, Transformer
from sqa.conversion import surgery
from sqa.conversion.healing import Distillation, Layerwise, heal
from sqa.conversion.language_model import LanguageModel
from sqa.conversion.settings import Settings
from sqa.data.batches import Batch
from sqa.losses import IGNORE
from sqa.progress import Interrupted, NonFiniteLoss, StepReport, StopFlag
from sqa.training.checkpoint import Progress
from sqa.training.loop import Hooks, Task

Make = Callable[..., ModelConfig]
Build = Callable[[ModelConfig], Transformer]


@pytest.fixture
def pair(config_of: Make, model_of: Build) -> tuple[LanguageModel, LanguageModel]:
    """The original, and the same with half its query heads dropped."""
    original = LanguageModel(model_of(config_of()))
    after, _ = surgery.plan_heads(original.views[0].config, 2, None)
    student = original.with_heads([after] * 2)
    for view, cut in zip(original.views, student.views, strict=True):
        cut.write(surgery.cut(view, after.num_kv_heads, [0, 2]))
    return original, student


def healed(
    student: LanguageModel,
    task: Task[Batch],
    batches: list[Batch],
    folder: Path,
    *,
    attention_only: bool = False,
    on_step: Callable[[StepReport], None] = lambda report: None,
    stop: StopFlag | None = None,
) -> Progress:
    trained = [
        parameter
        for name, parameter in student.model.named_parameters()
        if ("_proj" in name and "self_attn" in name) or not attention_only
    ]
    settings = Settings(query_heads=2, batch_size=2, length=24, learning_rate=1e-3)
    return heal(task, batches, settings, trained, folder, Hooks(on_step, stop or StopFlag()))


def mean(task: Task[Batch], batch: Batch) -> torch.Tensor:
    """The loss of a batch, a token."""
    return task.loss_sum(torch.nn.Identity(), batch) / task.count(batch)


def test_distillation_is_the_divergence_of_the_logits(
    pair: tuple[LanguageModel, LanguageModel], batches: list[Batch]
) -> None:
    original, student = pair
    (batch, *_), parameters = batches, list(student.model.parameters())
    got = mean(Distillation(student, original), batch)
    logits = [
        subject.model(batch.input_ids, document_ids=batch.document_ids).logits.flatten(0, 1).log_softmax(-1)
        for subject in pair
    ]
    expected = F.kl_div(logits[1], logits[0].detach(), log_target=True, reduction="batchmean")
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(mean(Distillation(student, original), batch), expected)
        assert float(mean(Distillation(original, original), batch)) == pytest.approx(0.0, abs=1e-6)


def test_quality_is_that_of_whole_logits(pair: tuple[LanguageModel, LanguageModel], batches: list[Batch]) -> None:
    """Loss over the tokens that have a target, divergence and agreement over all of them."""
    original, student = pair
    batches = [replace(batch, labels=batch.labels.masked_fill(batch.document_ids == 1, IGNORE)) for batch in batches]
    found = student.measure(batches, original, original.outputs(batches))
    theirs, own = (
        torch.cat([subject.model(batch.input_ids, document_ids=batch.document_ids).logits for batch in batches])
        .detach()
        .flatten(0, 1)
        for subject in pair
    )
    loss = F.cross_entropy(own, torch.cat([batch.labels for batch in batches]).flatten())
    kl = F.kl_div(own.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert found.kl == pytest.approx(float(kl), rel=1e-4)
    assert found.agreement == pytest.approx(float((own.argmax(-1) == theirs.argmax(-1)).float().mean()))


def test_text_is_packed_document_by_document(saved, config_of: Make, model_of: Build, small_tokenizer) -> None:
    run = saved(model_of(config_of()))
    texts = ["def attend(q, k, v):", "return", "softmax(q @ k.T) @ v", "42 times, größer als ß"]
    subject = LanguageModel.load(run)
    found = subject.batches(subject.text_side(run), iter(texts), rows=3, length=10, batch_size=2)
    assert [len(batch) for batch in found] == [2, 1]
    documents = [[*small_tokenizer.encode(text).ids, small_tokenizer.token_to_id("<|endoftext|>")] for text in texts]
    ids = torch.tensor([i for document in documents for i in document])
    number = torch.tensor([n for n, document in enumerate(documents) for _ in document])
    assert torch.equal(torch.cat([batch.input_ids for batch in found]).flatten(), ids[:30])
    same = number[1:31] == number[:30]
    assert 0 < same.sum() < 30
    labels = torch.cat([batch.labels for batch in found]).flatten()
    assert torch.equal(labels, torch.where(same, ids[1:31], IGNORE))
    rows, apart = number[:30].view(3, 10), torch.cat([batch.document_ids for batch in found])
    assert torch.equal(apart[:, :, None] == apart[:, None], rows[:, :, None] == rows[:, None])


def test_a_layers_loss_is_its_share_of_energy(pair: tuple[LanguageModel, LanguageModel], batches: list[Batch]) -> None:
    original, student = pair
    batch, shares = batches[0], []
    seen: dict[int, torch.Tensor] = {}
    blocks = original.model.model.layers
    hooks = [block.input_layernorm.register_forward_hook(lambda m, i, out, at=at: seen.update({at: out}))
             for at, block in enumerate(blocks)]  # fmt: skip
    with torch.no_grad():
        original.model(batch.input_ids, document_ids=batch.document_ids)
        for hook in hooks:
            hook.remove()
        for at, x in seen.items():
            target, own = (
                each.model.model.layers[at].self_attn(x, document_ids=batch.document_ids)
                for each in (original, student)
            )
            shares.append((own - target).square().sum() / target.square().sum())
        torch.testing.assert_close(mean(Layerwise(student, original), batch), torch.stack(shares).mean())


def test_layers_heal_on_their_own(pair: tuple[LanguageModel, LanguageModel], batches: list[Batch]) -> None:
    """A layer's gradient does not change with the weights of another, and nothing but attention has one."""
    original, student = pair

    def gradients() -> dict[str, torch.Tensor]:
        student.model.zero_grad()
        mean(Layerwise(student, original), batches[0]).backward()
        return {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}

    before = gradients()
    assert before
    assert all(".self_attn." in name for name in before)
    with torch.no_grad():
        student.model.model.layers[0].self_attn.q_proj.weight.mul_(0.5)
    after = gradients()
    for name, gradient in before.items():
        changed = not torch.equal(gradient, after[name])
        assert changed == (".0." in name)


@pytest.mark.parametrize("task", [Layerwise, Distillation])
def test_healing_brings_the_model_closer(
    task: Callable, pair: tuple[LanguageModel, LanguageModel], batches: list[Batch], tmp_path: Path
) -> None:
    original, student = pair
    before = student.measure(batches, original, original.outputs(batches))
    frozen = student.model.model.embed_tokens.weight.clone()
    progress = healed(student, task(student, original), batches * 10, tmp_path, attention_only=True)
    assert (progress.step, progress.tokens) == (60, 60 * 48)
    after = student.measure(batches, original, original.outputs(batches))
    assert after.kl < 0.8 * before.kl
    assert torch.equal(student.model.model.embed_tokens.weight, frozen)


def test_a_stopped_phase_ends_as_one_never_stopped(
    pair: tuple[LanguageModel, LanguageModel], batches: list[Batch], tmp_path: Path
) -> None:
    original, student = pair
    start = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    healed(student, Distillation(student, original), batches, tmp_path / "whole")
    expected = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    seen: list[int] = []
    stop = StopFlag()

    def stop_at_four(report: StepReport) -> None:
        seen.append(report.step)
        if report.step == 4:
            stop(signal.SIGTERM, None)

    student.model.load_state_dict(start)
    with pytest.raises(Interrupted, match="step 4 of 6"):
        healed(
            student,
            Distillation(student, original),
            batches,
            tmp_path / "cut",
            on_step=stop_at_four,
            stop=stop,
        )
    student.model.load_state_dict(start)
    for _ in range(2):  # the second time there is nothing left to do
        healed(
            student, Distillation(student, original), batches, tmp_path / "cut", on_step=lambda r: seen.append(r.step)
        )
        assert seen == [1, 2, 3, 4, 5, 6]
        assert all(torch.equal(expected[name], tensor) for name, tensor in student.model.state_dict().items())


def test_a_loss_that_is_not_finite_ends_the_phase(
    pair: tuple[LanguageModel, LanguageModel], batches: list[Batch], tmp_path: Path
) -> None:
    original, student = pair
    with torch.no_grad():
        student.model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteLoss, match=r"loss was .* at step 1"):
        healed(student, Distillation(student, original), batches, tmp_path)
