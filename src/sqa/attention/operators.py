"""Attention in C++, or in loops that depend on data, as custom operators: one node each for torch.compile."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def constant(function: T) -> T:
    """As torch.compiler.assume_constant_result, without importing the compiler, which takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def transformed() -> bool:
    """Whether torch.func transforms what runs now. Our operators and our loss have no rules for its transforms."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def cpu_operator(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The operator `sqa::NAME` on the CPU, with a gradient.

    forward(q, k, v, *options) returns the output, like q, and the log-sum-exp of the scores, fp32 (B, T, Hq).
    backward(grad, q, k, v, output, logsumexp, *options) returns the gradients of q, k and v. Of the options, tensors
    come first. torch.compile's disk cache knows operators by name alone: another signature needs another name.
    """
    operator = torch.library.custom_op(f"sqa::{name}", forward, mutates_args=(), device_types="cpu")
    gradient = torch.library.custom_op(f"sqa::{name}_backward", backward, mutates_args=(), device_types="cpu")

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.options = inputs[len(tensors) :]
        ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])

    def differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = gradient(grad, *saved, *ctx.options)
        return *grads, *(None for _ in (*saved[5:], *ctx.options))

    operator.register_fake(lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)))
    gradient.register_fake(lambda grad, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)))
    operator.register_autograd(differentiate, setup_context=save)
    return operator
