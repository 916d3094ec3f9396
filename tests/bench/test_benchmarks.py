"""The benchmarks themselves, at sizes where they take a second and their figures mean nothing."""

import importlib.util
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from models import NOT_BUILT
from sqa import KVCache, cost, variant
from sqa.attention import fused
from sqa.attention.kernels import attend
from sqa.bench import lineup, peers, step
from sqa.bench.attention import Setting, layer_config, refusal, run_attention
from sqa.bench.decode import filled_cache, run_decode
from sqa.bench.lineup import Models
from sqa.bench.measurement import Measurement, time_all
from sqa.bench.prefill import run_prefill
from sqa.bench.report import BenchResult
from sqa.bench.step import run_step
from sqa.cli import app
from sqa.config import ModelConfig, Rope
from sqa.dtypes import find_dtype
from sqa.measure.peak import Peak
from sqa.measure.timing import TimeLimit, Timing
from sqa.model import Transformer

CPU = torch.device("cpu")
LLAMA_CPP_SETTINGS = ("f32", "f32 flash", "bf16", "bf16 flash", "q8_0", "q8_0 flash")
PEAK = Peak(1e11, 2e11)
TIMED = {"p20": 1.0, "p80": 4.0, "rounds": 2}


def demo(*variants: str) -> Models:
    return Models.of_preset("demo", variants)


def by_name(result: BenchResult) -> dict[tuple[str | None, str], Measurement]:
    rows = {(row.implementation, row.variant): row for row in result.rows}
    assert len(rows) == len(result.rows)
    return rows


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("attention", "step", "prefill"):
        monkeypatch.setattr(f"sqa.bench.{module}.measure_peak", lambda dtype, device: PEAK)


def shape(variant: str, *, length: int, comparable: bool = False) -> ModelConfig:
    return demo(variant).fitted(length, peers.PEERS if comparable else ()).configs[variant]


