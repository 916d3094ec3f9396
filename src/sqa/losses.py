"""Cross-entropy and distillation from hidden states, chunk by chunk: the logits of a batch never exist whole.

Losses are sums. The caller takes the mean once, over all tokens: a mean of means would overweight short batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sqa.dtypes import product_dtype

_linear = torch.nn.functional.linear

IGNORE = -100
"""The label of a position that has no target."""

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
"""The number of logits in memory at a time; on the CPU so few that they fit its cache (400 tokens of 10,000 logits)."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, compiled: bool = False
) -> Tensor:
    """Sum of -log softmax(hidden weight^T + bias)[label] over labels != -100: a scalar, fp32.

    hidden (..., d), weight (V, d), bias (V,) or None, labels int64 (...). The forward pass computes the gradients
    too, chunk by chunk, and keeps those of hidden, weight and bias; nothing has tokens x V elements. Under autocast
    the products run in its dtype and the softmax in fp32. `compiled` fuses the softmax and its gradient.
    """
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))):
        return token_losses(hidden, weight, bias, labels)[0].sum()
    softmax_gradient = _compiled(_softmax_gradient) if compiled else _softmax_gradient
    valid = labels != IGNORE
    labels = labels.masked_fill(~valid, 0)

    def cross_entropy(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        nll, gradient = softmax_gradient(logits, labels[part], valid[part])
        return nll, gradient

    total: Tensor = _ChunkedLoss.apply(hidden, weight, bias, cross_entropy, product_dtype(hidden), compiled)
    return total


def linear_distillation(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: tuple[Tensor, Tensor, Tensor | None]
) -> Tensor:
    """Sum over tokens of KL(teacher || student), fp32.

    hidden (..., d), weight (V, d), bias (V,) or None; `teacher` has the same three of another model, whose width may
    differ and which gets no gradient. Chunks, autocast and gradients are as in `linear_cross_entropy`.
    """
    dtype = product_dtype(hidden)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    rows = teacher[0].detach().reshape(-1, teacher[0].shape[-1]).to(dtype)
    head = teacher[1].detach().to(dtype), _to(teacher[2], dtype)

    def divergence(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Sum over a chunk of logits (rows, V), and its gradient with respect to them."""
        student, target = (x.float().log_softmax(1) for x in (logits, _linear(rows[part], *head)))
        probabilities = target.exp()
        return (probabilities * (target - student)).sum(), (student.exp() - probabilities).to(logits.dtype)

    if not torch.is_grad_enabled():
        student = weight.to(dtype), _to(bias, dtype)
        parts = [divergence(_linear(hidden[part].to(dtype), *student), part)[0] for part in _chunks(hidden, weight)]
        return torch.stack(parts).sum()
    total: Tensor = _ChunkedLoss.apply(hidden, weight, bias, divergence, dtype, False)
    return total


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Without gradients: -log p of each label, fp32, and whether it was the most likely token, bool; shaped as labels.

    Zero and False where the label is -100. Shapes as for `linear_cross_entropy`.
    """
    shape = labels.shape
    hidden, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    nll = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
    head = weight.to(hidden.dtype), _to(bias, hidden.dtype)
    for part in _chunks(hidden, weight):
        nll[part], correct[part] = logit_losses(_linear(hidden[part], *head), labels[part])
    return nll.view(shape), correct.view(shape)


def logit_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `token_losses` returns, with gradients, from logits (..., V) and labels (...)."""
    logits, valid = logits.float(), labels != IGNORE
    target = labels.masked_fill(~valid, 0)[..., None]
    nll = (logits.logsumexp(-1) - logits.gather(-1, target)[..., 0]) * valid
    return nll, (logits.argmax(-1) == target[..., 0]) & valid


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """The chunks of rows, of nearly equal sizes, so that a compiled step sees few shapes."""
    count = hidden.shape[0]
    limit = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cuda"])
    rows = -(-count // max(1, -(-count * weight.shape[0] // limit)))
    return (slice(start, min(start + rows, count)) for start in range(0, count, max(rows, 1)))


def _softmax_gradient(logits: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of nll of a chunk (rows, V), and its gradient with respect to the logits, in their dtype."""
    dtype, logits = logits.dtype, logits.float()
    highest = logits.amax(1, keepdim=True)
    exponentials = torch.exp(logits - highest)
    total = exponentials.sum(1, keepdim=True)
    nll = ((total.log() + highest - logits.gather(1, labels[:, None]))[:, 0] * valid).sum()
    # comparing instead of scattering lets a compiler write the gradient in the same pass
    picked = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    return nll, ((exponentials / total - picked.float()) * valid[:, None]).to(dtype)


def _accumulate(total: Tensor, part: Tensor) -> None:
    """total += part; compiled, a low-precision part is not copied to fp32 first."""
    total.add_(part)


@lru_cache(maxsize=2)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


class _ChunkedLoss(torch.autograd.Function):
    """The sum over rows of a loss of their logits. The forward pass computes the gradients too, chunk by chunk.

    `chunk_loss(logits, part)` returns the loss of a chunk of logits (rows, V) and its gradient with respect to them,
    in their dtype. Only inputs that require gradients get one, so a frozen head costs neither memory nor a product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_loss: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
        dtype: torch.dtype,
        compiled: bool,
    ) -> Tensor:
        accumulate = _compiled(_accumulate) if compiled else _accumulate
        low_weight, low_hidden, low_bias = weight.to(dtype), hidden.to(dtype), _to(bias, dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(low_hidden) if wanted[0] else None
        grad_weight, grad_bias = (
            torch.zeros(x.shape, dtype=torch.float32, device=x.device) if x is not None and wants else None
            for x, wants in ((weight, wanted[1]), (bias, wanted[2]))
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(hidden, weight):
                loss, gradient = chunk_loss(_linear(low_hidden[part], low_weight, low_bias), part)
                total += loss
                if grad_hidden is not None:
                    torch.mm(gradient, low_weight, out=grad_hidden[part])
                if grad_weight is not None and dtype == torch.float32:
                    grad_weight.addmm_(gradient.T, low_hidden[part])
                elif grad_weight is not None:
                    accumulate(grad_weight, gradient.T @ low_hidden[part])
                if grad_bias is not None:
                    # a product with ones: sum() would first copy the chunk to fp32
                    grad_bias += (torch.ones_like(gradient[:, :1]).T @ gradient)[0]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *grads, None, None, None
