"""The training loop: the weighting of tokens, the schedule, exact resumption, evaluation as sums."""

import itertools
import math
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sqa import ModelConfig, Transformer
from sqa.data.batches import Batch, Batches, evaluation_batches
from sqa.data.shards import TokenShards, write_shards
from sqa.progress import Interrupted, NonFiniteLoss, StepReport, StopFlag, stop_flag
from sqa.training.checkpoint import Checkpoints, Progress
from sqa.training.loop import (
    Hooks,
    Learner,
    NextToken,
    Recipe,
    evaluate,
    learning_rate,
    make_accelerator,
    make_optimizer,
    save_model,
    set_up,
    train,
    train_step,
)
from sqa.variants import model_config

VOCAB = 61
CONFIG = model_config("sqa", vocab_size=VOCAB, num_layers=2, d_ff=48, max_seq_len=32, d_model=32, num_heads=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """Documents of 3 to 60 tokens in which each token says much about the next."""
    generator = np.random.default_rng(0)
    documents = [
        [*((int(start) + 3 * np.arange(length)) % (VOCAB - 2) + 2).tolist(), 0]
        for start, length in zip(generator.integers(0, VOCAB, 200), generator.integers(3, 60, 200), strict=True)
    ]
    folder = tmp_path_factory.mktemp("shards") / "train"
    return write_shards(folder, [documents], vocab_size=VOCAB, origin={"made": "here"})


def packed(shards: TokenShards) -> Batches:
    return Batches(shards, layout="packed", batch_size=4, context_length=16, pad_id=1, seed=0)


def padded(shards: TokenShards) -> Batches:
    return Batches(shards, layout="padded", batch_size=6, context_length=16, pad_id=1, seed=0)


def recipe(steps: int = 12, **changes: object) -> Recipe:
    values: dict[str, object] = {
        "steps": steps,
        "micro_batch_size": 0,
        "learning_rate": 1e-2,
        "warmup_fraction": 0.25,
        "weight_decay": 0.01,
        "clip_norm": 1.0,
        "checkpoint_seconds": 1e9,
    }
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def learner(settings: Recipe, config: ModelConfig = CONFIG, *, seed: int = 3) -> Learner[Transformer]:
    torch.manual_seed(seed)
    return set_up(Transformer(config), settings, make_accelerator("cpu", "float32"))


def run(
    shards: TokenShards, folder: Path, settings: Recipe | None = None, *, seed: int = 3, **hooks: object
) -> tuple[Transformer, Progress]:
    settings = settings or recipe()
    student = learner(settings, seed=seed)
    progress = train(student, NextToken(), packed(shards).batch, settings, folder, Hooks(**hooks))  # type: ignore[arg-type]
    return student.model, progress


def stopping(step: int) -> dict[str, object]:
    """Hooks that get a signal after a step."""
    stop = StopFlag()

    def on_step(report: StepReport) -> None:
        if report.step == step:
            stop(signal.SIGTERM, None)

    return {"on_step": on_step, "stop": stop}


def test_the_loss_falls_and_a_run_leaves_a_model_and_a_curve(shards: TokenShards, tmp_path: Path) -> None:
    model, progress = run(shards, tmp_path, recipe(steps=60))
    losses = [eval_line["loss"] for eval_line in read_curve(tmp_path)]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.2)  # an untrained model knows nothing
    assert losses[-1] < losses[0] - 1.5
    assert progress.tokens == sum(int((packed(shards).batch(t).labels != -100).sum()) for t in range(60))
    save_model(model, tmp_path, make_accelerator("cpu", "float32"))
    loaded = Transformer.load(tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)


def read_curve(folder: Path) -> list[dict[str, float]]:
    import json

    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def losses_in(folder: Path) -> list[float]:
    return [line["loss"] for line in read_curve(folder)]