def setting(name: str = "sqa", *, dtype: str = "fp32", mask: str = "causal", kernel: str = "auto") -> Setting:
    config = layer_config(name, head_dim=16, num_heads=8)
    return Setting(
        variant=name,
        config=config.replace(causal=mask != "none", window=20 if mask == "window" else None),
        mask=mask,
        kernel=kernel,
        what="forward+backward",
        n=100,
        batch_size=2,
        dtype=dtype,
        device=CPU,
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mask", ["causal", "none", "window", "documents"])
@pytest.mark.parametrize("name", ["gqa", "xsqa", "rsqa"])
def test_right_kernels_are_let_through(name: str, mask: str, dtype: str) -> None:
    assert refusal(setting(name, dtype=dtype, mask=mask)) is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_kernel_is_refused(dtype: str) -> None:
    def looks_ahead(q, k, v, mask, *, kernel):  # type: ignore[no-untyped-def]
        return attend(q, k, v, replace(mask, causal=False), kernel=kernel)

    def wrong_gradient(q, k, v, mask, *, kernel):  # type: ignore[no-untyped-def]
        return attend(q, k.detach() + 0 * k, v, mask, kernel=kernel)

    assert "output is off" in str(refusal(setting(dtype=dtype), looks_ahead))
    assert "dk is off" in str(refusal(setting(dtype=dtype), wrong_gradient))


def test_a_kernel_that_cannot_run_is_a_row_with_a_note() -> None:
    assert str(refusal(setting(kernel="cudnn"))).startswith("cannot run: ")
    result = run_attention(
        variants=("gqa", "sqa"), lengths=(32, 64), num_heads=4, rounds=1, kernels=("math", "cudnn", "flash")
    )
    notes = [row for row in result.rows if row.note is not None]
    assert [(row.kernel, row.n) for row in notes] == [("sdpa:cudnn", 32)] * 4
    assert {row.kernel for row in result.rows if row.seconds is not None} == {"sdpa:math", "sdpa:flash"}


def test_scores_and_flops_are_counted_under_the_mask() -> None:
    causal = setting()
    flops = 2 * cost.attention_flops(causal.config, 100)
    assert causal.measurement(PEAK).flops == 3 * flops
    assert replace(causal, what="forward").measurement(PEAK).limit_seconds == flops / 1e11
    packed = replace(setting(mask="documents"), n=101)  # 50, 50 and 1
    ids = packed.layer_mask.document_ids
    assert ids is not None
    same = ids[:, :, None] == ids[:, None, :]
    assert packed.scores == 4 * int(same.tril().sum())


def test_attention_reports_rates_shares_and_ratios() -> None:
    result = run_attention(variants=("gqa", "2/1x16"), lengths=(64, 32), num_heads=4, rounds=2, dtypes=("fp32",))
    assert [row.n for row in result.rows] == [32] * 4 + [64] * 4
    gqa, ours = (row for row in result.rows if row.n == 64 and row.what == "forward")
    assert ours.heads == "2/1x16"
    assert ours.flops is not None
    assert ours.ratio == gqa.median / ours.median
    assert ours.limit == 2.0
    assert ours.share_of_limit == ours.ratio / 2
    assert ours.flops_per_s == ours.flops / ours.median
    assert ours.share_of_peak == ours.flops_per_s / 1e11
    assert ours.share_of_processor == ours.flops_per_s / 2e11


def test_attention_at_several_widths_beside_pytorchs() -> None:
    result = run_attention(
        variants=("gqa", "sqa"), lengths=(64,), head_dims=(16, 64), num_heads=4, rounds=1, dtypes=("fp32",),
        kernels=("blocks", "sdpa"),
    )  # fmt: skip
    assert {(row.d_model, row.head_dim) for row in result.rows} == {(64, 16), (256, 64)}
    rows = {(row.head_dim, row.variant, row.kernel): row for row in result.rows if row.what == "forward"}
    ours, theirs = rows[64, "sqa", "blocks"], rows[64, "sqa", "sdpa"]
    assert ours.ratio_to_sdpa == theirs.median / ours.median
    assert theirs.ratio_to_sdpa is None
    assert ours.ratio == rows[64, "gqa", "blocks"].median / ours.median


def test_a_window_runs_beside_full_attention_and_the_layer_takes_part() -> None:
    result = run_attention(
        variants=("gqa", "sqa"),
        lengths=(256,),
        num_heads=4,
        rounds=1,
        dtypes=("fp32",),
        mask="window",
        window=16,
    )
    windowed = [row for row in result.rows if row.mask == "window"]
    assert {row.what for row in windowed} == {"forward", "forward+backward", "layer step"}
    assert {row.kernel for row in windowed} == {"blocks" if fused.lacks() in NOT_BUILT else "fused"}
    baselines = {(row.mask, row.what): row.median for row in result.rows if row.variant == "gqa"}
    assert all(row.ratio == baselines[row.mask, row.what] / row.median for row in result.rows)
    full = next(row for row in result.rows if row.mask == "causal" and row.what == "layer step")
    layer = next(row for row in windowed if row.what == "layer step")
    assert layer.ratio_to_full == full.median / layer.median


def test_a_window_is_compared_with_full_attention_of_the_same_kernel() -> None:
    options = {"lengths": (256,), "num_heads": 4, "rounds": 1, "dtypes": ("fp32",), "mask": "window", "window": 16}
    rows = run_attention(variants=("GQA", "8/2x16"), kernels=("reference", "sdpa"), **options).rows  # type: ignore[arg-type]
    assert {row.variant for row in rows} == {"gqa", "8/2x16"}
    assert {row.baseline for row in rows} == {"gqa"}
    full = {(row.variant, row.kernel, row.what): row.median for row in rows if row.mask == "causal"}
    for row in rows:
        if row.mask == "window":
            assert row.ratio_to_full == full[row.variant, row.kernel, row.what] / row.median


def test_variants_are_compared_where_auto_chooses_another_kernel_for_each() -> None:
    """Our own kernel takes heads of 32 and not of 8."""
    rows = run_attention(
        variants=("gqa", "4/1x32"), lengths=(64,), head_dims=(8,), num_heads=4, rounds=1, dtypes=("fp32",)
    ).rows
    assert {row.kernel for row in rows}.isdisjoint({"auto"})
    baselines = {row.what: row.median for row in rows if row.variant == "gqa"}
    assert [row.ratio for row in rows] == [baselines[row.what] / row.median for row in rows]


def test_the_step_of_a_layer_has_the_gradients_of_its_input_and_of_all_its_weights() -> None:
    each = replace(setting(), what="layer step")
    gradients = each.contestant()()
    widths = [each.config.query_width, each.config.kv_width, each.config.kv_width, each.config.output_width]
    assert gradients[0].shape == (2, 100, 128)  # type: ignore[index]
    assert sorted(g.numel() for g in gradients[1:]) == sorted(128 * width for width in widths)  # type: ignore[index]
    assert all(g.abs().sum() > 0 for g in gradients)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "window2"}, "mask: 'window2' is unknown; did you mean 'window'"),
        ({"kernels": ("flsh",)}, "kernel: 'flsh' is unknown; did you mean 'flash'"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"lengths": ()}, "lengths must be at least 1"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"variants": ("8/3",)}, "num_kv_heads must divide num_query_heads=8"),
        ({"budget": -1.0}, "seconds must be above 0"),
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_attention(**options)  # type: ignore[arg-type]


