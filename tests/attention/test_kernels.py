"""Every kernel against the fp32 oracle, forward and gradients; the choice of a kernel and its reasons."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import BATCH, MASKS, by_rule, left_padding, make_mask, seen
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import NOT_BUILT
from sqa import AttentionConfig, InputError, variant
from sqa.attention import blocks, fused, kernels, operators, pytorch
from sqa.attention.call import Call
from sqa.attention.kernels import KERNELS, attend, explain, resolve
from sqa.attention.masks import CachedKeys, Mask
from sqa.attention.reference import reference_attention
from sqa.variants import VARIANTS

HEADS = {name: variant(name, d_model=128, num_heads=8) for name in VARIANTS}
BLOCK_MASKS = tuple(kind for kind in MASKS if "padding" not in kind)
FUSED_MASKS = tuple(kind for kind in MASKS if "sinks" not in kind)
GRID = [
    *(("sdpa", kind) for kind in MASKS),
    *(("blocks", kind) for kind in BLOCK_MASKS),
    *(("fused", kind) for kind in FUSED_MASKS),
]
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}

grid = pytest.mark.parametrize(("kernel", "kind"), GRID, ids=[f"{k}-{m}" for k, m in GRID])
lengths = pytest.mark.parametrize("length", [1, 7, 63, 128], ids=lambda n: f"T{n}")


def draw(config: AttentionConfig, length: int, num_keys: int | None = None, dtype=torch.float32):
    """q, k, v that want gradients, and a gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    keys = length if num_keys is None else num_keys
    shapes = [
        (BATCH, length, config.num_query_heads, config.head_dim),
        (BATCH, keys, config.num_kv_heads, config.head_dim),
        (BATCH, keys, config.num_kv_heads, config.head_dim),
        (BATCH, length, config.num_output_heads, config.head_dim),
    ]
    *qkv, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in qkv], grad


