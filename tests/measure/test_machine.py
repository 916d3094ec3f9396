"""What is known of the machine."""

import pytest
import torch

from sqa.errors import InputError
from sqa.measure import machine
from sqa.measure.machine import cpu_threads, find_device, slow_dtype


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        (["avx2"], True),
        (["avx2", "avx512f"], True),
        (["avx2", "avx512f", "avx512_bf16"], False),
        (["avx2", "avx512f", "amx_bf16"], False),
        ([], False),  # not known: no x86, or no /proc/cpuinfo
    ],
)
def test_bfloat16_is_called_slow_where_the_processor_lacks_its_products(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], slow: bool
) -> None:
    monkeypatch.setattr(machine, "flags", lambda: flags)
    assert (slow_dtype("bfloat16", "cpu") is not None) == slow
    assert slow_dtype("float32", "cpu") is None
    assert slow_dtype("bfloat16", "cuda") is None


def test_a_device_that_computes_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="'meta' computes nothing"):
        find_device("meta")


def test_the_number_of_threads_is_given_back() -> None:
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with cpu_threads(0):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