def test_a_peer_with_our_weights_is_let_through_and_any_other_refused() -> None:
    config = shape("sqa", length=64, comparable=True)
    ids, labels = torch.randint(config.vocab_size, (2, 2, 64))
    labels[:, ::5] = -100
    own, other = (Transformer(config) for _ in range(2))
    llama = peers.build("hf-llama", own)["eager"]
    assert peers.difference(peers.ours(own), llama, ids, labels) is None
    assert "logits differ" in str(peers.difference(peers.ours(other), llama, ids, labels))
    # the same weights under another convention of rotary pairs: a small error, and still one
    layer = config.layers[0].replace(rope=Rope(interleaved=True))
    turned = Transformer(config.replace(attention=layer))
    turned.load_state_dict(own.state_dict())
    assert "logits differ" in str(peers.difference(peers.ours(turned), llama, ids, labels))
    # a loss over other tokens
    shifted = replace(llama, loss=lambda module, ids, labels: module(ids, labels=labels).loss)
    assert "loss differ" in str(peers.difference(peers.ours(own), shifted, ids, labels))


def test_steps_of_peers_are_timed_eager_and_compared() -> None:
    result = run_step(
        demo("gqa", "sqa"), peers=("hf-llama", "x-transformers"), dtypes=("fp32",), batch_size=2, length=16,
        compile=False, rounds=2,
    )  # fmt: skip
    rows = by_name(result)
    assert len(rows) == 6
    assert rows["hf-llama", "sqa"].checked is True
    assert rows["x-transformers", "sqa"].checked is False
    fastest = min(rows[name, "sqa"].median for name in ("hf-llama", "x-transformers"))
    ours = rows["sqa", "sqa"]
    assert ours.ratio_to_peer == fastest / ours.median
    assert ours.ratio == rows["sqa", "gqa"].median / ours.median
    assert ours.tokens_per_s == 2 * 16 / ours.median
    assert rows["hf-llama", "gqa"].tried == {"eager": rows["hf-llama", "gqa"].median}
    flops = cost.train_step_flops(shape("sqa", length=16, comparable=True), 16, 2)
    assert ours.share_of_processor == flops / ours.median / 2e11


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"qkv_bias": True}], ids=str)
def test_a_model_from_a_directory_is_measured_with_its_own_weights(changes, config_of, model_of, saved) -> None:  # type: ignore[no-untyped-def]
    model = model_of(config_of(**changes))
    models = Models.of_sources(saved(model))
    (name,) = models.configs
    assert replace(models, configs={**models.configs, "larger": shape("sqa", length=8)}).vocab_size == 300
    built = models.fitted(512, ("hf-llama",)).build(name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), built.parameters(), strict=True))
    result = run_prefill(models, peers=("hf-llama",), lengths=(16,), dtype="fp32", compile=False, rounds=1)
    rows = by_name(result)
    assert rows["hf-llama", name].checked is True
    assert rows["sqa", name].ratio_to_peer == rows["hf-llama", name].median / rows["sqa", name].median
    assert rows["sqa", name].limit is None


