"""What may reach fused.cpp, which takes pointers: every tensor is checked first against what will be read."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models import NOT_BUILT
from sqa.attention import fused
from sqa.attention.fused import fused_backward, fused_forward, fused_need

B, T, HQ, HKV, D = 2, 9, 4, 2, 16
FUZZ = Path(__file__).resolve().parents[1] / "fuzz"


@pytest.fixture(autouse=True)
def _compiler() -> None:
    if fused.lacks() in NOT_BUILT:
        pytest.skip(f"data: {fused.lacks()}")


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


@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@pytest.mark.parametrize("size", [2e30, 1e37])
def test_scores_far_below_zero(size: float, dtype: torch.dtype) -> None:
    """Scores around -size, of which key 70 has the highest: none of them is taken for a hidden key."""
    length = 80
    q = torch.zeros(1, length, 1, D, dtype=dtype)
    q[..., 0] = -1
    k = torch.zeros(1, length, 1, D, dtype=dtype)
    k[..., 0] = size
    k[:, 70, :, 0] = size / 2
    v = torch.arange(length, dtype=dtype)[None, :, None, None].expand(1, -1, 1, D).contiguous()
    low = torch.zeros(1, length, dtype=torch.int32)
    high = (torch.arange(length, dtype=torch.int32) + 1)[None]
    tensors = {"q": q, "k": k, "v": v, "low": low, "high": high, "grad": torch.ones_like(q)}
    out, logsumexp, *grads = run(tensors)
    seen = torch.ones(length, length).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float()[:, :, 0], k.float()[:, :, 0], v.float()[:, :, 0], attn_mask=seen, scale=0.25
    )
    torch.testing.assert_close(out.float()[:, :, 0], expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
    assert (out[:, 70:] == 70).all()
    assert logsumexp.isfinite().all()
    assert (grads[2][:, 70] == 10).all()  # each of the ten queries that see key 70 sees nothing else


def many_threads_and_one(tensors: dict[str, Tensor], *, backward: bool) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            forward = fused_forward(*(tensors[name] for name in ("q", "k", "v", "low", "high")), 0.25)
            results.append(run(tensors) if backward else forward)
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (12, 2)], ids=str)
def test_the_same_bits_for_any_number_of_threads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Documents in one row and a window in the other; heads that share keys are split between tasks."""
    length, generator = 700, torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, length, heads[0], D, generator=generator).to(dtype) for _ in range(2))
    k, v = (torch.randn(2, length, heads[1], D, generator=generator).to(dtype) for _ in range(2))
    at = torch.arange(length, dtype=torch.int32)
    low, high = torch.stack((at // 150 * 150, (at - 99).clamp(0))), torch.stack((at // 150 * 150 + 150, at + 1))
    tensors = {"q": q, "k": k, "v": v, "low": low, "high": high.clamp(max=length), "grad": grad}
    many_threads_and_one(tensors, backward=True)
    few = {name: tensors[name][:, -3:] for name in ("q", "low", "high")}  # at the end of a cache: ranges of keys
    many_threads_and_one(tensors | few, backward=False)


SHAPES = {  # (B, Hq, Hkv, D) of one row of a model at the length that the bars speak of
    "gqa": (1, 16, 4, 16), "xsqa": (1, 4, 4, 16), "mha": (1, 16, 16, 64), "mqa": (1, 16, 1, 128), "sqa": (4, 8, 4, 64),
}  # fmt: skip


@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [4096, 32768])
def test_there_are_four_tasks_for_each_of_64_threads(length: int, name: str, dtype: torch.dtype) -> None:
    batch, heads, kv_heads, head_dim = SHAPES[name]
    tokens, keys = (batch, length, heads, head_dim), (batch, length, kv_heads, head_dim)
    assert fused_need(dtype, tokens, keys, backward=True, threads=64).tasks >= 4 * 64
    if name != "mqa":  # one KV head of 4,096 keys has but 64 tiles
        one = (batch, 1, heads, head_dim)
        assert fused_need(dtype, one, keys, backward=False, threads=64).tasks >= 4 * 64
        assert fused_need(dtype, tokens, keys, backward=False, threads=64).tasks >= 4 * 64


@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_a_thread_does_not_grow_with_the_length(backward: bool, name: str, dtype: torch.dtype) -> None:
    batch, heads, kv_heads, head_dim = SHAPES[name]

    def of_63_threads(length: int) -> int:
        shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads)]
        one, many = (fused_need(dtype, *shapes, backward=backward, threads=n).scratch_bytes for n in (64, 1))
        return one - many

    assert of_63_threads(131072) == of_63_threads(1 << 20) < 63 << 20
    whole = fused_need(dtype, (1, 131072, 16, 128), (1, 131072, 4, 128), backward=True, threads=64).scratch_bytes
    assert whole < 5 * 131072 * 16 * 128 + (64 << 20)  # fp32 sums of the queries' gradients and little else


def test_no_memory_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs()
    monkeypatch.setattr(fused, "fused_need", lambda *_, **__: fused.Need(1, 1 << 60))
    with pytest.raises(MemoryError, match="fused attention: no memory for"):
        run(tensors)


def test_no_memory_is_an_exception_in_a_process_that_has_none() -> None:
    """A limit of the system, as a container sets it: the first query of 2^21 already has no room for its output."""
    script = """if True:
        import resource, torch
        from sqa.attention.fused import fused_forward
        q = torch.ones(1, 1, 1, 128)
        one = torch.ones(1, 1, dtype=torch.int32)
        fused_forward(q, q, q, one - 1, one, 1.0)
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 28),) * 2)
        try:
            fused_forward(*[q.expand(1, 1 << 21, 1, 128)] * 3, one.expand(1, 1 << 21) - 1, one.expand(1, 1 << 21), 1.0)
        except MemoryError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("fused attention: no memory for"), result.stdout + result.stderr


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


@pytest.mark.slow
def test_the_fuzzer_of_the_kernel_finds_nothing_in_a_few_cases() -> None:
    command = [sys.executable, str(FUZZ / "kernel.py"), "--seed", "900", "--cases", "10"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
