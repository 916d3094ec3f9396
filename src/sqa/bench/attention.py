"""The attention operation alone: forward, and forward with backward, over lengths, head counts, masks and kernels.

FLOPs are those of cost.attention_flops: visible pairs only, backward twice the forward.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sqa.attention.call import Call
from sqa.attention.kernels import KERNELS, attend, resolve
from sqa.attention.layer import SparseQueryAttention
from sqa.attention.masks import Mask, dense_mask
from sqa.bench.measurement import Measurement, choose_baseline, time_all, with_ratios, with_shares
from sqa.bench.report import BenchResult
from sqa.config import AttentionConfig, unknown
from sqa.dtypes import find_dtype
from sqa.errors import first_line
from sqa.measure.machine import find_device
from sqa.measure.peak import Peak, measure_peak
from sqa.measure.timing import TimeLimit
from sqa.records import at_least_one
from sqa.variants import MEASURED_VARIANTS, variant

logger = logging.getLogger(__name__)

MASKS = ("causal", "none", "window", "documents")

PINNED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""PyTorch's implementations of `sdpa` that can be asked for by name."""


@contextmanager
def pinned(kernel: str) -> Iterator[str]:
    """The kernel's name for `attend`. In the block PyTorch runs only this implementation; flex uses max-autotune."""
    if kernel in PINNED:
        with sdpa_kernel(PINNED[kernel]):
            yield "sdpa"
    elif kernel == "flex":
        from torch._inductor import config

        with config.patch(max_autotune=True):
            yield kernel
    else:
        yield kernel