def test_models_from_directories_take_turns(  # type: ignore[no-untyped-def]
    config_of, model_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    layer = config.layers[0]
    fewer = config.replace(attention=(layer, layer.replace(num_query_heads=2)), vocab_size=config.vocab_size - 5)
    for name, shape in (("original-1.5", config), ("converted", fewer)):
        model_of(shape).save(tmp_path / name)
    models = Models.of_sources(tmp_path / "original-1.5", tmp_path / "converted")
    assert list(models.configs) == ["original-1.5", "converted"]
    monkeypatch.chdir(tmp_path / "converted")
    assert list(Models.of_sources(".").configs) == ["converted"]
    assert models.vocab_size == fewer.vocab_size
    result = run_prefill(models, peers=("hf-llama",), lengths=(16,), dtype="fp32", compile=False, rounds=1)
    rows = by_name(result)
    assert [rows["hf-llama", name].checked for name in models.configs] == [True, True]  # layers that differ as well
    assert rows["sqa", "converted"].ratio == rows["sqa", "original-1.5"].median / rows["sqa", "converted"].median
    flops = [cost.prefill_flops(models.configs[name], 16) for name in ("original-1.5", "converted")]
    assert rows["sqa", "converted"].limit == flops[0] / flops[1]
    stepped = run_step(models, peers=("hf-llama",), dtypes=("fp32",), batch_size=1, length=16, compile=False, rounds=2)
    assert [row.checked for row in stepped.rows] == [None, True, None, True]
    with pytest.raises(ValueError, match="have one name; rename a directory"):
        Models.of_sources(tmp_path / "converted", tmp_path / "x" / "converted")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_changes_the_weights_and_leaves_no_gradient(dtype: torch.dtype) -> None:
    config = shape("sqa", length=16)
    own, computed = peers.ours(Transformer(config)), []

    def loss(module, ids, labels):  # type: ignore[no-untyped-def]
        hidden = module.hidden_states(ids)
        computed.append(torch.nn.functional.linear(hidden, module.lm_head.weight).dtype)
        return module(ids, labels=labels).loss

    before = own.module.state_dict()["lm_head.weight"].clone()
    batch = torch.randint(config.vocab_size, (2, 1, 16))
    step.training_step(replace(own, loss=loss), own.module, dtype, batch)()
    assert computed == [dtype]
    assert not torch.equal(before, own.module.state_dict()["lm_head.weight"])
    assert all(parameter.grad is None for parameter in own.module.parameters())


def test_ours_runs_compiled_and_peers_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(Transformer, "compile", lambda self: done.append("ours"))
    monkeypatch.setattr(torch, "compile", lambda module: done.append("peer") or module)
    models = demo("sqa").fitted(16, ("hf-llama",))
    runners, _ = lineup.line_up(models, ("hf-llama",), compile=True, device=CPU)
    assert [(r.implementation, r.setting) for r in runners] == [
        ("sqa", "compiled"), ("hf-llama", "eager"), ("hf-llama", "compiled")
    ]  # fmt: skip
    assert done == ["ours", "peer"]


def test_memory_is_a_table_of_its_own() -> None:
    options = {"dtypes": ("fp32",), "batch_size": 1, "length": 8, "compile": False, "memory": True}
    result = run_step(demo("sqa"), **options, rounds=2)  # type: ignore[arg-type]
    assert result.kinds == (["step", "step memory"] if sys.platform == "linux" else ["step"])


def test_the_model_that_is_run_first_does_not_count_against_a_wide_one() -> None:
    layer = variant("sqa", d_model=512, num_heads=8)
    layers = (*[layer] * 3, layer.replace(num_query_heads=2))  # that of the model with one layer is the first
    wide = ModelConfig(vocab_size=8, num_layers=4, d_ff=2048, max_seq_len=8, attention=layers)
    options = {"dtypes": ("fp32",), "batch_size": 1, "length": 8, "compile": False, "memory": True, "rounds": 1}
    rows = run_step(Models(name="wide", configs={"sqa": wide}), **options).rows  # type: ignore[arg-type]
    for row in rows:
        if row.peak_bytes is not None:  # weights, gradients and two moments take 16 bytes a parameter
            assert row.peak_bytes > 15 * cost.parameters(wide)


def test_memory_that_cannot_be_measured_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(ThreadPoolExecutor):
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(1)

        def submit(self, *_: object, **__: object) -> Future[Any]:
            return super().submit(self.end)

        def end(self) -> None:
            raise BrokenProcessPool("the process ended")

    monkeypatch.setattr(step, "ProcessPoolExecutor", Killed)
    options = {"dtypes": ("fp32",), "batch_size": 1, "length": 8, "compile": False, "memory": True}
    rows = run_step(demo("sqa"), **options, rounds=1).rows  # type: ignore[arg-type]
    assert [(row.kind, row.note) for row in rows] == [("step", None), ("step memory", "cannot run: the process ended")]


def test_a_contestant_that_cannot_be_made_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(config: ModelConfig, n: int, **options: Any) -> KVCache:
        if n > 16:
            raise RuntimeError("no memory")
        return filled_cache(config, n, **options)

    monkeypatch.setattr("sqa.bench.decode.filled_cache", scarce)
    rows = run_decode(demo("sqa"), lengths=(8, 32), steps=1, rounds=1).rows
    assert [(row.n, row.note) for row in rows] == [(8, None), (32, "cannot run: no memory")]


def test_a_contestant_that_cannot_run_says_why_and_a_bug_is_raised() -> None:
    def out_of_memory() -> None:
        raise RuntimeError("no memory\nfor 8 GiB")

    def bug() -> None:
        raise KeyError("bug")

    def timed(*runs: Callable[[], None]) -> list[Measurement]:
        known = Measurement(kind="step", variant="v")
        entered = [(known, lambda run=run: run) for run in runs]  # type: ignore[misc]
        return time_all(entered, rounds=2, warmup=1, device=CPU, limit=TimeLimit())

    rows = timed(out_of_memory, lambda: None)
    assert [row.note for row in rows] == ["cannot run: no memory", None]
    assert [row.seconds and row.seconds.rounds for row in rows] == [None, 2]
    with pytest.raises(KeyError):
        timed(bug)


def test_the_better_setting_counts() -> None:
    def measured(implementation: str, setting: str | None, median: float | None) -> Measurement:
        timing = None if median is None else Timing(median=median, **TIMED)  # type: ignore[arg-type]
        return Measurement(kind="step", variant="v", implementation=implementation, setting=setting, seconds=timing)

    best = lineup.best_settings(
        [
            measured("p", "eager", 2.0),
            measured("p", "compiled", 1.0),
            measured("q", "eager", 3.0),
            measured("q", "compiled", None),
            measured("r", None, None),
        ]
    )
    assert [row.setting for row in best] == ["compiled", "eager", None]
    assert [row.tried for row in best] == [{"eager": 2.0, "compiled": 1.0}, {"eager": 3.0}, None]


def test_ours_stands_beside_the_fastest_peer_and_the_leanest() -> None:
    def measured(implementation: str, median: float | None, peak: int | None, variant: str = "v") -> Measurement:
        timing = None if median is None else Timing(median=median, **TIMED)  # type: ignore[arg-type]
        return Measurement(kind="step", variant=variant, implementation=implementation, seconds=timing, peak_bytes=peak)

    ours, alone, *others = lineup.beside_peers(
        [
            measured("sqa", 2.0, 300),
            measured("sqa", 2.0, 300, "another"),
            measured("p", 6.0, 200),
            measured("q", 3.0, 600),
            measured("r", None, None),
        ]
    )
    assert (ours.ratio_to_peer, ours.memory_to_peer) == (1.5, 1.5)
    assert {(row.ratio_to_peer, row.memory_to_peer) for row in (alone, *others)} == {(None, None)}


@pytest.mark.parametrize(("name", "package"), [("hf-llama", "transformers"), ("x-transformers", "x_transformers")])
def test_a_missing_peer_is_a_line_not_an_error(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = run_step(demo("sqa"), peers=(name,), dtypes=("fp32",), batch_size=1, length=8, compile=False, rounds=2)
    ours, missing = result.rows
    assert ours.seconds is not None
    assert str(missing.note).startswith("not installed; run in a clone of the repository: pip install")
    assert missing.seconds is None


def test_without_llama_cpp_its_line_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.delitem(sys.modules, "sqa.bench.llama_cpp", raising=False)
    result = run_prefill(demo("sqa"), peers=("llama-cpp",), lengths=(16,), dtype="fp32", compile=False, rounds=1)
    assert by_name(result)["llama-cpp", "sqa"].note == (
        "not installed; pip install llama-cpp-python builds it in ten minutes"
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="data: llama-cpp-python is not installed")
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"tie_embeddings": True}], ids=str)
def test_llama_cpp_computes_what_we_do_and_its_best_type_counts(changes, config_of, model_of, saved) -> None:  # type: ignore[no-untyped-def]
    models = Models.of_sources(saved(model_of(config_of(**changes))))
    (name,) = models.configs
    result = run_prefill(models, peers=("llama-cpp",), lengths=(16, 32), compile=False, rounds=1)
    theirs = [row for row in result.rows if row.implementation == "llama-cpp"]
    assert [row.n for row in theirs] == [16, 32]
    assert all(set(row.tried or {}) == set(LLAMA_CPP_SETTINGS) for row in theirs)
    # other weights are noticed
    other = Transformer(models.configs[name])
    entrant = peers.build("llama-cpp", models.build(name))["f32"]
    ids, labels = torch.randint(other.config.vocab_size, (2, 2, 16))
    assert "last logits differ" in str(peers.difference(peers.ours(other), entrant, ids, labels))


