"""Everything on one machine: a part that fails, or a budget that is spent, does not take the others along."""

import pytest

from sqa.bench.measurement import Measurement
from sqa.experiments import everything
from sqa.measure.peak import Peak
from sqa.progress import Display, Interrupted


@pytest.fixture(autouse=True)
def small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("attention", "step", "prefill"):
        monkeypatch.setattr(f"sqa.bench.{module}.measure_peak", lambda dtype, device: Peak(1e11, None))


def test_a_part_that_fails_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("bug")

    seconds: list[float] = []

    def trained(display: object, plan: object, left: float) -> list[Measurement]:
        seconds.append(left)
        return [Measurement(kind="compare", variant="sqa", loss=1.0, note="tiny")]

    monkeypatch.setattr(everything, "run_prefill", broken)
    monkeypatch.setattr(everything, "_trained", trained)
    result = everything.measure_everything(Display(), device="cpu", size="tiny", budget=60)
    assert result.kinds == ["attention", "step", "decode", "compare"]
    assert {row.kernel for row in result.rows if row.kind == "attention"} == {"sdpa:flash", "sdpa:math"}
    assert {row.batch_size for row in result.rows if row.kind == "step"} == {1, 2}
    assert "prefill failed: KeyError: 'bug'" in result.notes
    assert len(seconds) == 1
    assert "Traceback" in caplog.text


def test_a_comparison_that_fails_leaves_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    error: Exception = RuntimeError("CUDA out of memory")

    def failing(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(everything, "_parts", lambda device, full: {})
    monkeypatch.setattr(everything, "compare", failing)
    result = everything.measure_everything(Display(), device="cpu", size="tiny")
    assert result.notes == ("comparison failed: RuntimeError: CUDA out of memory",)
    error = Interrupted("stopped")
    with pytest.raises(Interrupted):
        everything.measure_everything(Display(), device="cpu", size="tiny")
    with pytest.raises(ValueError, match="plan: device must be one of 'auto', 'cpu', 'cuda', got 'cpu:0'"):
        everything.measure_everything(Display(), device="cpu:0", size="tiny")


def test_nothing_starts_once_the_budget_is_spent() -> None:
    result = everything.measure_everything(Display(), device="cpu", size="tiny", budget=1e-9)
    assert result.rows == ()
    assert "budget was spent before: attention, head_dim 16" in result.notes[0]
    with pytest.raises(ValueError, match="size: 'tin' is unknown; did you mean 'tiny'"):
        everything.measure_everything(Display(), size="tin")