def layer_config(name: str, *, head_dim: int, num_heads: int) -> AttentionConfig:
    """The layer of a variant's name, or of head counts written Hq/Hkv or Hq/HkvxD. Raises InputError for neither."""
    d_model = num_heads * head_dim
    counts = re.fullmatch(r"(\d+)/(\d+)(?:x(\d+))?", name)
    if counts is None:
        return variant(name, d_model=d_model, num_heads=num_heads)
    num_query_heads, num_kv_heads = int(counts[1]), int(counts[2])
    return AttentionConfig(
        d_model=d_model,
        num_heads=max(num_heads, num_query_heads, num_kv_heads),
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=int(counts[3]) if counts[3] else head_dim,
    )


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One contestant: a layer's shape, a mask, a kernel, and what is timed."""

    variant: str
    config: AttentionConfig
    mask: str
    kernel: str
    what: str
    n: int
    batch_size: int
    dtype: str
    device: torch.device

    @property
    def document_length(self) -> int:
        """512 tokens, or half of fewer than 1,024."""
        return max(1, min(512, self.n // 2)) if self.mask == "documents" else self.n

    @property
    def layer_mask(self) -> Mask:
        """The mask as `attend` takes it."""
        ids = None
        if self.mask == "documents":
            ids = torch.arange(self.n, device=self.device) // self.document_length
            ids = ids.expand(self.batch_size, self.n).contiguous()
        return Mask.of(self.config, document_ids=ids)

    @property
    def scores(self) -> int:
        """The number of (query, key, head) triples, each of which takes one exponential and 4 x head_dim FLOPs."""
        whole, rest = divmod(self.n, self.document_length)
        pairs = whole * self.config.visible_pairs(self.document_length) + self.config.visible_pairs(rest)
        return self.batch_size * self.config.num_output_heads * pairs

    def inputs(self) -> tuple[list[Tensor], Tensor]:
        """q, k and v, which require gradients if there is a backward pass, and a gradient of the output."""
        c = self.config
        *qkv, grad = (
            torch.randn(self.batch_size, self.n, h, c.head_dim, dtype=find_dtype(self.dtype), device=self.device)
            for h in (c.num_query_heads, c.num_kv_heads, c.num_kv_heads, c.num_output_heads)
        )
        return [x.requires_grad_(self.what != "forward") for x in qkv], grad

    def contestant(self) -> Callable[[], object]:
        """The call to time, on inputs that are made once."""
        mask = self.layer_mask
        if self.what == "layer step":
            layer = SparseQueryAttention(self.config).to(self.device, find_dtype(self.dtype))
            shape = (self.batch_size, self.n, self.config.d_model)
            x, out_grad = torch.randn(2, *shape, dtype=find_dtype(self.dtype), device=self.device)
            wanted = (x.requires_grad_(), *layer.parameters())
            return lambda: torch.autograd.grad(layer(x, document_ids=mask.document_ids), wanted, out_grad)
        inputs, grad = self.inputs()
        return lambda: _run(partial(attend, mask=mask), inputs, grad, self.kernel)

    @property
    def kernel_name(self) -> str:
        """The kernel that runs, with PyTorch's implementation where one is pinned."""
        if self.kernel != "auto":
            return f"sdpa:{self.kernel}" if self.kernel in PINNED else self.kernel
        call = Call.of_layer(
            self.config, length=self.n, device=self.device, dtype=find_dtype(self.dtype),
            documents=self.mask == "documents", grad=self.what != "forward",
        )  # fmt: skip
        return resolve(call).kernel

    def measurement(self, peak: Peak) -> Measurement:
        """All that is known before timing, with the kernel that was asked for; the least time follows from `peak`."""
        config = self.config
        passes = {"forward": 1, "forward+backward": 3}.get(self.what)
        flops = None if passes is None else passes * 4 * config.head_dim * self.scores
        return Measurement(
            kind="attention",
            d_model=config.d_model,
            variant=self.variant,
            num_query_heads=config.num_query_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            batch_size=self.batch_size,
            n=self.n,
            dtype=self.dtype,
            mask=self.mask,
            window=config.window,
            kernel=self.kernel,
            what=self.what,
            scores=self.scores,
            flops=flops,
            limit_seconds=None if flops is None else flops / peak.product,
        )


def _run(attention: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor, kernel: str) -> list[Tensor]:
    """The output of attention(q, k, v, kernel=...), and the gradients of inputs that require one."""
    # a compiled backward is compiled when it first runs, so inside `pinned` too
    with pinned(kernel) as name:
        out = attention(*inputs, kernel=name)
        gradients = torch.autograd.grad(out, inputs, grad.to(out.dtype)) if out.requires_grad else ()
    return [out.detach(), *gradients]


def _rms(x: Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def refusal(setting: Setting, attention: Callable[..., Tensor] = attend) -> str | None:
    """None if the kernel is right for this kind of call, else the sentence that replaces its time in the table.

    On 256 tokens, the root mean square error of output and gradients, against plain PyTorch in fp32, may be twice that
    of plain PyTorch in the same precision; in fp32 the largest error must be within torch.testing's tolerance.
    """
    n, window = 256, setting.config.window
    config = setting.config if window is None else setting.config.replace(window=min(window, n // 4))
    setting = replace(setting, config=config, n=n, batch_size=1)
    mask = setting.layer_mask
    visible = dense_mask(mask, n, n, setting.device)
    inputs, grad = setting.inputs()
    whole = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]

    def plain(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
        """Attention in plain PyTorch, in the precision of the inputs."""
        heads = config.num_output_heads
        q, k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * config.head_dim**-0.5
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    exactly, simply = _run(plain, whole, grad, "auto"), _run(plain, inputs, grad, "auto")
    try:
        got = _run(partial(attention, mask=mask), inputs, grad, setting.kernel)
    except (RuntimeError, ValueError) as problem:
        return f"cannot run: {first_line(problem)}"
    for what, given, simple, exact in zip(("output", "dq", "dk", "dv"), got, simply, exactly, strict=False):
        error, allowed = _rms(given - exact), 2 * _rms(simple - exact)
        if find_dtype(setting.dtype) == torch.float32:
            error, allowed = float((given - exact).abs().max()), 1e-5 + 1.3e-6 * float(exact.abs().max())
        if not error <= allowed:
            return f"not timed: {what} is off by {error:.1e}, {allowed:.1e} allowed"
    return None


def run_attention(
    *,
    variants: Sequence[str] = MEASURED_VARIANTS,
    lengths: Sequence[int] = (1024, 4096),
    head_dims: Sequence[int] = (16,),
    num_heads: int = 16,
    batch_size: int = 1,
    dtypes: Sequence[str] = ("bf16",),
    mask: str = "causal",
    window: int = 512,
    kernels: Sequence[str] = ("auto",),
    rounds: int = 10,
    device: str = "cpu",
    budget: float | None = None,
) -> BenchResult:
    """Time attention; every contestant of one length, head_dim and dtype takes turns with the others.

    `variants` are names or head counts (Hq/Hkv, Hq/HkvxD) of `num_heads` nominal heads; `kernels` are "auto", those of
    `sqa kernels`, or one of PyTorch's own pinned (flash, cudnn, efficient, math). With mask "window" full causal
    attention runs beside it, and so does the training step of the whole layer. A kernel that cannot run or is not right
    becomes a measurement with a note. `budget` (seconds): longer N are left out when they would not fit. Raises
    InputError for bad options.
    """
    known = ("auto", *KERNELS, *PINNED)
    for field, names, allowed in (("mask", [mask], MASKS), ("kernel", kernels, known)):
        for name in names:
            if name not in allowed:
                raise unknown(field, name, allowed)
    at_least_one(
        "benchmark", variants=len(variants), lengths=min(lengths, default=0), dtypes=len(dtypes), kernels=len(kernels),
        head_dims=min(head_dims, default=0), num_heads=num_heads, batch_size=batch_size, window=window, rounds=rounds,
    )  # fmt: skip
    variants = [name.lower() for name in variants]
    where, limit, baseline = find_device(device), TimeLimit(seconds=budget), choose_baseline(variants)
    configs = {
        head_dim: {name: layer_config(name, head_dim=head_dim, num_heads=num_heads) for name in variants}
        for head_dim in head_dims
    }
    peaks = {dtype: measure_peak(find_dtype(dtype), where) for dtype in dtypes}
    notes = ["limit: share of the ratio that fewer scores allow (H / Hq)."]
    notes += (f"{dtype}: {peak}" for dtype, peak in peaks.items())
    rows: list[Measurement] = []
    for dtype, peak in peaks.items():
        for head_dim, layers in configs.items():
            settings = [
                Setting(
                    variant=name,
                    config=config.replace(causal=which != "none", window=window if which == "window" else None),
                    mask=which,
                    kernel=kernel,
                    what=what,
                    n=lengths[0],
                    batch_size=batch_size,
                    dtype=dtype,
                    device=where,
                )
                for name, config in layers.items()
                for which in (("causal", "window") if mask == "window" else (mask,))
                for kernel in kernels
                for what in ("forward", "forward+backward", *(("layer step",) if mask == "window" else ()))
                if what != "layer step" or kernel == "auto"
            ]
            refused = {setting: refusal(setting) for setting in settings}
            for n in limit.fitting(sorted(lengths), notes, f"{dtype}, head_dim {head_dim}: the budget"):
                logger.info("attention %s, head_dim %d, N = %d: %d contestants", dtype, head_dim, n, len(settings))
                taking_part = {
                    replace(setting, n=n): problem
                    for setting, problem in refused.items()
                    if problem is None or n == min(lengths)
                }
                contestants = (
                    (replace(each.measurement(peak), note=problem), each.contestant if problem is None else None)
                    for each, problem in taking_part.items()
                )
                timed = time_all(contestants, rounds=rounds, warmup=1, device=where, limit=limit)
                compared = zip(taking_part, _compared(timed, peak, baseline), strict=True)
                rows += (replace(m, kernel=each.kernel_name) for each, m in compared)
    options = {"head_dims": list(head_dims), "num_heads": num_heads, "rounds": rounds}
    return BenchResult.of(rows, device=device, settings=options, notes=notes)


def _compared(measurements: Sequence[Measurement], peak: Peak, baseline: str) -> Iterator[Measurement]:
    """Add rates, shares and ratios to the measurements of one length, head_dim and dtype."""
    timed = [m for m in measurements if m.seconds is not None]
    scores = {(m.variant, m.mask): m.scores or 0 for m in timed}
    full = {(m.variant, m.kernel, m.what): m.median for m in timed if m.mask == "causal"}
    sdpa = {(m.variant, m.mask, m.what): m.median for m in timed if m.kernel == "sdpa"}
    for m in with_ratios(measurements, same=lambda m: (m.mask, m.kernel, m.what), baseline=baseline):
        if m.seconds is not None and m.flops is not None:
            m = replace(with_shares(m, m.flops, peak), flops_per_s=m.flops / m.median)
        if m.ratio is not None and m.flops is not None:
            limit = scores[baseline, m.mask] / scores[m.variant, m.mask]
            m = replace(m, limit=limit, share_of_limit=m.ratio / limit)
        if m.seconds is not None and m.mask == "window" and (m.variant, m.kernel, m.what) in full:
            m = replace(m, ratio_to_full=full[m.variant, m.kernel, m.what] / m.median)
        if m.seconds is not None and m.kernel != "sdpa" and (m.variant, m.mask, m.what) in sdpa:
            m = replace(m, ratio_to_sdpa=sdpa[m.variant, m.mask, m.what] / m.median)
        yield m