def test_a_shape_that_a_peer_cannot_have_is_a_line_too() -> None:
    models = demo("rsqa").fitted(8, peers.PEERS)
    _, absent = lineup.line_up(models, peers.PEERS, compile=False, device=CPU)
    assert all("cannot have 2 query and 4 KV heads" in note for note in absent.values())
    assert len(absent) == 3


def test_x_transformers_takes_no_part_where_it_would_do_other_work() -> None:
    config = shape("sqa", length=8)
    layers = config.layers[0], config.layers[0].replace(num_query_heads=2), config.layers[0]
    for attention in (layers, config.layers[0].replace(window=4)):
        own = Transformer(config.replace(attention=attention))
        with pytest.raises(peers.Unavailable, match="all of its layers are alike, and none has a window"):
            peers.build("x-transformers", own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ("hf-lama",)}, "peer: 'hf-lama' is unknown; did you mean 'hf-llama'"),
        ({"peers": ("llama-cpp",)}, "peer: llama-cpp cannot train"),
        ({"dtypes": ("fp16",)}, "dtype fp16 needs loss scaling"),
        ({"length": 0}, "length must be at least 1"),
    ],
)
def test_bad_step_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_step(demo("sqa"), **options)  # type: ignore[arg-type]


def test_models_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variant: 'sqaa' is unknown"):
        demo("sqaa")
    with pytest.raises(ValueError, match="preset: 'publishd' is unknown"):
        Models.of_preset("publishd")
    with pytest.raises(ValueError, match="variants must be at least 1"):
        demo()
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} has no config.json"):
        Models.of_sources(tmp_path)


