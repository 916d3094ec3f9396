"""The benchmarks themselves, at sizes where they take a second and their figures mean nothing."""

import sys
from dataclasses import replace

import pytest
import torch

from sqa import cost
from sqa.attention.kernels import attend
from sqa.bench import gpu, peers, step
from sqa.bench.attention import Setting, layer_config, refusal, run_attention
from sqa.bench.decode import filled_cache, run_decode
from sqa.bench.prefill import run_prefill
from sqa.bench.report import Row
from sqa.bench.step import run_step
from sqa.config import ModelConfig, Rope
from sqa.measure.machine import find_dtype
from sqa.model import Transformer

CPU = torch.device("cpu")
TINY = {"preset": "demo", "rounds": 2}


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("attention", "step"):
        monkeypatch.setattr(f"sqa.bench.{module}.matmul_peak", lambda dtype, device: 1e11)


def shape(variant: str, *, length: int, comparable: bool = False) -> ModelConfig:
    return peers.shapes("demo", (variant,), peers.PEERS if comparable else (), length=length)[variant]


def setting(name: str = "sqa", *, dtype: str = "fp32", mask: str = "causal", kernel: str = "auto") -> Setting:
    config = layer_config(name, d_model=128, num_heads=8)
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
        variants=("gqa", "sqa"), lengths=(32, 64), d_model=64, num_heads=4, rounds=1, kernels=("math", "cudnn", "flash")
    )
    notes = [row for row in result.rows if "note" in row]
    assert [(row["kernel"], row["n"]) for row in notes] == [("sdpa:cudnn", 32)] * 4
    assert {row["kernel"] for row in result.rows if "seconds" in row} == {"sdpa:math", "sdpa:flash"}


def test_scores_and_flops_are_counted_under_the_mask() -> None:
    causal = setting()
    assert causal.row(1e9)["flops"] == 3 * 2 * cost.attention_flops(causal.config, 100)
    assert replace(causal, what="forward").row(1e9)["limit_seconds"] * 1e9 == 2 * cost.attention_flops(
        causal.config, 100
    )
    packed = replace(setting(mask="documents"), n=101)  # 50, 50 and 1
    ids = packed.documents
    assert ids is not None
    same = ids[:, :, None] == ids[:, None, :]
    assert packed.scores == 4 * int(same.tril().sum())


def test_attention_reports_rates_shares_and_ratios() -> None:
    result = run_attention(
        variants=("gqa", "2/1x16"), lengths=(64, 32), d_model=64, num_heads=4, rounds=2, dtypes=("fp32",)
    )
    assert [row["n"] for row in result.rows] == [32] * 4 + [64] * 4
    gqa, ours = (row for row in result.rows if row["n"] == 64 and row["what"] == "forward")
    assert (ours["num_query_heads"], ours["num_kv_heads"], ours["head_dim"]) == (2, 1, 16)
    assert ours["ratio"] == gqa["seconds"]["median"] / ours["seconds"]["median"]
    assert ours["limit"] == 2.0
    assert ours["share_of_limit"] == ours["ratio"] / 2
    assert ours["flops_per_s"] == ours["flops"] / ours["seconds"]["median"]
    assert ours["share_of_peak"] == ours["flops_per_s"] / 1e11


def test_a_window_runs_beside_full_attention_and_the_layer_takes_part() -> None:
    result = run_attention(
        variants=("gqa", "sqa"),
        lengths=(256,),
        d_model=64,
        num_heads=4,
        rounds=1,
        dtypes=("fp32",),
        mask="window",
        window=16,
    )
    windowed = [row for row in result.rows if row["mask"] == "window"]
    assert {row["what"] for row in windowed} == {"forward", "forward+backward", "layer step"}
    assert all(row["kernel"] == "fused" and row["ratio_to_full"] > 0 for row in windowed)
    full = next(row for row in result.rows if row["mask"] == "causal" and row["what"] == "layer step")
    layer = next(row for row in windowed if row["what"] == "layer step")
    assert layer["ratio_to_full"] == full["seconds"]["median"] / layer["seconds"]["median"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "window2"}, "mask: 'window2' is unknown; did you mean 'window'"),
        ({"kernels": ("flsh",)}, "kernel: 'flsh' is unknown; did you mean 'flash'"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"lengths": ()}, "lengths must be at least 1"),
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
    own, llama = peers.build(peers.OURS, config), peers.build("hf-llama", config)
    assert "logits differ" in str(peers.difference(own, llama, ids, labels))
    llama.module.load_state_dict(own.module.state_dict())
    assert peers.difference(own, llama, ids, labels) is None
    # the same weights under another convention of rotary pairs: a small error, and still one
    layer = config.layers[0].replace(rope=Rope(interleaved=True))
    other = peers.build(peers.OURS, config.replace(attention=layer))
    other.module.load_state_dict(own.module.state_dict())
    assert "logits differ" in str(peers.difference(other, llama, ids, labels))
    # a loss over other tokens
    shifted = replace(llama, loss=lambda module, ids, labels: module(ids, labels=labels).loss)
    assert "loss differ" in str(peers.difference(own, shifted, ids, labels))


