"""What may reach fused.cpp, which takes pointers: every tensor is checked first against what will be read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sqa.attention import fused
from sqa.attention.fused import fused_backward, fused_forward
from sqa.attention.kernels import attend
from sqa.attention.masks import Mask

B, T, HQ, HKV, D = 2, 9, 4, 2, 16
FUZZ = Path(__file__).resolve().parents[1] / "fuzz"


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if fused.lacks() == "no C++ compiler":
        pytest.skip("data: no C++ compiler")


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What both take: queries that see all keys up to their own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, T, heads, D, generator=generator).to(dtype) for heads in (HQ, HKV, HKV, HQ))
    low = torch.zeros(B, T, dtype=torch.int32)
    high = (torch.arange(T, dtype=torch.int32) + 1).expand(B, T)
    return {"q": q, "k": k, "v": v, "low": low, "high": high, "grad": grad}


def run(tensors: dict[str, Tensor], **saved: Tensor) -> list[Tensor]:
    """Output, log-sum-exp and gradients; `saved` replaces what the backward is given of the forward's results."""
    q, k, v, low, high, grad = tensors.values()
    out, logsumexp = fused_forward(q, k, v, low, high, 0.25)
    saved = {"out": out, "logsumexp": logsumexp} | saved
    return [out, logsumexp, *fused_backward(grad, q, k, v, saved["out"], saved["logsumexp"], low, high, 0.25)]


def without_memory() -> Tensor:
    x = torch.randn(B, T, HKV, D)
    x.untyped_storage().resize_(0)
    return x