def test_one_seed_gives_bitwise_one_result_and_another_seed_another(shards: TokenShards, tmp_path: Path) -> None:
    curves = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(shards, tmp_path / name, seed=seed)
        curves.append([line["loss"] for line in read_curve(tmp_path / name)])
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_a_stopped_run_goes_on_bitwise_as_if_never_stopped(
    shards: TokenShards, tmp_path: Path, stop_after: int
) -> None:
    whole, _ = run(shards, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"step {stop_after} of 12"):
        run(shards, tmp_path / "parts", **stopping(stop_after))
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    resumed, progress = run(shards, tmp_path / "parts")
    seconds = [line["seconds"] for line in read_curve(tmp_path / "parts")]
    assert all(a < b for a, b in itertools.pairwise([0.0, *seconds]))  # of training, over both starts
    curves = [[(line["loss"], line["tokens"]) for line in read_curve(tmp_path / name)] for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert (progress.step, progress.tokens) == (12, curves[0][-1][1])
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


class Distillation:
    """KL to a teacher, for a model of which one part is frozen and another has no gradient."""

    def __init__(self) -> None:
        torch.manual_seed(9)
        self.teacher = Transformer(CONFIG)

    def count(self, batch: Batch) -> int:
        return batch.input_ids.numel()

    def loss_sum(self, model: torch.nn.Module, part: Batch) -> torch.Tensor:
        own, other = (each(part.input_ids).logits.log_softmax(-1) for each in (model, self.teacher))
        return torch.nn.functional.kl_div(own, other.detach(), log_target=True, reduction="sum")


def distil(shards: TokenShards, folder: Path, micro: int = 0, **hooks: object) -> tuple[list[float], Transformer]:
    settings = recipe(micro_batch_size=micro)
    torch.manual_seed(3)
    model = Transformer(CONFIG)
    model.unused = torch.nn.Linear(2, 2)
    model.lm_head.requires_grad_(False)
    student = set_up(model, settings, make_accelerator("cpu", "float32"))
    train(student, Distillation(), packed(shards).batch, settings, folder, Hooks(**hooks))  # type: ignore[arg-type]
    return [line["loss"] for line in read_curve(folder)], model


def test_another_task_is_trained_by_the_same_loop(shards: TokenShards, tmp_path: Path) -> None:
    """Frozen parameters stay, those without a gradient do not keep the run from going on, and parts weigh alike."""
    losses, model = distil(shards, tmp_path / "whole")
    assert losses[-1] < losses[0] / 2
    torch.manual_seed(3)
    assert torch.equal(model.lm_head.weight, Transformer(CONFIG).lm_head.weight)
    with pytest.raises(Interrupted, match="after step 5 of 12"):
        distil(shards, tmp_path / "parts", **stopping(5))
    assert distil(shards, tmp_path / "parts")[0] == losses
    seen: list[object] = []
    assert distil(shards, tmp_path / "parts", on_step=seen.append)[0] == losses
    assert not seen  # it was over
    in_parts, _ = distil(shards, tmp_path / "micro", micro=1)
    assert in_parts == pytest.approx(losses, rel=1e-4)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    shards: TokenShards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(shards, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(shards, tmp_path / "parts", recipe(checkpoint_seconds=0.0), **stopping(10))
    checkpoints = tmp_path / "parts" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-10", "step-9"]
    victim = checkpoints / "step-10" / "tensors.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    run(shards, tmp_path / "parts")
    assert "step-10 is damaged" in caplog.text
    losses = [[line["loss"] for line in read_curve(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("content", ["null", '"text"', "3.5", "{}", "[" * 100_000, "{", '{"step": 1}', ""])
def test_a_checkpoint_with_a_record_that_is_none_is_passed_over(
    shards: TokenShards, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    run(shards, tmp_path / "whole", recipe(steps=3))
    with pytest.raises(Interrupted):
        run(shards, tmp_path / "parts", recipe(steps=3), **stopping(2))
    (tmp_path / "parts" / "checkpoints" / "step-2" / "progress.json").write_text(content)
    run(shards, tmp_path / "parts", recipe(steps=3))
    assert "step-2 is damaged" in caplog.text
    assert losses_in(tmp_path / "parts") == losses_in(tmp_path / "whole")


def test_a_checkpoint_whose_step_was_changed_is_passed_over(
    shards: TokenShards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        run(shards, tmp_path, **stopping(4))
    record = tmp_path / "checkpoints" / "step-4" / "progress.json"
    record.write_text(record.read_text().replace('"step": 4', '"step": 3'))
    run(shards, tmp_path)
    assert "progress.json does not match its checksum" in caplog.text


def test_checkpoints_that_were_passed_over_do_not_push_out_new_ones(shards: TokenShards, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(shards, tmp_path, recipe(checkpoint_seconds=0.0), **stopping(6))
    for name in ("step-5", "step-6"):
        (tmp_path / "checkpoints" / name / "progress.json").write_text("{")
    with pytest.raises(Interrupted):
        run(shards, tmp_path, recipe(checkpoint_seconds=0.0), **stopping(2))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-1", "step-2"]


@pytest.mark.parametrize("damage", ["torn", "a line gone"])
@pytest.mark.parametrize(("kept", "begun"), [(0, 0), (3, 0), (5, 5)])
def test_a_run_with_a_damaged_curve_goes_back_to_a_checkpoint_that_it_covers(
    shards: TokenShards, tmp_path: Path, kept: int, begun: int, damage: str
) -> None:
    run(shards, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(shards, tmp_path / "parts", recipe(checkpoint_seconds=0.0), **stopping(6))
    curve = tmp_path / "parts" / "curve.jsonl"
    lines = curve.read_text().splitlines(keepends=True)
    curve.write_text("".join(lines[:kept] + ([lines[kept][:20]] if damage == "torn" else lines[kept + 1 :])))
    steps: list[int] = []
    run(shards, tmp_path / "parts", on_step=lambda report: steps.append(report.step))
    assert steps == list(range(begun + 1, 13))
    assert [line["step"] for line in read_curve(tmp_path / "parts")] == list(range(1, 13))
    assert losses_in(tmp_path / "parts") == losses_in(tmp_path / "whole")


def test_a_signal_in_the_middle_of_a_step_ends_it_at_once_and_keeps_the_steps_before(
    shards: TokenShards, tmp_path: Path
) -> None:
    run(shards, tmp_path / "whole")
    settings, student = recipe(), learner(recipe())

    def batch_at(step: int) -> Batch:
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the step went on")
        return packed(shards).batch(step)

    with pytest.raises(Interrupted, match="after step 5 of 12"), stop_flag() as stop:
        train(student, NextToken(), batch_at, settings, tmp_path / "parts", Hooks(stop=stop))
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == ["step-5"]
    run(shards, tmp_path / "parts")
    assert losses_in(tmp_path / "parts") == losses_in(tmp_path / "whole")


def test_a_display_that_ends_the_run_loses_no_step(shards: TokenShards, tmp_path: Path) -> None:
    def closed(report: StepReport) -> None:
        if report.step == 3:
            raise Interrupted("the output was closed")

    with pytest.raises(Interrupted, match="the output was closed"):
        run(shards, tmp_path, on_step=closed)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_checkpoints_are_written_after_distributed_was_initialised_again(tmp_path: Path) -> None:
    (tmp_path / ".writing-7").mkdir()  # a process was killed
    for again in (1, 2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            student = learner(recipe())
            checkpoints = Checkpoints(tmp_path)
            checkpoints.save(student.model, student.optimizer, Progress(step=again, tokens=0, wall_s=0.0))
            checkpoints.close()
        finally:
            dist.destroy_process_group()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_a_full_disk_leaves_the_checkpoint_before(
    shards: TokenShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqa.training.checkpoint as module

    with pytest.raises(Interrupted):
        run(shards, tmp_path, **stopping(1))
    real = module.write_safetensors

    def full(path: Path, tensors: object) -> None:
        real(path, dict(list(tensors.items())[:1]))  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        run(shards, tmp_path, recipe(checkpoint_seconds=0.0))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    model = Transformer(CONFIG)
    progress = Checkpoints(tmp_path / "checkpoints").load(model, make_optimizer(model, recipe()))
    assert progress.step == 1


def test_a_checkpoint_of_another_model_is_refused(shards: TokenShards, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(shards, tmp_path, **stopping(1))
    model = Transformer(CONFIG.replace(num_layers=1))
    with pytest.raises(ValueError, match=r"step-1 is a checkpoint of another model \(num_layers: 2 there, 1 now\)"):
        Checkpoints(tmp_path / "checkpoints").load(model, make_optimizer(model, recipe()))


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_checkpoint(
    shards: TokenShards, tmp_path: Path
) -> None:
    settings = recipe(steps=40, learning_rate=1e30, clip_norm=0.0)
    with pytest.raises(NonFiniteLoss, match=r"loss was nan at step \d+; last good checkpoint: none"):
        run(shards, tmp_path / "a", settings)
    with pytest.raises(NonFiniteLoss, match=r"last good checkpoint: step-\d+$") as error:
        run(shards, tmp_path / "b", replace(settings, checkpoint_seconds=0.0))
    assert str(error.value).endswith(f"step-{len(read_curve(tmp_path / 'b'))}")


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
@pytest.mark.parametrize("padding_in_loss", [False, True])
def test_micro_batches_weigh_every_target_alike(shards: TokenShards, micro: int, padding_in_loss: bool) -> None:
    """Rows of a padded batch hold different numbers of targets: a mean of means would differ."""
    gradients = []
    batch = padded(shards).batch(0)
    labels = batch.labels_all_positions if padding_in_loss else batch.labels
    for size in (0, micro):
        settings = recipe(micro_batch_size=size, clip_norm=0.0)
        student = learner(settings, seed=0)
        model = student.model
        student = replace(student, optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss, targets = train_step(student, NextToken(padding_in_loss), batch, settings, rate=1.0)
        gradients.append({name: before[name] - p.detach() for name, p in model.named_parameters()})
        assert targets == int((labels != -100).sum())
        torch.manual_seed(0)
        assert loss == pytest.approx(Transformer(CONFIG)(batch.input_ids, labels).loss.item(), rel=1e-5)
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], whole)


def keep(kept: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor)
    return tensor


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_activation_checkpointing_changes_memory_alone(shards: TokenShards, compile: bool) -> None:
    """Loss and gradients are the same bit for bit, and less than half is kept for the backward pass."""
    batch = packed(shards).batch(0)
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        model = Transformer(CONFIG)
        model.model.activation_checkpointing = again
        called = set_up(model, recipe(), make_accelerator("cpu", "float32"), compile=compile).called
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, saved), lambda x: x):
            loss = called(batch.input_ids, batch.labels, document_ids=batch.document_ids).loss
        loss.backward()
        results.append(
            (loss.detach(), {name: p.grad for name, p in model.named_parameters()}, sum(map(torch.numel, saved)))
        )
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = results
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert torch.equal(gradients_again[name], gradient), name
    assert kept_again < kept / 2


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(recipe(steps=100), step) for step in range(101)]
    assert rates[0] == pytest.approx(1e-2 / 25)
    assert rates[24] == pytest.approx(1e-2)
    assert rates[25] == pytest.approx(1e-2)
    assert all(a >= b for a, b in itertools.pairwise(rates[25:]))
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert rates[62] == pytest.approx(0.5e-2, rel=0.05)


def test_a_step_is_adamws_with_decay_and_clipped_gradients(shards: TokenShards) -> None:
    settings = recipe(clip_norm=0.1, weight_decay=0.3)
    student = learner(settings)
    torch.manual_seed(3)
    plain = Transformer(CONFIG)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.3)
    for t in range(3):  # the first step alone is the same for gradients of any length
        batch = packed(shards).batch(t)
        train_step(student, NextToken(), batch, settings, rate=0.01)
        plain(batch.input_ids, batch.labels, document_ids=batch.document_ids).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        assert norm > 0.2
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), other in zip(student.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_run_is_its_steps_at_the_rates_of_the_schedule(shards: TokenShards, tmp_path: Path) -> None:
    settings = recipe(steps=4)
    model, _ = run(shards, tmp_path, settings)
    student = learner(settings)
    for t in range(4):
        train_step(student, NextToken(), packed(shards).batch(t), settings, learning_rate(settings, t))
    for (name, one), other in zip(model.named_parameters(), student.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_output_projections_learn_at_a_rate_of_their_own(shards: TokenShards, tmp_path: Path) -> None:
    """The first step of Adam is the learning rate itself, decay included, whatever the gradient."""
    torch.manual_seed(3)
    begun = {name: tensor.clone() for name, tensor in Transformer(CONFIG).named_parameters()}
    settings = {"steps": 1, "warmup_fraction": 0.0, "clip_norm": 0.0}
    plain, _ = run(shards, tmp_path / "plain", recipe(**settings))  # type: ignore[arg-type]
    half, _ = run(shards, tmp_path / "half", recipe(**settings, output_projection_rate=0.5))  # type: ignore[arg-type]
    for (name, one), other in zip(plain.named_parameters(), half.parameters(), strict=True):
        if ".o_proj." in name:
            torch.testing.assert_close((one - begun[name]) / 2, other - begun[name], rtol=1e-4, atol=1e-7)
            assert not torch.equal(one, begun[name])
        else:
            assert torch.equal(one, other), name


@pytest.mark.parametrize(("rounded", "loss"), [(-1e-8, 0.0), (math.nan, math.nan)])
def test_a_sure_prediction_rounded_below_zero_is_no_negative_loss(
    shards: TokenShards, monkeypatch: pytest.MonkeyPatch, rounded: float, loss: float
) -> None:
    model = Transformer(CONFIG)

    def token_losses(ids: torch.Tensor, targets: torch.Tensor, **_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full(targets.shape, rounded), targets != -100

    monkeypatch.setattr(model, "token_losses", token_losses)
    options = {"layout": "padded", "context_length": 16, "pad_id": 1, "max_tokens": 70}
    batches = evaluation_batches(shards, batch_size=5, **options)  # type: ignore[arg-type]
    result = evaluate(model, batches, torch.ones(VOCAB, dtype=torch.long), make_accelerator("cpu", "float32"))
    for value in (result.loss, result.bits_per_byte, result.loss_all_positions):
        assert value == pytest.approx(loss, nan_ok=True)
    assert result.accuracy == 1


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_evaluation_is_the_sum_over_tokens_divided_once(shards: TokenShards, layout: str) -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    with torch.no_grad():
        model.lm_head.weight[1] *= 20  # padding is what it expects half of the time
    token_bytes = torch.arange(VOCAB) % 5 + 1
    options = {"layout": layout, "context_length": 16, "pad_id": 1, "max_tokens": 700}
    batches = list(evaluation_batches(shards, batch_size=5, **options))  # type: ignore[arg-type]
    result = evaluate(model, batches, token_bytes, make_accelerator("cpu", "float32"))
    nll, hits, all_nll, all_hits, all_count, count, size = 0.0, 0, 0.0, 0, 0, 0, 0
    for batch in batches:
        logits = model(batch.input_ids, document_ids=batch.document_ids).logits.detach()
        log_p = logits.log_softmax(-1).double()
        for row, label, all_label in rows_of(batch):
            lp = log_p[row]
            if all_label != -100:
                all_nll -= float(lp[all_label])
                all_hits += int(lp.argmax() == all_label)
                all_count += 1
            if label != -100:
                nll -= float(lp[label])
                hits += int(lp.argmax() == label)
                count += 1
                size += int(token_bytes[label])
    assert result.tokens == count
    assert result.loss == pytest.approx(nll / count, rel=1e-6)
    assert result.accuracy == pytest.approx(hits / count)
    assert result.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / size, rel=1e-6)
    if layout == "padded":
        assert result.loss_all_positions == pytest.approx(all_nll / all_count, rel=1e-6)
        assert all_hits > hits
        assert result.accuracy_all_positions == pytest.approx(all_hits / all_count)
    else:
        assert result.loss_all_positions is None
        assert result.accuracy_all_positions is None


def rows_of(batch: Batch) -> list[tuple[tuple[int, int], int, int]]:
    """Position, real label and label under the published convention, one by one."""
    everywhere = batch.labels if batch.labels_all_positions is None else batch.labels_all_positions
    return [
        ((row, t), int(batch.labels[row, t]), int(everywhere[row, t]))
        for row in range(batch.labels.shape[0])
        for t in range(batch.labels.shape[1])
    ]


def test_each_accelerator_of_a_process_has_its_own_precision() -> None:
    x = torch.ones(2, 2)
    made = {dtype: make_accelerator("cpu", dtype) for dtype in ("float32", "bfloat16")}
    for dtype, accelerator in made.items():
        with accelerator.autocast():
            assert (x @ x).dtype == getattr(torch, dtype)


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("gpu: there is one")
    with pytest.raises(ValueError, match="device is 'cuda'"):
        make_accelerator("cuda", "float32")