def test_steps_of_peers_are_timed_eager_and_compared() -> None:
    result = run_step(
        variants=("gqa", "sqa"), peers=("hf-llama", "x-transformers"), dtypes=("fp32",), batch_size=1, length=16,
        compile=False, **TINY,
    )  # fmt: skip
    rows = {(row["implementation"], row["variant"]): row for row in result.rows}
    assert len(rows) == len(result.rows) == 6
    assert rows["hf-llama", "sqa"]["checked"] is True
    assert rows["x-transformers", "sqa"]["checked"] is False
    fastest = min(rows[name, "sqa"]["seconds"]["median"] for name in peers.PEERS)
    ours = rows["sqa", "sqa"]
    assert ours["ratio_to_peer"] == fastest / ours["seconds"]["median"]
    assert ours["ratio"] == rows["sqa", "gqa"]["seconds"]["median"] / ours["seconds"]["median"]
    assert ours["tokens_per_s"] == 16 / ours["seconds"]["median"]
    assert rows["hf-llama", "gqa"]["tried"] == {"eager": rows["hf-llama", "gqa"]["seconds"]["median"]}


def test_a_step_changes_the_weights() -> None:
    config = shape("sqa", length=16)
    own = peers.build(peers.OURS, config)
    before = own.module.state_dict()["lm_head.weight"].clone()
    step.training_step(own, own.module, torch.bfloat16, torch.randint(config.vocab_size, (2, 1, 16)))()
    assert not torch.equal(before, own.module.state_dict()["lm_head.weight"])


def test_ours_runs_compiled_and_peers_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(Transformer, "compile", lambda self: done.append("ours"))
    monkeypatch.setattr(torch, "compile", lambda module: done.append("peer") or module)
    configs = {"sqa": shape("sqa", length=16, comparable=True)}
    runners, _ = peers.line_up(configs, ("hf-llama",), compile=True, device=CPU)
    assert [(r.implementation, r.setting) for r in runners] == [
        ("sqa", "compiled"), ("hf-llama", "eager"), ("hf-llama", "compiled")
    ]  # fmt: skip
    assert done == ["ours", "peer"]


def test_memory_is_a_table_of_its_own() -> None:
    options = {"dtypes": ("fp32",), "batch_size": 1, "length": 8, "compile": False, "memory": True}
    result = run_step(variants=("sqa",), **options, **TINY)  # type: ignore[arg-type]
    assert result.kinds == (["step", "step memory"] if sys.platform == "linux" else ["step"])


def test_the_better_setting_counts() -> None:
    rows: list[Row] = [
        {"implementation": "p", "variant": "v", "setting": "eager", "seconds": {"median": 2.0}},
        {"implementation": "p", "variant": "v", "setting": "compiled", "seconds": {"median": 1.0}},
        {"implementation": "q", "variant": "v", "setting": "eager", "seconds": {"median": 3.0}},
        {"implementation": "q", "variant": "v", "setting": "compiled", "note": "no compiler"},
        {"implementation": "r", "variant": "v", "note": "not installed"},
    ]
    best = peers.best_settings(rows)
    assert [row.get("setting") for row in best] == ["compiled", "eager", None]
    assert best[0]["tried"] == {"eager": 2.0, "compiled": 1.0}