BAD = {
    "v-bf16": {"v": lambda: torch.zeros(B, T, HKV, D, dtype=torch.bfloat16)},
    "k-bf16": {"k": lambda: torch.zeros(B, T, HKV, D, dtype=torch.bfloat16)},
    "q-bf16": {"q": lambda: torch.zeros(B, T, HQ, D, dtype=torch.bfloat16)},
    "q-fp64": {"q": lambda: torch.zeros(B, T, HQ, D, dtype=torch.float64)},
    "grad-bf16": {"grad": lambda: torch.zeros(B, T, HQ, D, dtype=torch.bfloat16)},
    "grad-short": {"grad": lambda: torch.zeros(B, T - 1, HQ, D)},
    "q-meta": {"q": lambda: torch.zeros(B, T, HQ, D, device="meta")},
    "v-meta": {"v": lambda: torch.zeros(B, T, HKV, D, device="meta")},
    "v-sparse": {"v": lambda: torch.zeros(B, T, HKV, D).to_sparse()},
    "v-short": {"v": lambda: torch.zeros(B, T - 1, HKV, D)},
    "v-narrow": {"v": lambda: torch.zeros(B, T, HKV, D // 2)},
    "v-batch": {"v": lambda: torch.zeros(B - 1, T, HKV, D)},
    "v-without-memory": {"v": without_memory},
    "k-without-axis": {"k": lambda: torch.zeros(B, T, HKV * D)},
    "q-without-axis": {"q": lambda: torch.zeros(B, T, HQ * D)},
    "head-dim": {"q": lambda: torch.zeros(B, T, HQ, 24), "k": lambda: torch.zeros(B, T, HKV, 24)},
    "no-kv-heads": {"k": lambda: torch.zeros(B, T, 0, D), "v": lambda: torch.zeros(B, T, 0, D)},
    "no-query-heads": {"q": lambda: torch.zeros(B, T, 0, D)},
    "odd-heads": {"q": lambda: torch.zeros(B, T, 3, D)},
    "more-keys-in-backward": {"k": lambda: torch.zeros(B, 20, HKV, D), "v": lambda: torch.zeros(B, 20, HKV, D)},
    "low-int64": {"low": lambda: torch.zeros(B, T, dtype=torch.int64)},
    "low-one-row": {"low": lambda: torch.zeros(1, T, dtype=torch.int32)},
    "high-short": {"high": lambda: torch.zeros(B, T - 1, dtype=torch.int32)},
    "low-negative": {"low": lambda: torch.full((B, T), -1000, dtype=torch.int32)},
    "high-past-the-keys": {"high": lambda: torch.full((B, T), 1000, dtype=torch.int32)},
    "out-bf16": {"out": lambda: torch.zeros(B, T, HQ, D, dtype=torch.bfloat16)},
    "out-short": {"out": lambda: torch.zeros(B, 1, HQ, D)},
    "logsumexp-bf16": {"logsumexp": lambda: torch.zeros(B, T, HQ, dtype=torch.bfloat16)},
    "logsumexp-transposed": {"logsumexp": lambda: torch.zeros(B, HQ, T)},
}


@pytest.mark.parametrize("name", BAD)
def test_nothing_unchecked_reaches_native_code(name: str) -> None:
    made = {key: make() for key, make in BAD[name].items()}
    saved = {key: made.pop(key) for key in ("out", "logsumexp") if key in made}
    with pytest.raises(ValueError, match="fused attention: "):
        run(inputs() | made, **saved)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("kernel", ["fused", "auto"])
def test_mixed_dtypes_give_the_right_numbers_or_an_error(kernel: str, name: str) -> None:
    """One of the three in bf16, as a rotation in fp32 under autocast leaves them: they were read as if all were q's."""
    qkv = {key: inputs()[key] for key in "qkv"}
    expected = attend(*qkv.values(), Mask(), kernel="reference")
    qkv[name] = qkv[name].bfloat16()
    try:
        got = attend(*qkv.values(), Mask(), kernel=kernel)
    except ValueError:
        return
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "grad", "low", "high"])
def test_any_strides_and_offsets(name: str, dtype: torch.dtype) -> None:
    """Views whose rows have gaps, run backwards through memory axes, or are one row again and again."""
    tensors = inputs(dtype)
    x = tensors[name]
    with_gaps = torch.zeros(*x.shape, 3, dtype=x.dtype)[..., 1].copy_(x)
    moved = torch.zeros(x.numel() + 7, dtype=x.dtype)[7:].view(x.shape).copy_(x)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = run(tensors)
    for view in (with_gaps, moved, turned):
        assert all(map(torch.equal, run(tensors | {name: view}), expected))
    same = x[:1, :1].expand_as(x)
    assert all(map(torch.equal, run(tensors | {name: same}), run(tensors | {name: same.contiguous()})))


def test_a_lazily_negated_view_is_not_read_as_it_lies() -> None:
    tensors = inputs()
    x = torch.complex(tensors["v"], tensors["v"]).conj().imag
    assert x.is_neg()
    assert all(map(torch.equal, run(tensors | {"v": x}), run(tensors | {"v": -tensors["v"]})))


@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "length", "keys"), [(0, T, T), (B, 0, 0), (B, 0, 5), (B, T, 0), (0, 0, 0)])
def test_sizes_of_zero(batch: int, length: int, keys: int, dtype: torch.dtype) -> None:
    q, k = torch.ones(batch, length, HQ, D, dtype=dtype), torch.ones(batch, keys, HKV, D, dtype=dtype)
    low = torch.zeros(batch, length, dtype=torch.int32)
    out, logsumexp = fused_forward(q, k, k, low, low, 1.0)
    assert out.shape == q.shape
    assert not out.any()
    assert (logsumexp == -torch.inf).all()
    if length == keys:
        grads = fused_backward(q, q, k, k, out, logsumexp, low, low, 1.0)
        assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_address_sanitizer_finds_nothing_at_the_boundary() -> None:
    """The same command as `make asan`, for fewer cases: one process, its own build of fused.cpp."""
    command = [sys.executable, str(FUZZ / "boundary.py"), "--sanitize", "--cases", "400"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "no address sanitizer" in result.stderr:
        pytest.skip("data: no g++ with an address sanitizer")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "400 cases" in result.stdout
