"""Loss and gradients from hidden states against F.cross_entropy on whole logits."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sqa import ModelConfig, Transformer, losses, variant
from sqa.losses import IGNORE, linear_cross_entropy, linear_distillation, token_losses


def draw(rows: int, vocab: int, width: int, *, bias: bool = True, ignored: int = 0) -> tuple:
    """hidden, weight, bias, labels; the first `ignored` labels have no target."""
    generator = torch.Generator().manual_seed(rows * vocab + width)
    hidden, weight, vector = (torch.randn(s, generator=generator) for s in ((rows, width), (vocab, width), (vocab,)))
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[:ignored] = IGNORE
    leaves = [x.requires_grad_() for x in ((hidden, weight, vector) if bias else (hidden, weight))]
    return (*leaves, labels) if bias else (*leaves, None, labels)


def whole(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")


def gradients(loss: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))


def compare(function, args: tuple, factor: float = 1.0) -> None:
    """Values, and gradients of `factor` times the sum, as F.cross_entropy's."""
    got, expected = function(*args), whole(*args)
    torch.testing.assert_close(got, expected)
    got_grads, grads = (gradients(loss * factor, *args[:3]) for loss in (got, expected))
    for a, b in zip(got_grads, grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@given(
    rows=st.integers(1, 40),
    vocab=st.integers(1, 30),
    width=st.integers(1, 12),
    bias=st.booleans(),
    ignored=st.integers(0, 45),
    chunk=st.integers(1, 200),
)
def test_equals_cross_entropy(rows, vocab, width, bias, ignored, chunk) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.CHUNK_ELEMENTS, "cpu", chunk)
        compare(linear_cross_entropy, draw(rows, vocab, width, bias=bias, ignored=ignored), factor=0.37)


@pytest.mark.parametrize("rows", [7, 8, 9, 16, 17])
def test_chunk_borders(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 8 * 11)
    compare(linear_cross_entropy, draw(rows, 11, 5, ignored=2))


