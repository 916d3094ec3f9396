"""Plans: what they accept, what they refuse and in which words, and the steps a budget gives."""

from pathlib import Path

import pytest

from sqa.cost import train_step_flops
from sqa.experiments.plan import Budget, Plan, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_round_trip(name: str) -> None:
    plan = Plan.read(name)
    assert plan.name == name
    assert Plan.from_dict(plan.to_dict()) == plan


def test_the_published_preset_is_the_published_experiment() -> None:
    plan = Plan.read("published")
    config = plan.model_config("sqa")
    assert (config.vocab_size, config.d_model, config.num_layers, config.d_ff) == (10_000, 256, 8, 768)
    assert (plan.batch_size, plan.context, plan.budget, plan.layout) == (128, 1024, "epochs=1", "padded")
    assert (plan.learning_rate, plan.warmup_fraction) == (5e-4, 0.25)
    assert (plan.train_fraction, plan.validation_fraction) == (0.45, 0.05)
    assert plan.padding_in_loss
    # 45 % of 6.4 M articles in batches of 128
    assert plan.steps(batches_per_epoch=22_500, step_seconds={})["sqa"] == 22_500


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("steps=1000", "steps", 1000),
        ("tokens=5M", "tokens", 5e6),
        ("tokens=205k", "tokens", 205e3),
        ("flops=1e15", "flops", 1e15),
        ("time=20m", "time", 1200),
        ("time=90", "time", 90),
        ("epochs=0.5", "epochs", 0.5),
    ],
)
def test_budgets_are_read(text: str, kind: str, amount: float) -> None:
    assert Budget.parse(text) == Budget(kind, amount)


@pytest.mark.parametrize("text", ["", "steps", "steps=", "steps=0", "steps=-3", "hours=3", "time=3d", "tokens=5X"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^budget: "):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["epochs=1e300", "steps=" + "9" * 400, "tokens=1e300T", "time=1e12h", "flops=1e31"])
def test_budgets_that_no_machine_can_spend_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^budget: [a-z]+ must be at most 1e\+\d\d, got"):
        Budget.parse(text)


def test_changes_replace_fields_before_they_are_validated(tmp_path: Path) -> None:
    path = tmp_path / "six.toml"
    path.write_text("[model]\nnum_heads = 6\nd_model = 96\n")
    with pytest.raises(ValueError, match="got num_heads=6"):
        Plan.read(str(path))
    assert Plan.read(str(path), {"variants": ("mha",)}).variants == ("mha",)


def test_other_variants_leave_shapes_behind(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('variants = ["gqa", "sqa"]\ncontext = 512\n[shapes.gqa]\nnum_layers = 2\n', encoding="utf-8")
    assert Plan.read(str(path), {"variants": ("sqa",)}).shapes == {}
    assert Plan.read(str(path), {"variants": ("gqa",)}).shapes == {"gqa": {"num_layers": 2}}
    path.write_text('variants = ["gqa", "sqa"]\ncontext = 512\n[shapes.ssqa]\nnum_layers = 2\n', encoding="utf-8")
    with pytest.raises(ValueError, match="got 'ssqa'"):
        Plan.read(str(path), {"variants": ("sqa",)})


def test_budgets_become_steps() -> None:
    plan = Plan(name="p", variants=("gqa", "sqa"), batch_size=8, context=512)
    tokens = plan.replace(budget="tokens=409600").steps(batches_per_epoch=7, step_seconds={})
    assert tokens == {"gqa": 100, "sqa": 100}
    assert plan.replace(budget="epochs=2").steps(batches_per_epoch=7, step_seconds={})["sqa"] == 14
    timed = plan.replace(budget="time=60").steps(batches_per_epoch=7, step_seconds={"gqa": 0.5, "sqa": 0.25})
    assert timed == {"gqa": 120, "sqa": 240}
    flops = plan.replace(budget="flops=1e13").steps(batches_per_epoch=7, step_seconds={})
    for name, steps in flops.items():
        one = train_step_flops(plan.model_config(name), 512, 8)
        assert abs(steps * one - 1e13) <= one / 2
    assert flops["sqa"] > flops["gqa"]
    with pytest.raises(ValueError, match="less than one step of gqa"):
        plan.replace(budget="tokens=10").steps(batches_per_epoch=7, step_seconds={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("sqb",)}, "'sqb' is unknown; did you mean 'sqa'"),
        ({"variants": ("sqa", "SQA")}, "none of them twice"),
        ({"seeds": (1, 1)}, "none of them twice"),
        ({"seeds": ()}, "seeds must be one or more"),
        ({"seeds": (-1,)}, "seeds must be 0 or more"),
        ({"shape": "huge"}, "preset: 'huge' is unknown"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"batch_size": 6, "micro_batch_size": 4}, "micro_batch_size must divide batch_size=6, got 4"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"warmup_fraction": 1.0}, "warmup_fraction must be from 0 to below 1"),
        ({"padding_in_loss": True}, "padding_in_loss needs layout 'padded', got 'packed'"),
        ({"dtype": "float8"}, "dtype must be one of 'float32', 'bfloat16', got 'float8'"),
        ({"batch_size": "8"}, "batch_size must be a whole number, got '8'"),
        ({"compile": 1}, "compile must be true or false, got 1"),
        ({"model": {"num_heads": 6}}, "got num_heads=6"),
        ({"model": {"num_head": 8}}, "no field 'num_head'; did you mean 'num_heads'"),
        ({"model": {"max_seq_len": 256}}, "context must be at most the model's max_seq_len=256, got 512"),
        ({"budget": "time=20m", "timing_rounds": 0}, "a time budget needs timing_rounds"),
        ({"name": "../x"}, "name must be letters"),
        ({"model": {"causal": False}}, "causal must be true"),
        ({"model": {"rope": {"base": 3}}}, "rope must be a Rope"),
        ({"model": {"bias": "no"}}, "bias must be true or false, got 'no'"),
        ({"model": {"norm_eps": "x"}}, "norm_eps must be a number, got 'x'"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number"),
        ({"seeds": (2**70,)}, r"below 2\*\*63"),
        ({"threads": 100_000}, "threads must be at most 1024"),
    ],
)
def test_bad_plans_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_dict({"name": "p", "context": 512, **changes})


def test_a_toml_file_is_read_and_its_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('variants = ["gqa", "sqa"]\nseeds = [0, 7]\nbatch_size = 4\n[model]\nnum_layers = 2\n')
    plan = Plan.read(str(path))
    assert (plan.name, plan.seeds, plan.model_config("sqa").num_layers) == ("mine", (0, 7), 2)
    path.write_text("batchsize = 4\n")
    with pytest.raises(ValueError, match="no field 'batchsize'; did you mean 'batch_size'"):
        Plan.read(str(path))
    for damaged in (b"batch_size = \n", b'name = "\xff"\n', b"model = " + b"[" * 200_000):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"mine\.toml is not TOML"):
            Plan.read(str(path))
    with pytest.raises(ValueError, match=r"neither a file nor a preset .*did you mean 'demo'"):
        Plan.read("dem")
