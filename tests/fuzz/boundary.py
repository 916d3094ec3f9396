"""Random tensors at the boundary of native code: what fused.py lets through must be right, all else a ValueError.

Meant for a build of fused.cpp with an address sanitizer (`make asan`), which also sees a read past the end that does
no harm by luck.
"""

from random import Random

import torch
from timed import fuzz
from torch import Tensor

from sqa.attention import fused
from sqa.attention.kernels import attend
from sqa.attention.masks import Mask
from sqa.attention.reference import reference_attention

OTHER_DTYPES = (torch.float16, torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64)


def laid_out(x: Tensor, random: Random) -> Tensor:
    """The same numbers in another layout: gaps, an offset, other axes first, lazily negated."""
    kind = random.choice(["plain", "plain", "gaps", "offset", "turned", "heads first", "negated", "every second"])
    if kind == "gaps":
        return torch.zeros(*x.shape, 2, dtype=x.dtype)[..., 0].copy_(x)
    if kind == "offset":
        start = random.randrange(1, 9)
        return torch.zeros(x.numel() + start, dtype=x.dtype)[start:].view(x.shape).copy_(x)
    if kind in ("turned", "heads first") and x.ndim > 1:
        axes = (0, x.ndim - 1) if kind == "turned" else (1, x.ndim - 2)
        return x.transpose(*axes).contiguous().transpose(*axes)
    if kind == "negated" and x.dtype in (torch.float32, torch.float64):
        return torch.complex(x, -x).conj().imag
    if kind == "every second" and x.shape[0]:
        return x.repeat_interleave(2, 0)[::2]
    return x


def spoiled(x: Tensor, random: Random) -> Tensor:
    """A tensor that native code must not see in place of x."""
    kind = random.choice(["dtype", "dtype", "meta", "sparse", "axis", "size", "size", "no memory"])
    if kind == "dtype":
        return x.to(random.choice([d for d in (*OTHER_DTYPES, *fused.DTYPES) if d != x.dtype]))
    if kind == "meta":
        return x.to("meta")
    if kind == "sparse":
        return x.to_sparse()
    if kind == "axis":
        return x[..., None] if random.random() < 0.5 else x[0] if x.shape[0] else x[None]
    if kind == "no memory" and x.numel():
        x = x.clone()
        x.untyped_storage().resize_(random.randrange(x.untyped_storage().nbytes()))
        return x
    axis = random.choice([axis for axis in range(x.ndim) if axis != 2])  # other head counts may be right
    shape = list(x.shape)
    shape[axis] = random.choice([n for n in (0, 1, shape[axis] + 1, 2 * shape[axis] + 1) if n != shape[axis]])
    return torch.zeros(shape, dtype=x.dtype)


def of_kernel(random: Random) -> None:
    """fused_forward and fused_backward themselves, with any ranges of keys."""
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    batch, length = random.choice([0, 1, 1, 2, 3]), random.choice([0, 1, 2, 5, 16, 17, 33, 64, 65, 130])
    keys = length if random.random() < 0.7 else random.choice([0, 1, 3, 64, 70])
    kv_heads, shared, head_dim = (
        random.choice([1, 1, 2, 3]),
        random.choice([1, 2, 3, 8]),
        random.choice([16, 32, 64, 128]),
    )
    dtype = random.choice(fused.DTYPES)
    q, k, v, grad = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (
            (batch, length, kv_heads * shared, head_dim),
            *[(batch, keys, kv_heads, head_dim)] * 2,
            (batch, length, kv_heads * shared, head_dim),
        )
    )
    if random.random() < 0.2 and batch:
        k, v = (x[:1].expand_as(x) for x in (k, v))
    low, high = (torch.randint(0, keys + 1, (batch, length), generator=generator, dtype=torch.int32) for _ in range(2))
    tensors = {"q": q, "k": k, "v": v, "low": low, "high": high, "grad": grad}
    tensors = {name: laid_out(x, random) for name, x in tensors.items()}
    bad = None
    if random.random() < 0.5:
        bad = random.choice(list(tensors))
        if bad in ("low", "high") and batch and length and random.random() < 0.4:
            value = random.choice([-(2**31), -1, -64]) if bad == "low" else random.choice([keys + 1, 2**31 - 1])
            tensors[bad] = tensors[bad].clone()
            tensors[bad][0, -1] = value
        else:
            tensors[bad] = spoiled(tensors[bad], random)
    for name in "qkv":
        if tensors[name].is_floating_point() and random.random() < 0.3:
            tensors[name] = tensors[name].detach().requires_grad_()
    try:
        out, logsumexp = fused.fused_forward(*(tensors[name] for name in ("q", "k", "v", "low", "high")), 0.3)
    except ValueError:
        assert bad not in (None, "grad"), "refused what is right"
        return
    assert bad in (None, "grad"), f"took {bad}"
    try:
        grads = fused.fused_backward(
            *(tensors[name] for name in ("grad", "q", "k", "v")), out, logsumexp, tensors["low"], tensors["high"], 0.3
        )
    except ValueError:
        assert bad == "grad" or keys != length, "refused what is right"
        grads = None
    else:
        assert bad is None, f"took {bad}"
    position = torch.arange(keys)
    visible = (position >= low[..., None]) & (position < high[..., None])
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    expected = reference_attention(*exact, visible[:, None], scale=0.3)
    names, results = ["out"], [out]
    wanted = [expected]
    if grads is not None:
        names += ["dq", "dk", "dv"]
        results += grads
        wanted += torch.autograd.grad(expected, exact, grad.float())
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for name, result, value in zip(names, results, wanted, strict=True):
        scale = float(value.detach().abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(
            result.float(), value, rtol=tolerance, atol=tolerance * (1 + scale), msg=lambda m, name=name: f"{name}: {m}"
        )


def of_attend(random: Random) -> None:
    """The public function with q, k, v of any dtypes, layouts and wishes for gradients: right, or a ValueError."""
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    batch, length, head_dim = random.choice([0, 1, 2]), random.choice([0, 1, 9, 64, 100]), random.choice([16, 64])
    shapes = [(batch, length, heads, head_dim) for heads in (4, 2, 2)]
    exact = [torch.randn(shape, generator=generator) for shape in shapes]
    dtypes = [random.choice([*fused.DTYPES, *fused.DTYPES, torch.float16]) for _ in shapes]
    given = [laid_out(x.to(dtype), random) for x, dtype in zip(exact, dtypes, strict=True)]
    for x in given:
        x.requires_grad_(random.random() < 0.5)
    mask = Mask(window=random.choice([None, 1, 30]))
    try:
        out = attend(*given, mask, kernel=random.choice(["auto", "fused"]))
        if out.requires_grad:
            out.sum().backward()
    except (ValueError, RuntimeError):
        # PyTorch's own kernel, which `auto` takes for what ours cannot do, raises RuntimeError for mixed dtypes
        if len(set(dtypes)) == 1 and torch.float16 not in dtypes:
            raise
        return
    torch.testing.assert_close(
        out.float(), attend(*exact, mask, kernel="reference"), rtol=0.05, atol=0.05, check_dtype=False
    )


def case(random: Random) -> None:
    random.choice([of_kernel, of_kernel, of_attend])(random)


if __name__ == "__main__":
    fuzz(case, "boundary of native code")
