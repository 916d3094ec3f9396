"""Our own kernel on random masks, shapes, dtypes and layouts against plain PyTorch in fp64, forward and gradients."""

from random import Random

import torch
from boundary import laid_out
from timed import fuzz
from torch import Tensor

from sqa.attention import fused
from sqa.attention.kernels import attend
from sqa.attention.masks import CachedKeys, Mask


def drawn_mask(random: Random, batch: int, length: int, generator: torch.Generator) -> Mask:
    causal = random.random() < 0.7
    padding = document_ids = None
    if random.random() < 0.4:
        padding = torch.rand(batch, length, generator=generator) < torch.rand(batch, 1, generator=generator)
    if random.random() < 0.4:
        document_ids = (torch.rand(batch, length, generator=generator) < random.choice([0.01, 0.1, 0.5])).cumsum(1)
    window = random.randrange(1, 2 * length + 2) if causal and random.random() < 0.5 else None
    return Mask(causal=causal, window=window, padding_mask=padding, document_ids=document_ids)


def rule(mask: Mask, batch: int, length: int) -> Tensor:
    """Bool (B, T, T): may query i read key j. Written without looking at the code under test."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = torch.ones(batch, length, length, dtype=torch.bool)
    if mask.causal:
        seen &= j <= i
    if mask.window is not None:
        seen &= i - j < mask.window
    if mask.padding_mask is not None:
        seen &= mask.padding_mask[:, None]
    if mask.document_ids is not None:  # they only grow here
        seen &= mask.document_ids[:, :, None] == mask.document_ids[:, None]
    return seen


def drawn(random: Random, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers of a drawn size, sometimes with some that are far larger."""
    x = torch.randn(shape, generator=generator) * random.choice([0.1, 1, 1, 1, 5])
    if random.random() < 0.1:
        x[torch.rand(shape, generator=generator) < 0.01] *= 30
    return laid_out(x.to(dtype), random)


def assert_no_worse(got: Tensor, exact: Tensor, simple: Tensor, name: str, more: float = 0.0) -> None:
    """At most twice the error of plain PyTorch in the same precision, what fp32 sums may add, and `more`."""
    error, allowed = (float((x.double() - exact).norm()) for x in (got, simple))
    rounding = 2e-6 * float(exact.norm() + exact.numel() ** 0.5 * exact.abs().amax()) if exact.numel() else 0.0
    assert error <= 2 * allowed + rounding + more, (
        f"{name}: error {error:.3e}, plain PyTorch {allowed:.3e}, {rounding:.1e} and {more:.1e} more"
    )


def of_rounded_output(out: Tensor, grad: Tensor, other: Tensor, scale: float) -> float:
    """What rounding the output may add to dq (`other` is k) or dk (q).

    A fused backward, PyTorch's too, has the sum of weights times their gradients from the output and its gradient, so
    where one weight is nearly 1 a difference is left that is 0 for plain PyTorch.
    """
    error = torch.finfo(out.dtype).eps * (out.float() * grad.float()).abs().sum(-1)
    return abs(scale) * float(error.sum()) * float(other.float().norm(dim=-1).amax())


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """What anybody would write in PyTorch, in the precision of the inputs.

    In fp64 it is the right answer. In fp32 it is not: of scores near 1,000 every rounding changes a weight by 1e-4.
    """
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    scores = (q @ k.transpose(2, 3)) * scale
    weights = scores.masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) * seen
    return (weights @ v).transpose(1, 2)


def case(random: Random) -> None:
    generator = torch.Generator().manual_seed(random.randrange(1 << 30))
    dtype, head_dim = random.choice(fused.DTYPES), random.choice(fused.HEAD_DIMS)
    batch, length = random.randrange(1, 4), random.choice([random.randrange(1, 40), random.randrange(1, 200)])
    kv_heads, shared = random.choice([1, 1, 2, 3]), random.choice([1, 2, 3, 4, 9])
    torch.set_num_threads(random.choice([1, 2, 3]))
    scale = random.choice([head_dim**-0.5, head_dim**-0.5, 0.05, 0.3, 1.0])
    q, k, v, grad = (
        drawn(random, (batch, length, heads, head_dim), dtype, generator)
        for heads in (kv_heads * shared, kv_heads, kv_heads, kv_heads * shared)
    )
    mask = drawn_mask(random, batch, length, generator)
    seen = rule(mask, batch, length)[:, None]
    last = random.randrange(1, length + 1)
    if mask.padding_mask is None and mask.document_ids is None and mask.causal and random.random() < 0.4:
        at_the_end_of_a_cache(q[:, -last:], k, v, mask, seen[:, :, -last:], scale)
        return
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs, mask, scale=scale, kernel="fused")
    got = (out, *torch.autograd.grad(out, inputs, grad))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = plain(*exact, seen, scale)
    right = (out, *torch.autograd.grad(out, exact, grad.double()))
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = plain(*inputs, seen, scale)
    simple = (out, *torch.autograd.grad(out, inputs, grad))
    rounded = {"dq": of_rounded_output(right[0].detach().to(dtype), grad, k, scale)}
    rounded["dk"] = of_rounded_output(right[0].detach().to(dtype), grad, q, scale)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), got, right, simple, strict=True):
        assert_no_worse(x.detach(), y.detach(), z.detach(), name, rounded.get(name, 0.0))


def at_the_end_of_a_cache(q: Tensor, k: Tensor, v: Tensor, mask: Mask, seen: Tensor, scale: float) -> None:
    """Fewer queries than keys, forward alone."""
    positions, last = torch.arange(k.shape[1]), q.shape[1]
    near = torch.ones(1, k.shape[1], dtype=torch.bool)
    cached = CachedKeys(query_positions=positions[-last:], key_positions=positions, near=near, far=~near, holes=False)
    got = attend(q, k, v, Mask(window=mask.window, cached=cached), scale=scale, kernel="fused")
    right = plain(q.double(), k.double(), v.double(), seen, scale)
    assert_no_worse(got, right, plain(q, k, v, seen, scale), "cached")


if __name__ == "__main__":
    fuzz(case, "attention kernel")