def test_peak_memory_grows_with_the_batch() -> None:
    config = shape("sqa", length=128)
    task = lineup.Task(kind="step", preset="demo", dtype="fp32", batch_size=1, n=128, device=CPU)
    small, large = (step.peak_memory(replace(task, batch_size=b), "sqa", "eager", config, 1) for b in (1, 32))
    if small is None or large is None:
        assert sys.platform != "linux"
        return
    # weights, gradients and two moments; but not what PyTorch holds, which is more than 100 MiB
    assert small < 2 * 16 * cost.parameters(config) + 2**26
    # 31 x 128 tokens more: their activations, at least 30 values of the width in each of 3 layers
    assert large - small > 31 * 128 * 128 * 4 * 30


def test_prefill_lists_every_variant_at_every_length() -> None:
    result = run_prefill(demo("gqa", "xsqa"), peers=("hf-llama",), lengths=(1030, 1024), compile=False, rounds=2)
    assert [row.n for row in result.rows] == [1024] * 4 + [1030] * 4
    ours = [row for row in result.rows if row.implementation == "sqa" and row.n == 1030]
    configs = [shape(row.variant, length=1030, comparable=True) for row in ours]
    flops = [cost.prefill_flops(config, 1030) for config in configs]
    assert [row.limit for row in ours] == [1.0, flops[0] / flops[1]]
    assert [row.share_of_peak for row in ours] == [f / row.median / 1e11 for f, row in zip(flops, ours, strict=True)]
    assert all(row.preprint_ratio is None for row in result.rows)  # another shape than the preprint's
    assert list(demo("SQA", "GQA").configs) == ["sqa", "gqa"]


