"""One graph for all lengths, under torch.compile and torch.export; equal to eager."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sqa import AttentionConfig, KVCache, ModelConfig, SparseQueryAttention, Transformer, variant, window_pattern

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

LENGTHS = (40, 33, 64, 100, 41)
BASE = AttentionConfig(d_model=64, num_heads=8, num_query_heads=4, num_kv_heads=2, head_dim=16)  # ours has 16
CASES = {
    "causal": (BASE, False),
    "window": (BASE.replace(window=9), False),
    "window-sinks-documents": (BASE.replace(window=9, num_sink_tokens=2), True),
    "reverse-qk-norm": (variant("rsqa", d_model=64, num_heads=8, qk_norm=True), False),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def frozen(on: bool = True):
    """While `on`, compiling anything again is an error."""
    return torch._dynamo.config.patch(error_on_recompile=on)


def gradients(layer: SparseQueryAttention, function, x: Tensor, ids: Tensor | None) -> list[Tensor]:
    out = function(x, document_ids=ids)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("name", CASES)
def test_layer_compiles_once_for_all_lengths(name: str, backend: str) -> None:
    if backend == "inductor" and name not in ("causal", "window-sinks-documents"):
        backend = "eager"
    torch.manual_seed(0)
    config, packed = CASES[name]
    layer = SparseQueryAttention(config)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for length in LENGTHS:
        x = torch.randn(2, length, 64)
        ids = torch.arange(length).expand(2, -1) // 7 if packed else None
        with frozen(length != LENGTHS[0]):
            got = gradients(layer, compiled, x, ids)
        for a, b in zip(got, gradients(layer, layer, x, ids), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (5, 0), (5, 2)], ids=["static", "rolling", "sinks"])
def test_decode_steps_compile_once(window: int | None, sinks: int, padded: bool) -> None:
    torch.manual_seed(0)
    config = BASE.replace(window=window, num_sink_tokens=sinks)
    layer = SparseQueryAttention(config)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 30, 64)
    real = torch.arange(30) >= torch.tensor([[0], [3 if padded else 0]])
    cache = KVCache(config, batch_size=2, capacity=31)
    with torch.no_grad():
        steps = [compiled(x[:, :7].clone(), padding_mask=real[:, :7] if padded else None, cache=cache)]
        for i in range(7, 30):
            with frozen(i > 7):
                steps.append(compiled(x[:, i : i + 1].clone(), cache=cache))
        whole = layer(x, padding_mask=real if padded else None)
    torch.testing.assert_close(torch.cat(steps, 1)[real], whole[real])


def test_model_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    layers = window_pattern(BASE, num_layers=2, window=8, full_every=2)
    model = Transformer(ModelConfig(vocab_size=32, num_layers=2, d_ff=64, max_seq_len=128, attention=layers))
    compiled = torch.compile(model.hidden_states, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS:
        ids = torch.randint(32, (2, length))
        with frozen(length != LENGTHS[0]):
            got = compiled(ids)
        torch.testing.assert_close(got, model.hidden_states(ids), atol=1e-4, rtol=1e-4)


def test_model_compile_trains_as_eager_does() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=32, num_layers=1, d_ff=64, max_seq_len=128, attention=BASE))
    ids, labels = torch.randint(32, (2, 2, 40)).unbind()
    results = []
    for _ in range(2):
        loss = model(ids, labels=labels).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
        model.compile()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_compiled_model_generates_from_numbers_that_it_is_given() -> None:
    """inductor knows a number by the symbol of an input, not by that of another number that equals it."""
    unknown = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable[..., Any]:
        given = {x.node._expr for x in inputs if isinstance(x, torch.SymInt)}
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        numbers = [x for x in values if isinstance(x, torch.SymInt)]
        unknown.extend(x for x in numbers if not x.node.expr.free_symbols <= given)
        return graph.forward

    torch.manual_seed(0)
    layers = window_pattern(BASE, num_layers=2, window=8, full_every=2)
    model = Transformer(ModelConfig(vocab_size=32, num_layers=2, d_ff=64, max_seq_len=64, attention=layers))
    ids = torch.randint(32, (1, 9))
    eager = model.generate(ids, max_new_tokens=6)
    for block in model.model.layers:
        block.compile(backend=backend)
    assert torch.equal(model.generate(ids, max_new_tokens=6), eager)
    assert not unknown


@pytest.mark.parametrize(
    "config",
    [BASE, BASE.replace(window=9, num_sink_tokens=2), BASE.replace(causal=False)],
    ids=["causal", "window-sinks", "encoder"],
)
def test_export(config: AttentionConfig) -> None:
    torch.manual_seed(0)
    layer = SparseQueryAttention(config).eval()
    length = torch.export.Dim("length", min=16, max=512)
    program = torch.export.export(layer, (torch.randn(2, 40, 64),), dynamic_shapes={"x": {1: length}})
    exported = program.module()
    for n in LENGTHS:
        x = torch.randn(2, n, 64)
        torch.testing.assert_close(exported(x), layer(x))


def test_export_with_padding() -> None:
    layer, length = SparseQueryAttention(BASE), torch.export.Dim("length", min=2, max=512)
    lengths = {"x": {1: length}, "padding_mask": {1: length}}
    inputs = [(torch.randn(2, n, 64), {"padding_mask": torch.rand(2, n) < 0.8}) for n in (40, *LENGTHS)]
    exported = torch.export.export(layer, (inputs[0][0],), inputs[0][1], dynamic_shapes=lengths).module()
    for x, mask in inputs:
        torch.testing.assert_close(exported(x, **mask), layer(x, **mask))


def test_compiled_blocks_keep_no_gated_product() -> None:
    """Of the feed-forward gate and up are kept; their product, which down_proj reads, is computed again."""
    config = ModelConfig(vocab_size=16, num_layers=2, d_ff=72, max_seq_len=64, attention=BASE)
    model = Transformer(config)
    model.compile()
    ids = torch.randint(16, (2, 24), generator=torch.Generator().manual_seed(0))
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape == (48, 72):
            kept.add(tensor.data_ptr())
        return tensor

    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert len(kept) == 2 * config.num_layers