@pytest.mark.parametrize("rows", [9, 64])
def test_logits_never_exist_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest matrix with a vocabulary side, but for the weight, has CHUNK_ELEMENTS elements."""
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 5 * 23)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == 23:
                sizes.append(out.numel())
            return out

    hidden, weight, bias, labels = draw(rows, 23, 4)
    with Watch():
        linear_cross_entropy(hidden, weight, bias, labels).backward()
    assert sizes
    assert max(sizes) == 5 * 23


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 8 * 11)
    for rows in (20, 31):
        compare(functools.partial(linear_cross_entropy, compiled=True), draw(rows, 11, 5, ignored=2))


def test_batched_shapes_and_big_logits() -> None:
    hidden, weight, bias, labels = draw(12, 9, 5, ignored=3)
    flat = linear_cross_entropy(hidden, weight, bias, labels)
    torch.testing.assert_close(linear_cross_entropy(hidden.view(3, 4, 5), weight, bias, labels.view(3, 4)), flat)
    compare(linear_cross_entropy, ((hidden * 300).detach().requires_grad_(), weight, bias, labels))


def test_nothing_to_predict() -> None:
    args = draw(6, 5, 4, ignored=6)
    loss = linear_cross_entropy(*args)
    assert loss == 0
    assert not any(grad.any() for grad in gradients(loss, *args[:3]))


def test_ignored_rows_have_no_gradient() -> None:
    hidden, weight, bias, labels = draw(6, 5, 4, ignored=2)
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, bias, labels), hidden)
    assert not grad[:2].any()
    assert grad[2:].any(dim=1).all()


def test_sums_add_up_over_accumulation() -> None:
    """Two parts of different size give exactly the sum: no mean of means."""
    hidden, weight, bias, labels = draw(10, 7, 4, ignored=3)
    parts = sum(linear_cross_entropy(hidden[s], weight, bias, labels[s]) for s in (slice(0, 4), slice(4, 10)))
    torch.testing.assert_close(parts, linear_cross_entropy(hidden, weight, bias, labels))


def test_without_gradients() -> None:
    args = draw(9, 7, 4, ignored=1)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*args), whole(*args))
    frozen = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    assert not linear_cross_entropy(*frozen).requires_grad


def test_only_some_want_gradients() -> None:
    hidden, weight, _, labels = draw(9, 7, 4)
    frozen = weight.detach()
    (grad,) = torch.autograd.grad(linear_cross_entropy(hidden, frozen, None, labels), hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(whole(hidden, frozen, None, labels), hidden)[0])


def test_bf16_autocast_is_no_worse_than_pytorch() -> None:
    args = draw(200, 50, 32, ignored=5)
    exact = whole(*args)
    exact_grads = gradients(exact, *args[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, plain = linear_cross_entropy(*args), whole(*args)
    assert got.dtype == torch.float32
    assert (got - exact).abs() <= 2 * (plain - exact).abs() + 1e-5 * exact
    got_grads, plain_grads = gradients(got, *args[:3]), gradients(plain, *args[:3])
    for a, b, c in zip(got_grads, plain_grads, exact_grads, strict=True):
        assert a.dtype == torch.float32
        assert (a - c).norm() <= 2 * (b - c).norm()


def test_bf16_weights() -> None:
    hidden, weight, bias, labels = draw(64, 20, 16)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.detach().float().requires_grad_() for x in low]
    got, plain, true = linear_cross_entropy(*low, labels), whole(*low, labels), whole(*exact, labels)
    grads = [gradients(loss, *leaves) for loss, leaves in ((got, low), (plain, low), (true, exact))]
    for a, b, c in zip(*grads, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - c).norm() <= 2 * (b.float() - c).norm()


def test_tied_weights_get_both_gradients_once() -> None:
    torch.manual_seed(0)
    attention = variant("sqa", d_model=32, num_heads=4)
    shape = {"vocab_size": 20, "num_layers": 1, "d_ff": 32, "max_seq_len": 16, "attention": attention}
    model = Transformer(ModelConfig(**shape, tie_embeddings=True))
    ids, labels = torch.randint(20, (2, 9)), torch.randint(20, (2, 9))
    loss = model(ids, labels=labels).loss
    (got,) = torch.autograd.grad(loss, model.lm_head.weight)
    logits = model(ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, model.lm_head.weight)[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_token_losses(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 40)
    hidden, weight, bias, labels = (x.detach() for x in draw(12, 9, 5, ignored=3))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        nll, correct = token_losses(hidden.view(3, 4, 5), weight, bias, labels.view(3, 4))
        logits = F.linear(hidden, weight, bias).float()
    assert (nll.dtype, nll.shape, correct.dtype) == (torch.float32, (3, 4), torch.bool)
    torch.testing.assert_close(nll.flatten(), F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(correct.flatten(), (logits.argmax(1) == labels) & (labels != IGNORE))
    assert not nll.flatten()[:3].any()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_distillation_is_the_divergence_of_whole_logits(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, from a teacher of another width, with biases and without."""
    monkeypatch.setitem(losses.CHUNK_ELEMENTS, "cpu", 3 * 11)
    *own, _ = draw(10, 11, 5, bias=bias)
    *teacher, _ = (x if x is None else x.detach() for x in draw(10, 11, 7, bias=bias))
    got = linear_distillation(*own, tuple(teacher))
    log_p = [F.linear(*tensors).log_softmax(1) for tensors in (own, teacher)]
    expected = F.kl_div(*log_p, log_target=True, reduction="sum")
    torch.testing.assert_close(got, expected)
    for a, b in zip(gradients(got, *own), gradients(expected, *own), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear_distillation(*own, tuple(teacher)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("frozen", ["weight", "bias", "hidden"])
def test_what_is_frozen_gets_no_gradient_computed(frozen: str, dtype: torch.dtype) -> None:
    """A frozen head once cost its full gradient (vocabulary x width in fp32) and a product a chunk."""
    hidden, weight, bias, labels = draw(20, 11, 5)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    tensors[frozen] = tensors[frozen].detach()
    shapes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
                shapes.append(tuple(out.shape))
            return out

    with Watch(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(*tensors.values(), labels)
    gradient = {"weight": (11, 5), "bias": (1, 11), "hidden": (20, 5)}
    expected = {shape for name, shape in gradient.items() if name != frozen}
    assert {shape for shape in shapes if shape in gradient.values()} == expected
    leaves = [x for x in tensors.values() if x.requires_grad]
    got, wanted = (torch.autograd.grad(x, leaves) for x in (loss, whole(*tensors.values(), labels)))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 if dtype == torch.float32 else 0.5, rtol=1e-4)