@pytest.mark.parametrize(("name", "package"), [("hf-llama", "transformers"), ("x-transformers", "x_transformers")])
def test_a_missing_peer_is_a_line_not_an_error(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    result = run_step(variants=("sqa",), peers=(name,), dtypes=("fp32",), batch_size=1, length=8, compile=False, **TINY)
    ours, missing = result.rows
    assert "seconds" in ours
    assert missing["note"].startswith("not installed; run in a clone of the repository: pip install")
    assert "seconds" not in missing


def test_a_shape_that_a_peer_cannot_have_is_a_line_too() -> None:
    _, absent = peers.line_up({"rsqa": shape("rsqa", length=8, comparable=True)}, peers.PEERS,
                              compile=False, device=CPU)  # fmt: skip
    assert all("cannot have 2 query and 4 KV heads" in note for note in absent.values())
    assert len(absent) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ("hf-lama",)}, "peer: 'hf-lama' is unknown; did you mean 'hf-llama'"),
        ({"dtypes": ("fp16",)}, "dtype fp16 needs loss scaling"),
        ({"length": 0}, "length must be at least 1"),
        ({"variants": ("sqaa",)}, "variant: 'sqaa' is unknown"),
        ({"preset": "publishd"}, "preset: 'publishd' is unknown"),
    ],
)
def test_bad_step_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_step(**options)  # type: ignore[arg-type]


def test_peak_memory_grows_with_the_batch() -> None:
    config = shape("sqa", length=128)
    row: Row = {"implementation": "sqa", "setting": "eager", "dtype": "fp32", "n": 128}
    small, large = (step.peak_memory(row | {"batch_size": b}, config, "cpu", 1) for b in (1, 32))
    if small is None or large is None:
        assert sys.platform != "linux"
        return
    # 31 x 128 tokens more: their activations, at least 30 values of the width in each of 3 layers
    assert large - small > 31 * 128 * 128 * 4 * 30


def test_prefill_lists_every_variant_at_every_length() -> None:
    result = run_prefill(variants=("gqa", "xsqa"), peers=("hf-llama",), max_n=1030, compile=False, **TINY)
    assert [row["n"] for row in result.rows] == [1024] * 4 + [1030] * 4
    ours = [row for row in result.rows if row["implementation"] == "sqa" and row["n"] == 1030]
    configs = [shape(row["variant"], length=1030, comparable=True) for row in ours]
    flops = [cost.prefill_flops(config, 1030) for config in configs]
    assert [row["limit"] for row in ours] == [1.0, flops[0] / flops[1]]
    assert all("preprint_ratio" not in row for row in result.rows)  # another shape than the preprint's


def test_a_spent_budget_leaves_out_longer_prompts() -> None:
    result = run_prefill(variants=("sqa",), max_n=100_000, compile=False, budget=0.2, **TINY)
    assert max(row["n"] for row in result.rows) < 100_000
    assert any("budget was spent before N" in note for note in result.header["notes"])


def test_decoding_starts_from_a_filled_cache_and_says_that_sqa_wins_little() -> None:
    result = run_decode(variants=("gqa", "mqa"), lengths=(32,), steps=2, **TINY)
    gqa, mqa = result.rows
    assert "SQA wins little here" in result.header["notes"][0]
    config = shape("gqa", length=64)
    cache = filled_cache(config, 32, batch_size=1, room=6, dtype=find_dtype("bf16"), device=CPU)
    assert cache.length == 32
    assert gqa["cache_bytes"] * 38 == cache.num_bytes * 32
    assert gqa["cache_bytes"] == 2 * mqa["cache_bytes"]
    assert gqa["tokens_per_s"] == 2 / gqa["seconds"]["median"]


def test_everything_on_one_machine_and_a_part_that_fails_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(**options: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(gpu, "run_prefill", broken)
    seconds: list[float] = []

    def compare(left: float) -> list[Row]:
        seconds.append(left)
        return [{"kind": "compare", "variant": "sqa", "loss": 1.0, "note": "tiny"}]

    result = gpu.run_all(device="cpu", size="tiny", budget=60, compare=compare)
    assert result.kinds == ["attention", "step", "decode", "compare"]
    assert {row["kernel"] for row in result.rows if row["kind"] == "attention"} == {"sdpa:flash", "sdpa:math"}
    assert {row["batch_size"] for row in result.rows if row["kind"] == "step"} == {1, 2}
    assert "prefill failed: KeyError: 'bug'" in result.header["notes"]
    assert len(seconds) == 1
    assert "Traceback" in caplog.text


def test_nothing_starts_once_the_budget_is_spent() -> None:
    result = gpu.run_all(device="cpu", size="tiny", budget=1e-9)
    assert result.rows == []
    assert "budget was spent before: attention, head_dim 16" in result.header["notes"][0]
    with pytest.raises(ValueError, match="size: 'tin' is unknown; did you mean 'tiny'"):
        gpu.run_all(size="tin")