def with_gradients(out: Tensor, qkv: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(out, qkv, grad.to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def oracle(qkv: list[Tensor], grad: Tensor, seen: Tensor, softcap: float | None = None) -> dict[str, Tensor]:
    """The reference in fp32; seen (B, Tq, Tk) comes from the rule, not from the code under test."""
    q, k, v = exact = [x.detach().float().requires_grad_() for x in qkv]
    q = q.repeat_interleave(max(1, k.shape[2] // q.shape[2]), dim=2)
    out = reference_attention(q, k, v, seen[:, None], scale=q.shape[3] ** -0.5, softcap=softcap)
    return with_gradients(out, exact, grad.float())


def plain(qkv: list[Tensor], grad: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """What anybody would write in PyTorch, in the precision of the inputs."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    heads = max(q.shape[1], k.shape[1])
    q, k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k, v))
    seen = seen[:, None]
    scores = (q @ k.transpose(2, 3)) * q.shape[3] ** -0.5
    weights = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) * seen
    return with_gradients((weights @ v).transpose(1, 2), qkv, grad)


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def needs(kernel: str) -> None:
    """Skip where there is no compiler for our own kernel."""
    if kernel == "fused" and fused.lacks() in NOT_BUILT:
        pytest.skip(f"data: {fused.lacks()}")


@lengths
@grid
@pytest.mark.parametrize("name", HEADS)
def test_fp32(name: str, kernel: str, kind: str, length: int) -> None:
    needs(kernel)
    mask = make_mask(kind, length)
    qkv, grad = draw(HEADS[name], length)
    got = with_gradients(attend(*qkv, mask, kernel=kernel), qkv, grad)
    assert_all_close(got, oracle(qkv, grad, seen(kind, length)))


@lengths
@grid
@pytest.mark.parametrize("name", ["gqa", "xsqa", "rsqa"])
@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_is_no_worse_than_plain(dtype: str, name: str, kernel: str, kind: str, length: int) -> None:
    if (kernel, dtype) == ("fused", "fp16"):
        with pytest.raises(ValueError, match="fp32 and bf16 only"):
            resolve(case(dtype=torch.float16), kernel)
        return
    needs(kernel)
    mask = make_mask(kind, length)
    qkv, grad = draw(HEADS[name], length, dtype=LOW[dtype])
    exact, simple = (f(qkv, grad, seen(kind, length)) for f in (oracle, plain))
    got = with_gradients(attend(*qkv, mask, kernel=kernel), qkv, grad)
    for key, value in exact.items():
        assert got[key].dtype == LOW[dtype]
        error, allowed = ((x[key].float() - value).norm() for x in (got, simple))
        # with one key alone dq and dk are 0: plain PyTorch finds that exactly, others as a difference of fp32 sums
        rounding = torch.finfo(torch.float32).eps * HEADS[name].head_dim * grad.float().norm()
        assert error <= 2 * allowed + rounding, f"{key}: error {error:.2e}, plain PyTorch {allowed:.2e}"


@pytest.mark.parametrize("kind", ["causal+window", "causal+window+sinks", "causal+window+sinks+documents"])
@pytest.mark.parametrize("window", [1, 20, 64, 100, 200])
def test_blocks_over_several_query_blocks(window: int, kind: str) -> None:
    length = 4 * blocks.QUERY_BLOCK + 9
    plan = make_mask(kind, length)
    ids = None if plan.document_ids is None else torch.stack([torch.arange(length) // 150, torch.arange(length) // 7])
    mask = Mask(window=window, num_sink_tokens=plan.num_sink_tokens and 30, document_ids=ids)
    qkv, grad = draw(HEADS["sqa"], length)
    got = with_gradients(attend(*qkv, mask, kernel="blocks"), qkv, grad)
    expected = with_gradients(attend(*qkv, mask, kernel="reference"), qkv, grad)
    assert_all_close(got, expected)


@pytest.mark.parametrize("head_dim", fused.HEAD_DIMS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (10, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 64, 129, 530])
@pytest.mark.parametrize("window", [None, 1, 90])
def test_fused_over_several_tiles(head_dim: int, heads: tuple[int, int], length: int, window: int | None) -> None:
    """Tiles of 64 keys and blocks of 64 to 512 queries, whole, partial and skipped; more than eight heads a KV head."""
    needs("fused")
    config = AttentionConfig(
        d_model=640, num_heads=10, num_query_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim
    )
    qkv, grad = draw(config, length)
    mask = Mask(window=window)
    got = with_gradients(attend(*qkv, mask, kernel="fused"), qkv, grad)
    assert_all_close(got, with_gradients(attend(*qkv, mask, kernel="reference"), qkv, grad))


@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-ways"])
def test_fused_over_several_tiles_of_any_mask(
    causal: bool, window: int | None, documents: bool, heads: tuple[int, int]
) -> None:
    """Documents that end within a tile, at its edge and several tiles on; whole tiles that nobody sees."""
    needs("fused")
    length = 391
    config = AttentionConfig(d_model=64, num_heads=4, num_query_heads=heads[0], num_kv_heads=heads[1], head_dim=16)
    lengths = torch.tensor([[1, 63, 64, 17, 200, 46], [130, 5, 5, 5, 245, 1]])
    ids = torch.stack([torch.repeat_interleave(torch.arange(6), row) for row in lengths]) if documents else None
    mask = Mask(causal=causal, window=window if causal else None, document_ids=ids)
    qkv, grad = draw(config, length)
    got = with_gradients(attend(*qkv, mask, kernel="fused"), qkv, grad)
    assert_all_close(got, with_gradients(attend(*qkv, mask, kernel="reference"), qkv, grad))


@pytest.mark.parametrize("heads", [(4, 2), (10, 1)], ids=str)
@pytest.mark.parametrize("head_dim", fused.HEAD_DIMS)
def test_fused_bf16_over_several_tiles(head_dim: int, heads: tuple[int, int]) -> None:
    needs("fused")
    config = AttentionConfig(
        d_model=640, num_heads=10, num_query_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim
    )
    qkv, grad = draw(config, 300, dtype=torch.bfloat16)
    causal = torch.ones(BATCH, 300, 300).tril() > 0
    exact, simple = (f(qkv, grad, causal) for f in (oracle, plain))
    got = with_gradients(attend(*qkv, Mask(), kernel="fused"), qkv, grad)
    for name, value in exact.items():
        error, allowed = ((x[name].float() - value).norm() for x in (got, simple))
        assert error <= allowed, f"{name}: error {error:.2e}, plain PyTorch {allowed:.2e}"


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (10, 1)], ids=str)
@pytest.mark.parametrize("num_queries", [1, 3, 70])
@pytest.mark.parametrize("window", [None, 1, 90, 1000])
@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
def test_fused_at_the_end_of_a_cache(
    dtype: torch.dtype, window: int | None, num_queries: int, heads: tuple[int, int]
) -> None:
    """Fewer queries than keys, the keys in a longer tensor; the queries are those at the end of a whole pass."""
    needs("fused")
    config = AttentionConfig(d_model=640, num_heads=10, num_query_heads=heads[0], num_kv_heads=heads[1], head_dim=16)
    length = 275
    qkv, grad = draw(config, length + 20, dtype=dtype)
    q, k, v = (x.detach()[:, :length] for x in qkv)
    positions = torch.arange(length)
    keys = CachedKeys(
        query_positions=positions[-num_queries:], key_positions=positions, near=torch.ones(1, length, dtype=torch.bool),
        far=torch.zeros(1, length, dtype=torch.bool), holes=False,
    )  # fmt: skip
    got = attend(q[:, -num_queries:], k, v, Mask(window=window, cached=keys), kernel="fused")
    distance = positions[:, None] - positions
    visible = ((distance >= 0) & (distance < (window or length))).expand(BATCH, -1, -1)
    exact, simple = (f([x.requires_grad_() for x in (q, k, v)], grad[:, :length], visible) for f in (oracle, plain))
    expected, allowed = (x["out"][:, -num_queries:].float() for x in (exact, simple))
    if dtype == torch.float32:
        torch.testing.assert_close(got, expected)
    else:
        assert (got - expected).norm() <= 2 * (allowed - expected).norm()
    with pytest.raises(ValueError, match="no cache or cross-attention"):
        attend(q[:, -num_queries:], k, v, Mask(window=window, cached=keys), kernel="fused")


@pytest.mark.parametrize("dtype", fused.DTYPES, ids=str)
def test_fused_gives_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    needs("fused")
    qkv, grad = draw(HEADS["gqa"], 333, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(with_gradients(attend(*qkv, Mask(window=150), kernel="fused"), qkv, grad))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(result[name], value), name


@pytest.mark.parametrize("position", [0, 50, 130])
@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_fused_hides_no_nan(which: int, position: int) -> None:
    """One number in q, k or v: the query at its place, and for k and v every later one, must show it."""
    needs("fused")
    qkv, grad = draw(HEADS["sqa"], 140)
    with torch.no_grad():
        qkv[which][0, position, 0, 3] = torch.nan
    got = with_gradients(attend(*qkv, Mask(), kernel="fused"), qkv, grad)
    touched = got["out"][0, position:, 0, 3].isnan()
    assert touched[0] if which == 0 else touched.all()
    for name, value in got.items():
        assert value[0].isnan().any() or (which, name) == (2, "dv")  # no gradient of v depends on v
        assert value[1].isfinite().all()


def test_fused_softmax_does_not_overflow_and_forgets_nothing() -> None:
    """Scores of +-1,000 that grow along the keys: the running maximum moves at every tile."""
    needs("fused")
    length = 200
    q = torch.full((1, length, 1, 16), 10.0)
    k = torch.linspace(-25, 25, length)[None, :, None, None].expand(1, length, 1, 16).contiguous()
    v = torch.randn(1, length, 1, 16, generator=torch.Generator().manual_seed(0))
    for keys in (k, k.flip(1)):
        expected = attend(q, keys, v, Mask(), kernel="reference")
        torch.testing.assert_close(attend(q, keys, v, Mask(), kernel="fused"), expected)


def test_without_a_compiler_pytorch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_library", lambda: "no C++ compiler")
    assert resolve(case()).kernel == "sdpa"
    assert resolve(case(window=8)).kernel == "blocks"
    with pytest.raises(ValueError, match=r"fused cannot do this call \(no C\+\+ compiler\)"):
        resolve(case(), "fused")


def test_a_compiler_that_fails_is_a_warning_and_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert fused._library.__wrapped__() == "did not compile"
    assert "could not compile" in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@given(
    length=st.integers(1, 40),
    window=st.none() | st.integers(1, 45),
    sinks=st.integers(0, 12),
    lengths=st.none() | st.lists(st.integers(1, 20), min_size=1, max_size=8),
    heads=st.sampled_from(list(HEADS)),
    block=st.sampled_from([1, 4, 7]),
)
def test_blocks_on_drawn_layouts(length, window, sinks, lengths, heads, block) -> None:
    ids = None
    if lengths is not None:
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        row = torch.cat((row, torch.full((length,), len(lengths))))[:length]
        ids = torch.stack((row, torch.zeros_like(row)))
    mask = Mask(window=window, num_sink_tokens=sinks if window else 0, document_ids=ids)
    qkv, grad = draw(HEADS[heads], length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "QUERY_BLOCK", block)
        got = with_gradients(attend(*qkv, mask, kernel="blocks"), qkv, grad)
    assert_all_close(got, oracle(qkv, grad, by_rule(mask, length, length)))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("sizes", [(1, 9), (9, 1), (5, 12), (12, 5)], ids=lambda s: f"{s[0]}-over-{s[1]}")
@pytest.mark.parametrize("name", HEADS)
def test_cross_attention(name: str, sizes: tuple[int, int], padded: bool) -> None:
    num_queries, num_keys = sizes
    mask = Mask(causal=False, padding_mask=left_padding(num_keys) if padded else None)
    qkv, grad = draw(HEADS[name], num_queries, num_keys)
    got = with_gradients(attend(*qkv, mask), qkv, grad)
    assert_all_close(got, oracle(qkv, grad, by_rule(mask, num_queries, num_keys)))


def test_softcap() -> None:
    qkv, grad = draw(HEADS["gqa"], 40)
    mask = make_mask("causal+window", 40)
    got = with_gradients(attend(*qkv, mask, softcap=0.5), qkv, grad)
    assert_all_close(got, oracle(qkv, grad, seen("causal+window", 40), softcap=0.5))
    without = oracle(qkv, grad, seen("causal+window", 40))
    assert not torch.allclose(got["out"], without["out"])


@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
def test_a_query_that_sees_nothing_gives_zeros(kernel: str) -> None:
    real = torch.tensor([[False, False, True, True], [False] * 4])
    qkv, grad = draw(HEADS["sqa"], 4)
    got = with_gradients(attend(*qkv, Mask(padding_mask=real), kernel=kernel), qkv, grad)
    assert not got["out"][0, :2].any()
    assert not got["out"][1].any()
    assert all(value.isfinite().all() for value in got.values())
    assert not got["dv"][1].any()


@pytest.mark.parametrize(
    ("kernel", "kind"), [("sdpa", "causal+window+sinks"), ("blocks", "causal+window+sinks"), ("fused", "causal+window")]
)
def test_any_memory_layout(kernel: str, kind: str) -> None:
    """Fused kernels that expect dense vectors read garbage from others without a word."""
    needs(kernel)
    qkv, grad = draw(HEADS["sqa"], 20)
    mask = make_mask(kind, 20)
    odd = [x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in qkv]
    grad = grad[:1, :1].expand_as(grad)
    got = with_gradients(attend(*odd, mask, kernel=kernel), odd, grad)
    assert_all_close(got, oracle(qkv, grad, seen(kind, 20)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, while it compiles
@pytest.mark.filterwarnings("ignore:.class 'torch.autograd.function.Function'.:DeprecationWarning")
@pytest.mark.parametrize("kind", ["causal", "causal+window+sinks+documents", "padding"])
def test_flex_forward_on_cpu(kind: str) -> None:
    qkv, grad = draw(variant("sqa", d_model=128, num_heads=8), 128)
    with torch.no_grad():
        got = attend(*qkv, make_mask(kind, 128), kernel="flex")
    torch.testing.assert_close(got, oracle(qkv, grad, seen(kind, 128))["out"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="gpu: no CUDA device")
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "flex"])
@pytest.mark.parametrize("dtype", LOW)
def test_on_cuda(dtype: str, kernel: str, kind: str) -> None:
    mask = make_mask(kind, 256)
    qkv, grad = draw(variant("sqa", d_model=256, num_heads=8), 256, dtype=LOW[dtype])
    exact, simple = (f(qkv, grad, seen(kind, 256)) for f in (oracle, plain))
    there = [x.detach().cuda().requires_grad_() for x in qkv]
    moved = {name: None if x is None else x.cuda() for name, x in vars(mask).items() if name.endswith(("mask", "ids"))}
    mask = Mask(causal=mask.causal, window=mask.window, num_sink_tokens=mask.num_sink_tokens, **moved)
    got = with_gradients(attend(*there, mask, kernel=kernel), there, grad.cuda())
    for key, value in exact.items():
        error, allowed = ((x[key].float().cpu() - value).norm() for x in (got, simple))
        assert error <= 2 * allowed, f"{key}: error {error:.2e}, plain PyTorch {allowed:.2e}"


def case(*, shared: bool = True, head_dim: int = 16, softcap: float | None = None, sinks: int = 0, **changes) -> Call:
    """A call of 64 tokens, 8 query heads and 4 KV heads."""
    config = AttentionConfig(
        d_model=128, num_heads=8, num_kv_heads=4 if shared else 8, head_dim=head_dim, logit_softcap=softcap,
        window=changes.pop("window", None), num_sink_tokens=sinks, causal=changes.pop("causal", True),
    )  # fmt: skip
    return Call.of_layer(config, **{"length": 64, "grad": False, **changes})


@pytest.mark.parametrize(
    ("changes", "kernel", "reason"),
    [
        ({}, "fused", "our own"),
        ({"window": 8}, "fused", "our own"),
        ({"documents": True, "causal": False}, "fused", "our own"),
        ({"head_dim": 24}, "sdpa", "PyTorch's own"),
        ({"head_dim": 24, "window": 8}, "blocks", "skips"),
        ({"window": 8, "sinks": 2}, "blocks", "skips"),
        ({"window": 64, "sinks": 2}, "fused", "our own"),
        ({"dtype": torch.float16}, "sdpa", "PyTorch's own"),
        ({"dtype": torch.float16, "documents": True}, "blocks", "skips"),
        ({"padding": True}, "fused", "our own"),
        ({"padding": True, "head_dim": 24}, "sdpa", "dense mask"),
        ({"window": 8, "padding": True}, "fused", "our own"),
        ({"window": 8, "padding": True, "sinks": 2}, "sdpa", "dense mask"),
        ({"window": 8, "num_queries": 3}, "fused", "our own"),
        ({"window": 8, "num_queries": 3, "grad": True}, "sdpa", "dense mask"),
        ({"padding": True, "num_queries": 1}, "fused", "our own"),
        ({"padding": True, "num_queries": 1, "window": 64}, "sdpa", "dense mask"),
        ({"num_queries": 1}, "fused", "our own"),
        ({"num_queries": 1, "shared": False}, "sdpa", "memory"),
        ({"num_queries": 1, "shared": False, "dtype": torch.bfloat16}, "fused", "our own"),
        ({"softcap": 5.0}, "reference", "caps"),
    ],
)
def test_choice(changes: dict, kernel: str, reason: str) -> None:
    choice = resolve(case(**changes))
    assert choice.kernel == kernel
    assert reason in choice.reason
    assert KERNELS[kernel].lacks(case(**changes)) is None


def hopper(dtype, num_heads, num_kv_heads, head_dim, masked, causal, grad) -> tuple[str, ...]:
    """What PyTorch 2.13 answers on an H100 (sm_90): cuDNN shares KV heads under a mask, the efficient kernel never."""
    half = dtype in (torch.float16, torch.bfloat16)
    shared = num_heads != num_kv_heads
    return (
        *(("flash",) if half and not masked and head_dim <= 256 else ()),
        *(("efficient",) if not shared else ()),
        *(("cudnn",) if half and head_dim <= 128 else ()),
    )


def turing(dtype, num_heads, num_kv_heads, head_dim, masked, causal, grad) -> tuple[str, ...]:
    """A GPU before Ampere (sm_75) has the efficient kernel alone, in fp32 and fp16."""
    return ("efficient",) if num_heads == num_kv_heads and dtype != torch.bfloat16 else ()


BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("gpu", "changes", "kernel", "reason"),
    [
        (hopper, {"dtype": BF16}, "sdpa", "PyTorch's own: flash or cudnn"),
        (hopper, {}, "sdpa", "expanded"),
        (hopper, {"shared": False}, "sdpa", "PyTorch's own: efficient"),
        (hopper, {"dtype": BF16, "padding": True}, "sdpa", "PyTorch's own: cudnn"),
        (hopper, {"dtype": BF16, "padding": True, "head_dim": 256}, "sdpa", "expanded"),
        (hopper, {"dtype": BF16, "num_queries": 1}, "sdpa", "PyTorch's own: flash or cudnn"),
        (hopper, {"dtype": BF16, "window": 8, "grad": True}, "varlen", "skips"),
        (hopper, {"dtype": BF16, "documents": True, "head_dim": 24}, "varlen", "skips"),
        (hopper, {"dtype": BF16, "documents": True, "causal": False}, "varlen", "skips"),
        (hopper, {"window": 8}, "flex", "skips"),
        (hopper, {"dtype": BF16, "window": 8, "sinks": 2}, "flex", "skips"),
        (hopper, {"dtype": BF16, "window": 8, "padding": True}, "flex", "skips"),
        (hopper, {"dtype": BF16, "window": 8, "head_dim": 320}, "sdpa", "expanded"),
        (hopper, {"softcap": 5.0}, "flex", "caps"),
        (hopper, {"softcap": 5.0, "head_dim": 24}, "reference", "caps"),
        (turing, {"dtype": FP16}, "sdpa", "expanded"),
        (turing, {"dtype": FP16, "window": 8}, "flex", "skips"),
        (turing, {"dtype": FP16, "documents": True, "head_dim": 24}, "sdpa", "expanded"),
        (turing, {"dtype": BF16}, "sdpa", "PyTorch's own: math"),
    ],
)
def test_choice_on_cuda_is_what_pytorch_answers(gpu, changes, kernel, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytorch, "_answer", gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    call = case(**{"device": "cuda", **changes})
    choice = resolve(call)
    assert (choice.kernel, reason in choice.reason) == (kernel, True), choice
    assert KERNELS[kernel].lacks(call) is None


def test_choice_for_cuda_without_a_device_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("gpu: there is a CUDA device")
    choice = resolve(case(device="cuda", dtype=BF16))
    assert choice == ("sdpa", "PyTorch decides what runs, and without a CUDA device it cannot be asked")


@pytest.mark.parametrize(
    "kind", ["causal+window", "causal+documents", "documents", "causal+window+documents", "causal"]
)
@pytest.mark.parametrize("name", ["gqa", "rsqa"])
def test_varlen_says_what_the_mask_says(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's function runs on CUDA alone: here a plain loop with its documented meaning stands in for it."""

    def plain_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_q.dtype == torch.int32
        assert max_q == int(cu_q.diff().max())
        parts = []
        for start, stop in zip(cu_q.tolist()[:-1], cu_q.tolist()[1:], strict=True):
            i, j = torch.arange(stop - start)[:, None], torch.arange(stop - start)
            left, right = (stop if size < 0 else size for size in window_size)
            part = [x[None, start:stop] for x in (q, k, v)]
            parts.append(reference_attention(*part, (i - left <= j) & (j <= i + right), scale=scale)[0])
        return torch.cat(parts)

    monkeypatch.setattr(pytorch, "_varlen_attn", lambda: plain_varlen)
    anywhere = {**vars(KERNELS["varlen"]), "devices": "all", "limits": lambda call: None}
    monkeypatch.setitem(KERNELS, "varlen", kernels.Kernel(**anywhere))
    qkv, grad = draw(HEADS[name], 63)
    got = with_gradients(attend(*qkv, make_mask(kind, 63), kernel="varlen"), qkv, grad)
    assert_all_close(got, oracle(qkv, grad, seen(kind, 63)))


@pytest.mark.parametrize(
    ("kernel", "changes", "message"),
    [
        ("sdpaa", {}, r"kernel: 'sdpaa' is unknown; did you mean 'sdpa'\?"),
        ("flex", {"grad": True}, "kernel: flex cannot do this call \\(no CPU backward\\)"),
        ("flex", {"head_dim": 24}, "head_dim must be a power of two from 16, got 24"),
        ("flex", {"num_queries": 64}, "no cache"),
        ("flex", {"device": "mps"}, "not for mps"),
        ("varlen", {}, "CUDA only"),
        ("varlen", {"device": "cuda"}, "fp16 and bf16 only, got torch.float32"),
        ("varlen", {"device": "cuda", "dtype": torch.bfloat16, "padding": True}, "no padding"),
        ("varlen", {"device": "cuda", "dtype": torch.bfloat16, "num_queries": 3}, "no cache"),
        ("blocks", {"padding": True}, "no padding"),
        ("blocks", {"device": "cuda"}, "CPU only"),
        ("blocks", {"softcap": 5.0}, "soft-capping"),
        ("blocks", {"dtype": torch.float64}, "fp32, fp16 and bf16 only, got torch.float64"),
        ("sdpa", {"softcap": 5.0}, "soft-capping"),
    ],
)
def test_a_kernel_that_cannot_says_so(kernel: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(case(**changes), kernel)


def test_a_kind_of_mask_that_a_kernel_does_not_name_is_never_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that is new reaches only the kernels that were taught it, and never plain causal attention."""
    monkeypatch.setattr(Mask, "needs", lambda mask, num_keys: frozenset({"causal", "prefix"}))
    call = case()
    assert [name for name, verdict in explain(call) if verdict != "no prefix"] == []
    assert call.masked
    with pytest.raises(InputError, match=r"sdpa cannot do this call \(no prefix\)"):
        resolve(call, "sdpa")


def test_explain_covers_the_table() -> None:
    rows = dict(explain(case(softcap=5.0, grad=True)))
    assert list(rows) == list(KERNELS)
    assert rows["reference"] == "yes"
    assert "soft-capping" in rows["sdpa"]
    assert rows["flex"] == "no CPU backward"


def test_of_layer_is_what_attend_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    config = variant("rsqa", d_model=64, num_heads=8, window=4)
    calls = []
    monkeypatch.setattr("sqa.attention.kernels.resolve", lambda c, kernel: calls.append(c) or resolve(c, kernel))
    qkv, _ = draw(config, 9)
    attend(*qkv, Mask(window=4))
    calls.append(Call.of_layer(config, length=9))
    seen, told = (
        (c.q.shape[1:], c.k.shape[1:], c.dtype, c.device, c.mask, c.scale, c.softcap, c.grad, c.masked) for c in calls
    )
    assert seen == told


@pytest.mark.parametrize(
    ("shapes", "mask", "message"),
    [
        (((2, 8, 9, 4), (2, 2, 9, 4)), Mask(), r"needs as many queries as keys, got 8 and 2"),
        (((2, 9, 8), (2, 9, 8)), Mask(), r"must be \(B, T, H, D\), got \(2, 9, 8\)"),
        (((2, 9, 6, 4), (2, 9, 4, 4)), Mask(), "head counts one must divide the other, got 6 and 4"),
        (((2, 9, 4, 4), (3, 9, 4, 4)), Mask(), r"differ in batch or head_dim: \(2, 9, 4, 4\) and \(3, 9, 4, 4\)"),
        (((2, 9, 4, 4), (2, 9, 4, 8)), Mask(), "differ in batch or head_dim"),
        (((2, 3, 4, 4), (2, 9, 4, 4)), Mask(), "as many queries as keys, got 3 and 9"),
        (((2, 9, 4, 4),) * 2, Mask(padding_mask=torch.ones(2, 8) > 0), r"padding_mask must be \(2, 9\), got \(2, 8\)"),
        (
            ((2, 9, 4, 4),) * 2,
            Mask(document_ids=torch.arange(9)[None]),
            r"document_ids must be \(2, 9\), got \(1, 9\)",
        ),
    ],
)
def test_shapes_that_do_not_fit(shapes: tuple, mask: Mask, message: str) -> None:
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        attend(q, k, k, mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask(window=0), r"window must be a whole number from 1 to [\d,]+, or None for no window, got 0"),
        (lambda: Mask(window=-1), r"window must be a whole number from 1 to [\d,]+, or None for no window, got -1"),
        (lambda: Mask(window=1.5), "window must be a whole number .*, got 1.5"),
        (lambda: Mask(window=10**30), "window must be a whole number .*, got 10000"),
        (lambda: Mask(causal=False, window=3), "a window needs causal=True, got window=3 and causal=False"),
        (lambda: Mask(num_sink_tokens=-1), r"num_sink_tokens must be a whole number from 0 to [\d,]+, got -1"),
        (lambda: Mask(num_sink_tokens="1", window=2), "num_sink_tokens must be a whole number .*, got '1'"),
        (lambda: Mask(padding_mask=[True]), r"padding_mask must be a tensor or None, got \[True\]"),
        (lambda: Mask(document_ids=3), "document_ids must be a tensor or None, got 3"),
        (lambda: Mask(causal="no"), "causal must be true or false, got 'no'"),
        (lambda: Mask(window=True), "window must be a whole number .*, got True"),
        (lambda: Mask(padding_mask=torch.ones(2, 9, dtype=torch.bool).to_sparse()), "padding_mask must be dense, got"),
        (lambda: Mask(padding_mask=torch.ones(2, 9)), "padding_mask must be bool"),
        (lambda: Mask(document_ids=torch.ones(2, 9)), "document_ids must be integers, got torch.float32"),
    ],
)
def test_masks_that_mean_nothing(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("number", [0, -1.0, float("nan"), float("inf"), "1", True, [1.0]])
@pytest.mark.parametrize("name", ["scale", "softcap"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_scales_and_soft_caps_that_mean_nothing(kernel: str, name: str, number: float) -> None:
    x = torch.zeros(2, 9, 4, 4)
    with pytest.raises(
        InputError, match=f"{name} must be above 0 and finite, or None .*, got {re.escape(repr(number))}"
    ):
        attend(x, x, x, Mask(), kernel=kernel, **{name: number})


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
def test_what_is_no_dense_tensor_is_refused(which: int) -> None:
    x = torch.zeros(2, 9, 4, 4)
    for wrong, message in (
        (None, "must be a tensor, got None"),
        ("x", "must be a tensor, got 'x'"),
        (x.to_sparse(), "must be dense, got layout torch.sparse_coo"),
    ):
        with pytest.raises(InputError, match=f"attention: {'qkv'[which]} {message}"):
            attend(*(wrong if i == which else x for i in range(3)), Mask())
    with pytest.raises(InputError, match="attention: mask must be a Mask, got None"):
        attend(x, x, x, None)


def test_documents_of_fewer_queries_than_keys_are_refused() -> None:
    """Which document a key belongs to is not said: the answer was wrong without a word."""
    q, k = torch.randn(1, 3, 4, 16), torch.randn(1, 9, 4, 16)
    with pytest.raises(InputError, match="document_ids need as many queries as keys, got 3 and 9"):
        attend(q, k, k, Mask(causal=False, document_ids=torch.zeros(1, 3, dtype=torch.long)))


@pytest.mark.parametrize("which", range(3), ids=["q", "k", "v"])
@pytest.mark.parametrize("kernel", ["auto", "fused", "sdpa", "blocks", "reference"])
def test_mixed_dtypes_are_refused_or_cast_by_autocast(kernel: str, which: int) -> None:
    """The native kernel once read all three with q's dtype; rotary positions of transformers give fp32 q and k."""
    needs(kernel)
    qkv, grad = draw(HEADS["sqa"], 40)
    mixed = [x.detach().to(torch.bfloat16 if i == which else torch.float32) for i, x in enumerate(qkv)]
    with pytest.raises(InputError, match="q, k and v must have one floating dtype"):
        attend(*mixed, Mask(), kernel=kernel)
    low = [x.to(torch.bfloat16).requires_grad_() for x in mixed]
    leaves = [x.requires_grad_() for x in mixed]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(*leaves, Mask(), kernel=kernel)
    assert got.dtype == torch.bfloat16
    expected = with_gradients(attend(*low, Mask(), kernel=kernel), low, grad)
    for name, value in with_gradients(got, leaves, grad).items():
        assert torch.equal(value.to(torch.bfloat16), expected[name]), name


def test_integers_and_other_devices_are_refused() -> None:
    x = torch.zeros(2, 9, 4, 4)
    with pytest.raises(InputError, match="one floating dtype"):
        attend(x.int(), x.int(), x.int(), Mask())
    with pytest.raises(InputError, match=r"q and k must be \(B, T, H, D\), got \(\) and"):
        attend(torch.tensor(1.0), x, x, Mask())
    with pytest.raises(InputError, match="q is on cpu, but k on meta"):
        attend(x, x.to("meta"), x.to("meta"), Mask())
    with pytest.raises(InputError, match="heads and head_dim must be at least 1"):
        attend(x[:, :, :0], x, x, Mask())
    with pytest.raises(InputError, match="heads and head_dim must be at least 1"):
        attend(x, x[:, :, :0], x[:, :, :0], Mask())


@pytest.mark.parametrize("sizes", [(2, 0, 0), (0, 5, 5), (2, 0, 5), (2, 5, 0)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("kernel", ["auto", "sdpa", "fused", "blocks", "reference"])
def test_nothing_to_attend_to_is_as_in_pytorch(kernel: str, masked: bool, sizes: tuple[int, int, int]) -> None:
    needs(kernel)
    batch, num_queries, num_keys = sizes
    causal = num_queries == num_keys
    ids = torch.zeros(batch, num_queries, dtype=torch.long) if masked and causal else None
    mask = Mask(causal=causal, window=2 if masked and causal else None, document_ids=ids)
    q, k = torch.randn(batch, num_queries, 4, 16), torch.randn(batch, num_keys, 2, 16)
    leaves = [x.requires_grad_() for x in (q, k, k.clone())]
    if kernel in ("fused", "blocks") and num_queries != num_keys:
        with pytest.raises(InputError, match="no cache or cross-attention"):
            attend(*leaves, mask, kernel=kernel)
        return
    got = attend(*leaves, mask, kernel=kernel)
    their = [x.transpose(1, 2) for x in leaves]
    expected = torch.nn.functional.scaled_dot_product_attention(*their, enable_gqa=True).transpose(1, 2)
    assert torch.equal(got, expected)
    for ours, theirs in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (got, expected)), strict=True):
        assert torch.equal(ours, theirs)


def test_keys_and_values_of_two_shapes() -> None:
    q, k, v = torch.zeros(2, 9, 4, 4), torch.zeros(2, 9, 2, 4), torch.zeros(2, 9, 4, 4)
    with pytest.raises(ValueError, match="k and v must have one shape"):
        attend(q, k, v, Mask())


@given(
    length=st.integers(1, 150),
    window=st.none() | st.integers(1, 90),
    causal=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_fused_with_padding_anywhere(length: int, window: int | None, causal: bool, packed: bool, seed: int) -> None:
    needs("fused")
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(BATCH, length, generator=generator) < torch.rand(BATCH, 1, generator=generator)
    ids = (torch.rand(BATCH, length, generator=generator) < 0.1).cumsum(1) if packed else None
    mask = Mask(causal=causal, window=window if causal else None, padding_mask=real, document_ids=ids)
    qkv, grad = draw(HEADS["sqa"], length)
    got = with_gradients(attend(*qkv, mask, kernel="fused"), qkv, grad)
    assert_all_close(got, oracle(qkv, grad, by_rule(mask, length, length)))


def test_attention_needs_no_compiler_until_something_is_compiled() -> None:
    """Importing it takes as long as all of torch."""
    code = (
        "import sys, torch, sqa.model; from sqa import SparseQueryAttention, variant\n"
        "SparseQueryAttention(variant('sqa', d_model=32, num_heads=4))(torch.ones(1, 5, 32)).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_we_call_constant_is_so_for_the_compiler() -> None:
    def ours() -> None: ...
    def theirs() -> None: ...

    assert vars(operators.constant(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
