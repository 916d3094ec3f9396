"""The fast path (own kernel, compiled blocks, chunked loss) trains as the plain one does.

50 steps amplify rounding, so the yardstick is what rounding does to plain PyTorch: with the curve in higher precision
as the truth, the fast path may be off by at most twice as much as plain PyTorch in the same precision.
"""

import contextlib

import pytest
import torch
from torch import nn

from models import NOT_BUILT
from sqa import Transformer
from sqa.attention import fused
from sqa.variants import model_config

CONFIG = model_config("sqa", vocab_size=97, num_layers=2, d_ff=96, max_seq_len=48, d_model=64, num_heads=4, bias=True)


def curve(*, fast: bool, dtype: torch.dtype = torch.float32, autocast: bool = False) -> torch.Tensor:
    """Losses of 50 AdamW steps, fp64."""
    torch.manual_seed(0)
    model = Transformer(CONFIG).to(dtype)
    for block in model.model.layers:
        block.self_attn.kernel = "auto" if fast else "sdpa"
    if fast:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=fast)
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(0, 97, (50, 4, 1), generator=generator)
    losses = []
    for start in starts:
        tokens = (start + 5 * torch.arange(49)) % 97
        ids, labels = tokens[:, :-1], tokens[:, 1:].clone()
        labels[:, ::7] = -100
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            if fast:
                loss = model(ids, labels).loss
            else:
                loss = nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fifty_steps_agree(precision: str) -> None:
    assert fused.lacks() in (None, *NOT_BUILT)
    if precision == "fp32":
        truth = curve(fast=False, dtype=torch.float64)
        plain, quick = curve(fast=False), curve(fast=True)
    else:
        truth = curve(fast=False)
        plain, quick = curve(fast=False, autocast=True), curve(fast=True, autocast=True)
    assert truth[-1] < truth[0] - 1  # it learns: an untrained curve would agree with anything
    error, allowed = (quick - truth).norm(), (plain - truth).norm()
    assert error <= 2 * allowed, f"fast path off by {error:.2e}, plain PyTorch by {allowed:.2e}"