@pytest.mark.parametrize("run", [run_prefill, run_decode])
def test_models_run_in_the_dtype_and_give_the_logits_of_one_position(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    forward, seen = Transformer.forward, set()

    def noting(self: Transformer, *arguments, **options):  # type: ignore[no-untyped-def]
        found = forward(self, *arguments, **options)
        seen.add((found.logits.shape[1], found.logits.dtype, found.logits.is_inference()))
        return found

    monkeypatch.setattr(Transformer, "forward", noting)
    options = {"compile": False} if run is run_prefill else {"steps": 2}
    run(demo("sqa"), lengths=(16,), dtype="bf16", rounds=1, **options)
    assert seen == {(1, torch.bfloat16, True)}


def test_a_spent_budget_leaves_out_longer_prompts() -> None:
    result = run_prefill(demo("sqa"), lengths=(1024, 4096, 100_000), compile=False, budget=0.2, rounds=2)
    assert all((row.n or 0) < 100_000 for row in result.rows)  # on a slow machine there are none
    assert any("budget was spent before N" in note for note in result.notes)


def test_decoding_starts_from_a_filled_cache_and_says_that_sqa_wins_little() -> None:
    gqa, mqa = run_decode(demo("gqa", "mqa"), lengths=(32,), steps=2, rounds=2).rows
    config = shape("gqa", length=64)
    cache = filled_cache(config, 32, batch_size=1, room=6, dtype=find_dtype("bf16"), device=CPU)
    assert cache.length == 32
    assert gqa.cache_bytes is not None
    assert mqa.cache_bytes is not None
    assert gqa.cache_bytes * 38 == cache.num_bytes * 32
    assert gqa.cache_bytes == 2 * mqa.cache_bytes
    assert gqa.tokens_per_s == 2 / gqa.median
    (two,) = run_decode(demo("gqa"), lengths=(32,), batch_size=2, steps=2, rounds=1).rows
    assert two.cache_bytes == 2 * gqa.cache_bytes


def test_long_work_is_not_silent_and_tables_stay_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is said on standard error, after SILENCE at the latest: here after none."""
    monkeypatch.setattr("sqa.cli.display.SILENCE", 0.0)
    command = "bench step --preset demo --variants gqa --n 16 --batch-size 1 --dtypes fp32 --no-compile --rounds 2"
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code == 0, done.output
    assert "warming gqa (by sqa, eager)" in done.stderr
    assert "timing: turn 3 of at most 3" in done.stderr
    assert "timing" not in done.stdout
