import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from models import NOT_BUILT
from sqa import measure, native
from sqa.dtypes import find_dtype
from sqa.measure.machine import find_device, flags
from sqa.measure.peak import matmul_peak, measure_peak, processor_peak
from sqa.measure.timing import TimeLimit, Timing, synchronize, take_turns
from sqa.records import at_least_one


def test_everybody_is_warm_before_anybody_is_timed_and_rounds_alternate() -> None:
    calls: list[str] = []
    contestants = {name: lambda name=name: calls.append(name) for name in "abc"}  # type: ignore[misc]
    timings = take_turns(contestants, rounds=3, warmup=2)
    assert "".join(calls) == "aabbcc" + "abc" + "cba" + "abc"
    assert [timing.rounds for timing in timings.values()] == [3, 3, 3]


def test_what_happens_between_turns_is_not_timed() -> None:
    timings = take_turns({"a": lambda: None}, rounds=3, on_turn=lambda: time.sleep(0.02))
    assert timings["a"].p80 < 0.02


def test_a_turn_lasts_from_an_idle_device_until_it_is_idle_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device runs behind the program: it still has 5 seconds to do when a turn begins, and 2 when it ends."""
    now, left = 0.0, 0.0

    def wait(device: object) -> None:
        nonlocal now, left
        now, left = now + left, 0.0

    @contextmanager
    def around(name: str) -> Iterator[None]:
        nonlocal now, left
        now, left = now + 10, left + 5
        yield
        now += 10

    def run() -> None:
        nonlocal now, left
        now, left = now + 1, left + 2

    monkeypatch.setattr("sqa.measure.timing.synchronize", wait)
    monkeypatch.setattr("sqa.measure.timing.time.perf_counter", lambda: now)
    assert take_turns({"a": run}, rounds=3, around=around)["a"].to_dict() == {"p20": 3, "median": 3, "p80": 3}


def test_lengths_that_would_take_too_long_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes as many seconds as its length; a length takes at least twice the time of the one before."""
    now, notes = 0.0, []
    monkeypatch.setattr("sqa.measure.timing.time.monotonic", lambda: now)
    done = []
    for n in TimeLimit(seconds=10, start=now).fitting((1, 2, 4, 8), notes):
        done.append(n)
        now += n
    assert done == [1, 2, 4]
    assert notes == ["The budget was spent before N = 8."]
    assert list(TimeLimit().fitting((1, 2, 4, 8), notes)) == [1, 2, 4, 8]


def test_quantiles_are_those_of_the_measurements() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (timing.p20, timing.median, timing.p80, timing.rounds) == (2.0, 3.5, 5.0, 6)
    assert Timing.of([7.0]).to_dict() == {"p20": 7.0, "median": 7.0, "p80": 7.0}


def test_a_spent_budget_ends_after_a_whole_round() -> None:
    calls: list[str] = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.03)

    timings = take_turns({"slow": slow, "fast": lambda: calls.append("fast")}, rounds=50, limit=TimeLimit(seconds=0.1))
    assert 1 <= timings["slow"].rounds < 10
    assert calls.count("slow") == calls.count("fast") == timings["slow"].rounds + 1


def test_a_budget_counts_down_and_none_never_ends() -> None:
    assert 0 < TimeLimit(seconds=5).left <= 5
    assert TimeLimit().left == float("inf")
    with pytest.raises(ValueError, match=r"seconds must be above 0, got 0"):
        TimeLimit(seconds=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: at_least_one("benchmark", rounds=3, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: find_dtype("bf61"), "'bf61' is unknown; did you mean 'bf16'"),
        (lambda: find_device("cuda:99"), "'cuda:99' cannot be used here"),
        (lambda: find_device("tpu?"), "cannot be used here"),
    ],
)
def test_bad_options_are_named(call, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        call()


def test_the_peak_is_flops_of_the_product_over_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e7 < matmul_peak(find_dtype("fp32"), find_device("cpu")) < 1e14

    def timed(contestants: dict[str, Callable[[], object]], **options: object) -> dict[str, Timing]:
        return {name: Timing(p20=4.0, median=5.0, p80=6.0) for name in contestants}

    monkeypatch.setattr("sqa.measure.peak.take_turns", timed)
    assert matmul_peak(find_dtype("fp32"), find_device("cpu")) == 2 * 2048**3 / 4
    # in fp16 a product of that size takes a minute on processors without instructions for it
    assert matmul_peak(find_dtype("fp16"), find_device("cpu")) == 2 * 256**3 / 4


def test_any_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no CUDA: Apple's and Intel's run ahead of the program too."""
    waited: list[str] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(str(device)))
    synchronize("mps")
    synchronize("cpu")
    assert waited == ["mps"]


def test_a_peak_of_instructions_that_the_compiler_lacks_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda source: SimpleNamespace(sqa_peak=Mock(return_value=0)))
    monkeypatch.setattr("sqa.measure.peak.flags", lambda: ["avx512_bf16"])
    assert processor_peak(torch.bfloat16) is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_processors_own_peak_is_no_less_than_a_products(dtype: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak = measure_peak(find_dtype(dtype), find_device("cpu"))
    finally:
        torch.set_num_threads(threads)
    if peak.processor is None:
        assert native.load(Path(measure.__file__).with_name("peak.cpp")) in NOT_BUILT or "amx_bf16" in flags()
        return
    # the probe does not read memory, and takes its best call
    assert peak.product < 1.1 * peak.processor
