"""What a variant saves is spent to the last step and never overspent, and comes out as plans that can be run."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from sqa.cost import parameters, train_step_flops
from sqa.experiments.plan import Plan
from sqa.planning import spend
from sqa.planning.spend import Proposal, propose, table, write_plans
from sqa.variants import preset

GQA_FLOPS = train_step_flops(preset("published", "gqa"), 1024, 8)


@pytest.fixture(scope="module")
def flops() -> list[Proposal]:
    return propose("gqa", "published", "equal-flops", ("sqa", "xsqa", "mha"), n=1024, batch=8)


def of(proposals: list[Proposal], way: str, variant: str) -> Proposal:
    (found,) = (p for p in proposals if (p.way, p.variant) == (way, variant))
    return found


def test_a_saving_is_spent_and_not_overspent(flops: list[Proposal]) -> None:
    reference, *found = flops
    assert (reference.variant, reference.flops, reference.share) == ("gqa", GQA_FLOPS, 1.0)
    assert {p.variant for p in found} == {"sqa", "xsqa"}  # MHA costs more than GQA: nothing to spend
    assert all(p.flops <= GQA_FLOPS and p.share == p.flops / GQA_FLOPS for p in found)
    for p in found:
        if p.way != "longer-context":
            assert (p.context, p.batch_size) == (1024, 8)
            wider = replace(p, model={**p.model, "d_ff": p.config.d_ff + 8})
            assert wider.flops > GQA_FLOPS


def test_every_way_grows_what_it_names(flops: list[Proposal]) -> None:
    base = preset("published", "sqa")
    assert of(flops, "wider-feed-forward", "sqa").config == base.replace(d_ff=1024)
    layers = of(flops, "more-layers", "sqa")
    assert layers.config == base.replace(num_layers=9, d_ff=872)
    assert layers.parameters == parameters(layers.config)
    wider = of(flops, "wider-model", "xsqa").config
    assert (wider.d_model, wider.layers[0].head_dim, wider.layers[0].num_query_heads) == (320, 16, 5)
    longer = of(flops, "longer-context", "sqa")
    assert (longer.context, longer.batch_size, longer.config.max_seq_len) == (2048, 4, 2048)


@pytest.mark.parametrize("way", spend.WAYS)
def test_a_way_in_which_nothing_fits_is_left_out(way: str) -> None:
    start = Proposal(preset="demo", budget="equal-flops", variant="sqa", model={}, context=64, batch_size=2)
    assert spend._largest(way, start, start.cost) is None


def test_equal_parameters_spend_parameters_and_no_context() -> None:
    reference, *found = propose("gqa", "published", "equal-parameters", n=8192)
    assert reference.parameters == 11_179_792
    assert {p.way for p in found} == {"wider-feed-forward", "more-layers"}
    assert all(0.99 < p.parameters / reference.parameters <= 1 for p in found)


def test_equal_time_follows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which SQA runs at twice GQA's FLOP rate leaves room for twice the FLOPs."""

    def measure(proposals: list[Proposal], device: str) -> list[Proposal]:
        assert device == "cpu"
        seconds = [p.flops / {"gqa": 1e12, "sqa": 2e12}[p.variant] for p in proposals]
        return [replace(p, step_s=s, share=s / seconds[0]) for p, s in zip(proposals, seconds, strict=True)]

    monkeypatch.setattr(spend, "_measure", measure)
    reference, *found = propose("gqa", "published", "equal-time", ("sqa",), device="cpu")
    assert reference.step_s == pytest.approx(GQA_FLOPS / 1e12)
    assert [p.way for p in found] == list(spend.WAYS)
    for p in found:
        assert (0.7 if p.way == "longer-context" else 0.99) < p.flops / (2 * GQA_FLOPS) <= 1
        assert p.share == pytest.approx(p.flops / (2 * GQA_FLOPS))


def test_equal_time_times_real_training_steps() -> None:
    small = Proposal(preset="demo", budget="equal-time", variant="sqa", model={}, context=64, batch_size=2)
    first, second = spend._measure([small, replace(small, model={"num_layers": 12})], "cpu")
    assert first.step_s is not None
    assert second.step_s is not None
    assert first.share == 1.0
    assert second.share == second.step_s / first.step_s > 1  # four times the layers


def test_plans_can_be_read_and_give_the_proposed_models(flops: list[Proposal], tmp_path: Path) -> None:
    written = write_plans(flops, tmp_path / "plans")
    assert [path.stem for path in written] == [
        "equal-flops-wider-feed-forward",
        "equal-flops-more-layers",
        "equal-flops-wider-model",
        "equal-flops-longer-context-sqa",
        "equal-flops-longer-context-xsqa",
    ]
    plans = {path.stem.removeprefix("equal-flops-"): Plan.read(str(path)) for path in written}
    for name, plan in plans.items():
        for p in flops[1:]:
            if name in (p.way, f"{p.way}-{p.variant}"):
                assert plan.model_config(p.variant) == p.config
                assert (plan.context, plan.batch_size) == (p.context, p.batch_size)
    assert plans["wider-feed-forward"].variants == ("gqa", "sqa", "xsqa", "wide-gqa")
    assert plans["wider-feed-forward"].model_config("gqa") == preset("published", "gqa")
    assert plans["longer-context-sqa"].variants == ("sqa",)


def test_the_table_fits_80_columns(flops: list[Proposal]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(flops))
    text = console.export_text()
    assert "…" not in text
    assert "wider feed forward" in text
    assert "d_ff 1024" in text
    assert "ms a" not in text  # nothing was timed
    fitting = {(p.variant, p.way) for p in flops[1:]}
    assert ("The next size would cost more: SQA wider model" in text) == (("sqa", "wider-model") not in fitting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("gqa", "published", "equal"),
            "budget: must be one of equal-time, equal-flops, equal-parameters, got 'equal'",
        ),
        (("gpa", "published", "equal-flops"), "variant: 'gpa' is unknown; did you mean 'gqa'"),
        (("gqa", "publish", "equal-flops"), "preset: 'publish' is unknown; did you mean 'published'"),
        (("gqa", "published", "equal-flops", ("sqa",), 0), "plan: n must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        propose(*arguments)  # type: ignore[arg-type]
