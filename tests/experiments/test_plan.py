"""Plans: what they accept, what they refuse and in which words, and the steps a budget gives."""

from pathlib import Path

import pytest

from sqa.config import AttentionConfig
from sqa.cost import parameters, train_step_flops
from sqa.experiments.plan import Budget, Plan, shipped_plans

PLANS = Path(__file__).resolve().parents[2] / "benchmarks" / "plans"


@pytest.mark.parametrize("name", shipped_plans())
def test_shipped_plans_are_valid_and_round_trip(name: str) -> None:
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
        ("steps=10_000", "steps", 10_000),
    ],
)
def test_budgets_are_read(text: str, kind: str, amount: float) -> None:
    assert Budget.parse(text) == Budget(kind, amount)


@pytest.mark.parametrize(
    "text", ["", "steps", "steps=", "steps=0", "steps=-3", "hours=3", "time=3d", "tokens=5X", "steps=1_"]
)
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


def test_the_plan_of_one_run_is_timed_only_where_its_budget_needs_that(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    for budget, rounds in (("steps=3", 0), ("time=20m", 9)):
        path.write_text(f'variants = ["gqa", "ssqa"]\nbudget = "{budget}"\n[shapes.gqa]\nnum_layers = 2\n')
        plan = Plan.read_single(str(path), "SSQA", 7, {"context": 64})
        assert (plan.cells, plan.context, plan.shapes) == ([("ssqa", 7)], 64, {})
        assert plan.timing_rounds == rounds


def test_other_variants_leave_shapes_behind(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text('variants = ["gqa", "sqa"]\ncontext = 512\n[shapes.gqa]\nnum_layers = 2\n', encoding="utf-8")
    assert Plan.read(str(path), {"variants": ("sqa",)}).shapes == {}
    for name in ("gqa", "GQA"):
        assert Plan.read(str(path), {"variants": (name,)}).shapes == {"gqa": {"num_layers": 2}}
    path.write_text('variants = ["gqa", "sqa"]\ncontext = 512\n[shapes.ssqa]\nnum_layers = 2\n', encoding="utf-8")
    with pytest.raises(ValueError, match="got 'ssqa'"):
        Plan.read(str(path), {"variants": ("sqa",)})
    path.write_text('budget = "steps=3"\n[learning_rates]\ngqa = 1e-3\nsqa = 2e-3\n', encoding="utf-8")
    assert Plan.read(str(path), {"variants": ("sqa",)}).learning_rates == {"sqa": 2e-3}  # the default variants
    path.write_text('variants = [["gqa"], "sqa"]\n[learning_rates]\nsqa = 2e-3\n', encoding="utf-8")
    assert Plan.read(str(path), {"variants": ("sqa",)}).learning_rates == {"sqa": 2e-3}
    with pytest.raises(ValueError, match=r"variants\[0\] must be text, got \['gqa'\]"):
        Plan.read(str(path))


def test_a_plan_holds_several_shapes_of_one_variant_and_head_counts_of_its_own() -> None:
    plan = Plan(
        name="p",
        variants=("gqa", "SQA", "sqa-wider", "q3"),
        shapes={
            "sqa-wider": {"variant": "SQA", "d_ff": 448, "label": "SQA, wider"},
            "q3": {"num_query_heads": 3, "head_dim": 32},
        },
        learning_rates={"sqa-wider": 1e-3},
    )
    assert plan.variants == ("gqa", "sqa", "sqa-wider", "q3")
    sqa, wider, own = (plan.model_config(name) for name in plan.variants[1:])
    assert wider == sqa.replace(d_ff=448)
    assert own.attention == AttentionConfig(d_model=128, num_heads=8, num_query_heads=3, num_kv_heads=3, head_dim=32)
    assert [plan.label(name) for name in plan.variants] == ["GQA", "SQA", "SQA, wider", "q3"]
    assert [plan.base(name) for name in plan.variants] == ["gqa", "sqa", "sqa", None]
    assert plan.find_cells(["sqa-wider:0"]) == [("sqa-wider", 0)]
    with pytest.raises(ValueError, match="only: must name one run or more"):
        plan.find_cells([])
    assert plan.steps(batches_per_epoch=7, step_seconds={})["q3"] == 7
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"x": {"d_ff": 8}}, "shapes.x must have either a variant or num_query_heads"),
        ({"x": {"variant": "sqa", "num_query_heads": 2}}, "shapes.x must have either a variant or num_query_heads"),
        ({"sqq": {}}, "or be named after a variant; did you mean 'sqa'"),
        ({"sqa": {"variant": "gqa"}}, "shapes.sqa is a variant and has no variant"),
        ({"sqa": {"num_query_heads": 2}}, "shapes.sqa is a variant and has no num_query_heads"),
        ({"x": {"variant": "sqx"}}, "'sqx' is unknown; did you mean 'sqa'"),
        ({"x": {"variant": 3}}, r"shapes\.x\.variant must be text, got 3"),
        ({"x": {"num_query_heads": "2"}}, "num_query_heads must be a positive whole number, got '2'"),
        ({"x": {"num_query_heads": 9}}, "num_query_heads must be at most num_heads=8, got 9"),
        ({"x": {"num_query_heads": 3, "num_kv_heads": 2}}, "num_kv_heads must divide num_query_heads=3"),
        ({"x": {"variant": "sqa", "label": ""}}, "label be as short"),
        ({"x": {"variant": "sqa", "label": "GQA"}}, r"labels must differ.* got \['GQA', 'GQA'\]"),
        ({"X": {"variant": "sqa"}}, "must be named by at most 40 of a-z"),
        ({"a/b": {"variant": "sqa"}}, "must be named by at most 40 of a-z"),
        ({"x": 3}, r"shapes\.x must be a table, got 3"),
        ({"x": {"variant": "sqa"}, "y": {"variant": "sqa"}}, r"shapes must be of the variants .* got 'y'"),
    ],
)
def test_shapes_that_say_nothing_or_too_much_are_refused(shapes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_dict({"name": "p", "variants": ["gqa", next(iter(shapes))], "shapes": shapes})


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_plans_of_the_committed_results_can_be_read(path: Path) -> None:
    assert Plan.read(str(path)).name == path.stem


def test_the_grid_is_complete_and_its_shapes_have_equal_parameters() -> None:
    plan = Plan.read(str(PLANS / "grid.toml"))
    layers = [plan.model_config(name).layers[0] for name in plan.variants]
    counts = (8, 4, 2, 1)
    heads = {(layer.num_query_heads, layer.num_kv_heads) for layer in layers}
    assert heads == {(q, kv) for q in counts for kv in counts if kv <= q}
    assert {layer.head_dim for layer in layers} == {16}
    gqa = parameters(plan.model_config("gqa"))
    assert all(abs(parameters(plan.model_config(name)) / gqa - 1) < 0.002 for name in plan.variants)


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
        ({"context": 3, "probes": 1}, "probes need a context of at least 4, got 3"),
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
        ({"model": {"rope": {"bse": 3}}}, "rope has no field 'bse'"),
        ({"model": {"rope": 3}}, "rope must be a table, got 3"),
        ({"model": {"bias": "no"}}, "bias must be true or false, got 'no'"),
        ({"model": {"norm_eps": "x"}}, "norm_eps must be a finite number, got 'x'"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number"),
        ({"seeds": (2**70,)}, r"below 2\*\*63"),
        ({"threads": 100_000}, "threads must be at most 1024"),
        ({"model": {"max_seq_len": "long"}}, "max_seq_len must be a positive whole number, got 'long'"),
        ({"model": {"max_seq_len": [512]}}, "max_seq_len must be a positive whole number"),
        ({"model": {"d_ff": {"x": 1}}}, "d_ff must be a positive whole number"),
        ({"model": {"num_heads": "8"}}, "num_heads must be a positive whole number, got '8'"),
        ({"model": {"num_kv_heads": 2.0}, "variants": ["gqa"]}, "num_kv_heads must be a positive whole number"),
        ({"model": 3}, "plan: model must be a table, got 3"),
        ({"variants": "gqa"}, "plan: variants must be a list, got 'gqa'"),
        ({"variants": [["gqa"]]}, r"plan: variants\[0\] must be text"),
        ({"seeds": [1.5]}, r"plan: seeds\[0\] must be a whole number, got 1.5"),
        ({"learning_rate": 10**400}, "learning_rate must be a finite number, got 1000"),
        ({"context": 2**40}, "context must be at most 2147483648"),
        ({"data": ["a"]}, "plan: data must be text"),
        ({"name": "x" * 200}, "name must be letters"),
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
    for empty in ("", "# a comment alone\n"):
        path.write_text(empty)
        with pytest.raises(ValueError, match=r"mine\.toml is empty; give at least one field"):
            Plan.read(str(path))
    with pytest.raises(ValueError, match=r"neither a file nor a plan of the package .*did you mean 'demo'"):
        Plan.read("dem")
