"""Heads chosen, cut, pooled and refitted, against brute force and least squares by other means."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sqa import AttentionConfig, ModelConfig, Rope, Transformer
from sqa.conversion import allocation, importance, surgery
from sqa.conversion.language_model import LanguageModel
from sqa.conversion.moments import Moments
from sqa.conversion.operation import operate
from sqa.conversion.settings import Settings
from sqa.conversion.subject import AttentionView, AttentionWeights, joined, watched
from sqa.data.batches import Batch

Make = Callable[..., ModelConfig]
Build = Callable[[ModelConfig], Transformer]


def read_by(subject: LanguageModel, batches: Sequence[Batch], index: int, projection: str) -> Tensor:
    """What one projection of a layer read on these batches, (N, F)."""
    with torch.no_grad(), watched([getattr(subject.views[index], projection)]) as seen:
        return torch.cat(
            [subject.tokens(seen[0][0], batch) for batch in batches if subject.hidden(batch) is not None]
        ).double()


def with_weights(
    subject: LanguageModel, shapes: Sequence[AttentionConfig], weights: Sequence[AttentionWeights]
) -> LanguageModel:
    changed = subject.with_heads(shapes)
    for view, values in zip(changed.views, weights, strict=True):
        view.write(values)
    return changed


def moments_of(x: Tensor, y: Tensor, *, constant: bool = False) -> Moments:
    moments = Moments(x.shape[1], y.shape[1], constant=constant)
    for part in range(0, len(x), 7):  # in pieces: sums do not care
        moments.add(x[part : part + 7], y[part : part + 7])
    return moments


def layer_view(heads: int, kv_heads: int, *, bias: bool = False, **options: object) -> AttentionView:
    config = AttentionConfig(d_model=24, num_heads=6, num_query_heads=heads, num_kv_heads=kv_heads, **options)
    generator = torch.Generator().manual_seed(heads)

    def linear(rows: int, columns: int) -> torch.nn.Linear:
        made = torch.nn.Linear(columns, rows, bias=bias)
        with torch.no_grad():
            made.weight.copy_(torch.randn(rows, columns, generator=generator))
            if bias:
                made.bias.copy_(torch.randn(rows, generator=generator))
        return made

    return AttentionView(
        config,
        linear(config.query_width, 24),
        linear(config.kv_width, 24),
        linear(config.kv_width, 24),
        linear(24, config.output_width),
    )


@pytest.mark.parametrize(
    ("counts", "asked", "expected"),
    [
        ((9, 3), (6, None), (6, 3, 3)),
        ((9, 3), (3, None), (3, 3, 3)),
        ((9, 3), (9, None), (9, 3, 3)),
        ((12, 12), (6, None), (6, 6, 1)),
        ((12, 12), (8, 4), (8, 4, 4)),
        ((12, 4), (4, 2), (4, 2, 2)),
        ((12, 4), (1, 1), (1, 1, 1)),
    ],
)
def test_pools(counts: tuple[int, int], asked: tuple[int, int | None], expected: tuple[int, int, int]) -> None:
    config = AttentionConfig(d_model=72, num_heads=36, num_query_heads=counts[0], num_kv_heads=counts[1])
    after, pools = surgery.plan_heads(config, *asked)
    assert (after.num_query_heads, after.num_kv_heads, len(pools)) == expected
    assert list(itertools.chain(*pools)) == list(range(counts[0]))
    assert len({len(pool) for pool in pools}) == 1
    assert asked[0] % len(pools) == 0


@pytest.mark.parametrize(
    ("counts", "asked", "message"),
    [
        ((9, 3), (4, None), r"query_heads must be a multiple of 3 KV heads, at most 9 \(3, 6, 9\), got 4"),
        ((9, 3), (12, None), r"\(3, 6, 9\), got 12"),
        ((9, 3), (0, None), r"\(3, 6, 9\), got 0"),
        ((9, 3), (6, 2), r"kv_heads must divide the model's 3 KV heads \(1, 3\), got 2"),
        ((9, 3), (6, 0), r"kv_heads must divide the model's 3 KV heads \(1, 3\), got 0"),
        ((12, 12), (13, None), "query_heads must be 1 to 12, got 13"),
        ((2, 4), (2, None), "fewer query than KV heads"),
    ],
)
def test_counts_that_do_not_fit(counts: tuple[int, int], asked: tuple[int, int | None], message: str) -> None:
    config = AttentionConfig(d_model=72, num_heads=36, num_query_heads=counts[0], num_kv_heads=counts[1])
    with pytest.raises(ValueError, match=message):
        surgery.plan_heads(config, *asked)


@given(
    features=st.integers(1, 9),
    kept=st.integers(1, 9),
    tokens=st.integers(1, 40),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_refitting_never_loses_on_its_own_text(features: int, kept: int, tokens: int, bias: bool, seed: int) -> None:
    kept = min(kept, features)
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(tokens, features, generator=generator).double() for _ in range(2))
    full = torch.randn(5, features, generator=generator).double()
    fit, held = (moments_of(z[:, :kept], z @ full.T, constant=bias) for z in (x, other))
    before = torch.cat([full[:, :kept], torch.zeros(5, 1)], dim=1).double() if bias else full[:, :kept]
    after = surgery.refit(before, fit, held)
    rounding = 1e-9
    assert fit.error(after) <= fit.error(before) + rounding
    assert held.error(after) <= held.error(before) + rounding


@pytest.mark.parametrize("bias", [False, True])
def test_refitting_is_least_squares(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator).double() + 0.5
    x[:, 8:] += x[:, :4]  # what leaves can be told from what stays
    y = x @ torch.randn(12, 6, generator=generator).double() + (0.7 if bias else 0.0)
    start = torch.zeros(6, 8 + bias, dtype=torch.float64)
    fitted = surgery.refit(start, moments_of(x[:, :8], y, constant=bias), moments_of(x[:, :8], y, constant=bias))
    design = torch.cat([x[:, :8], torch.ones(400, 1)], dim=1) if bias else x[:, :8]
    expected = torch.linalg.lstsq(design.double(), y).solution.T
    torch.testing.assert_close(fitted, expected, atol=1e-6, rtol=1e-6)  # the smallest damping is 1e-8


def test_the_penalty_is_the_one_with_the_lowest_error_on_held_out_text() -> None:
    """By augmented least squares, on so few and noisy tokens that neither the least nor the greatest penalty wins."""
    generator = torch.Generator().manual_seed(0)
    true, start = (torch.randn(6, 12, generator=generator).double() for _ in range(2))
    x, held_x = (torch.randn(size, 12, generator=generator).double() for size in (20, 200))
    y, held_y = (z @ true.T + torch.randn(len(z), 6, generator=generator).double() for z in (x, held_x))
    fits = []
    for share in surgery.DAMPING:
        ridge = (share * x.square().sum(0).mean()).sqrt() * torch.eye(12).double()
        fits.append(torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([y, ridge @ start.T])).solution.T)
    errors = [float((held_y - held_x @ fit.T).square().sum()) for fit in fits]
    best = errors.index(min(errors))
    assert 0 < best < len(fits) - 1
    torch.testing.assert_close(surgery.refit(start, moments_of(x, y), moments_of(held_x, held_y)), fits[best])


def test_refitting_leaves_as_they_were_the_columns_that_the_text_does_not_show() -> None:
    generator = torch.Generator().manual_seed(2)
    x, y, start = (torch.randn(*size, generator=generator).double() for size in ((200, 8), (200, 6), (6, 8)))
    x[:, 5] = 0
    fitted = surgery.refit(start, moments_of(x, y), moments_of(x, y))
    assert (fitted != start).any(0).tolist() == [i != 5 for i in range(8)]


def test_errors_are_those_of_the_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y, w = (torch.randn(*size, generator=generator).double() for size in ((50, 6), (50, 4), (4, 6)))
    expected = (y - x @ w.T).square().sum() / y.square().sum()
    assert moments_of(x, y).error(w) == pytest.approx(float(expected))


def test_importance_is_that_of_the_definition(config_of: Make, model_of: Build, batches: list[Batch]) -> None:
    subject = LanguageModel(model_of(config_of()))
    view, size = subject.views[0], subject.views[0].config.head_dim
    z = read_by(subject, batches, 0, "o")
    moments = moments_of(z, z @ joined(view.o).T)
    weight = view.o.weight.detach().double()
    norms = [
        (z[:, h * size : (h + 1) * size] @ weight[:, h * size : (h + 1) * size].T).square().sum().sqrt()
        for h in range(4)
    ]
    torch.testing.assert_close(importance.l2_norms(view, moments), torch.stack(norms))
    query = view.q.weight.detach().double()
    norms = [query[own].norm() * weight[:, own].norm() for own in (slice(h * size, (h + 1) * size) for h in range(4))]
    torch.testing.assert_close(importance.weight_norms(view), torch.stack(norms))


@pytest.mark.parametrize("bias", [False, True])
def test_elimination_drops_what_the_others_make_good_best(bias: bool) -> None:
    view = layer_view(6, 2, bias=bias)
    size = view.config.head_dim
    generator = torch.Generator().manual_seed(5)
    mix = torch.randn(24, 24, generator=generator).double()
    z = torch.randn(600, 24, generator=generator).double() @ mix * 0.3
    target = z @ view.o.weight.detach().double().T
    if bias:
        target = target + view.o.bias.detach()
    moments = moments_of(z, target, constant=bias)

    def loss(heads: Sequence[int]) -> float:
        own = z[:, [h * size + i for h in heads for i in range(size)]]
        design = torch.cat([own, torch.ones(600, 1).double()], dim=1) if bias else own
        return float((design @ torch.linalg.lstsq(design, target).solution - target).square().sum())

    pools = [[0, 1, 2], [3, 4, 5]]
    left = list(range(6))
    for _ in range(2):  # one head of each pool leaves
        allowed = [h for h in left if sum(h in pool and set(pool) <= set(left) for pool in pools)]
        dropped = min(allowed, key=lambda h: loss([other for other in left if other != h]))
        left.remove(dropped)
    kept = importance.choose_heads("greedy", view, moments, pools, 2, gate_gradients=None, generator=torch.Generator())
    assert kept == left


def test_gate_gradients(config_of: Make, model_of: Build, batches: list[Batch]) -> None:
    """Against the loss with one head's output scaled a little up and down, a sequence at a time."""
    subject = LanguageModel(model_of(config_of()))
    subject.model.double()
    found = importance.gate_gradients(subject, batches[:1])
    (batch,), size, step = batches[:1], subject.views[1].config.head_dim, 1e-2

    def scaled(row: int, head: int, factor: float) -> float:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            z = inputs[0].clone()
            z[row, :, head * size : (head + 1) * size] *= factor
            return (z,)

        handle = subject.views[1].o.register_forward_pre_hook(hook)
        with torch.no_grad():
            value = float(subject.loss(batch)) * len(batch)
        handle.remove()
        return value

    for head in range(4):
        slopes = [(scaled(row, head, 1 + step) - scaled(row, head, 1 - step)) / (2 * step) for row in range(2)]
        # the step squared, and the rounding of an fp32 loss over the step
        assert float(found[1][head]) == pytest.approx(sum(map(abs, slopes)), abs=2e-3, rel=1e-2)
    rows = [batch.take(slice(row, row + 1), subject.device) for row in range(len(batch))]
    for together, apart in zip(found, importance.gate_gradients(subject, rows), strict=True):
        torch.testing.assert_close(together, apart)


def test_heads_that_read_no_kept_kv_head_go() -> None:
    """What stays of a layer without some of its KV heads is what those heads computed before."""
    view = layer_view(6, 3)
    after, pools = surgery.plan_without(view.config, 2, [0, 2])
    assert (after.num_query_heads, after.num_kv_heads, pools) == (2, 2, [range(2), range(4, 6)])
    weights = surgery.cut(view, after.num_kv_heads, [1, 4])
    for got, linear, heads in ((weights.q, view.q, (1, 4)), (weights.k, view.k, (0, 2)), (weights.v, view.v, (0, 2))):
        rows = linear.weight.detach().double().split(4)
        torch.testing.assert_close(got[:, :24], torch.cat([rows[head] for head in heads]))
    columns = view.o.weight.detach().double().split(4, dim=1)
    torch.testing.assert_close(weights.o, torch.cat([columns[1], columns[4]], dim=1))


@pytest.mark.parametrize("method", importance.METHODS)
def test_every_method_keeps_heads_of_the_pools_alone(method: str) -> None:
    view = layer_view(6, 3)
    z = torch.randn(80, 24, generator=torch.Generator().manual_seed(2)).double()
    moments = moments_of(z, z @ joined(view.o).T)
    _, pools = surgery.plan_without(view.config, 2, [0, 2])
    options = {"gate_gradients": torch.arange(6.0), "generator": torch.Generator().manual_seed(0)}
    kept = importance.choose_heads(method, view, moments, pools, 1, **options)
    assert [sum(head in pool for head in kept) for pool in pools] == [1, 1]
    if method == "greedy":  # of each pair the head whose absence the three others' outputs make good worst
        target, heads = z @ joined(view.o).T, z.split(4, dim=1)

        def error(left: Sequence[int]) -> float:
            own = torch.cat([heads[head] for head in left], dim=1)
            return float((own @ torch.linalg.lstsq(own, target).solution - target).square().sum())

        first = min((0, 1, 4, 5), key=lambda head: error([h for h in (0, 1, 4, 5) if h != head]))
        rest = [h for h in (0, 1, 4, 5) if h != first]
        others = [h for h in rest if h not in range(first // 4 * 4, first // 4 * 4 + 2)]
        second = min(others, key=lambda head: error([h for h in rest if h != head]))
        assert kept == [h for h in rest if h != second]


def test_a_layer_keeps_the_kv_heads_whose_query_heads_add_most() -> None:
    config = AttentionConfig(d_model=24, num_heads=6, num_kv_heads=3)
    norms = torch.tensor([1.0, 5.0, 4.0, 4.0, 2.0, 3.0])
    for counts, pools in (
        ((1, 1), [range(2)]),  # the best single head
        ((2, 1), [range(2, 4)]),  # 32 together beside 26 and 13
        ((2, 2), [range(2), range(2, 4)]),
        ((6, 3), [range(2), range(2, 4), range(4, 6)]),
    ):
        after, found = allocation.plan_layer(config, norms, *counts)
        assert ((after.num_query_heads, after.num_kv_heads), found) == (counts, pools)
    multi_head = config.replace(num_kv_heads=6)
    assert allocation.plan_layer(multi_head, norms, 2, 2) == surgery.plan_heads(multi_head, 2, None)


def test_random_heads_follow_the_seed() -> None:
    view = layer_view(6, 2)
    chosen = [
        importance.choose_heads(
            "random",
            view,
            Moments(24, 24, constant=False),
            [[0, 1, 2], [3, 4, 5]],
            1,
            gate_gradients=None,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (*range(8), *range(8))
    ]
    assert chosen[:8] == chosen[8:]
    assert len({tuple(heads) for heads in chosen}) > 1


def test_a_layers_cost_is_half_the_curvature_of_the_loss_along_its_error(
    config_of: Make, model_of: Build, batches: list[Batch]
) -> None:
    """Errors of a ridge refit by augmented least squares, and the gradients of a token's loss by the layer's output."""
    subject = LanguageModel(model_of(config_of()))
    found = allocation.layer_choices(subject, batches, [[(1, 1), (2, 2), (4, 2)]] * len(subject.views))
    for index, (view, choices) in enumerate(zip(subject.views, found, strict=True)):
        size, weight = view.config.head_dim, joined(view.o)
        z, slopes = read_by(subject, batches, index, "o"), []
        for batch in batches:
            with watched([view.o]) as seen:
                loss = subject.loss(batch) * batch.input_ids.numel()
            slopes.append(subject.tokens(torch.autograd.grad(loss, seen[0][1])[0], batch).double())
        slope = torch.cat(slopes)
        assert choices[4].cost == pytest.approx(0.0, abs=1e-9 * choices[2].cost)
        for count in (1, 2):
            _, pools = choices[count].plan
            kept = importance.choose_heads(
                "l2", view, moments_of(z, z), pools, 1, gate_gradients=None, generator=torch.Generator()
            )
            stay = torch.isin(torch.arange(z.shape[1]) // size, torch.tensor(kept))
            lost = z[:, ~stay] @ weight[:, ~stay].T
            own = z[:, stay]
            ridge = (1e-4 * own.square().sum(0).mean()).sqrt() * torch.eye(own.shape[1]).double()
            change = torch.linalg.lstsq(torch.cat([own, ridge]), torch.cat([lost, lost.new_zeros(len(ridge), 48)]))
            error = lost - own @ change.solution
            curvature = (slope.T @ slope / len(z)) @ (error.T @ error / len(z))
            assert choices[count].cost == pytest.approx(float(curvature.trace()) / 2)


@given(costs=st.lists(st.dictionaries(st.integers(1, 8), st.floats(0, 9), min_size=1), min_size=1, max_size=4))
def test_an_allocation_is_the_cheapest_of_all(costs: list[dict[int, float]]) -> None:
    totals: dict[int, float] = {}
    for counts in itertools.product(*costs):
        cost = sum(layer[count] for layer, count in zip(costs, counts, strict=True))
        totals[sum(counts)] = min(cost, totals.get(sum(counts), cost))
    for total, cheapest in totals.items():
        found = allocation.allocate(costs, total)
        assert sum(found) == total
        assert sum(layer[count] for layer, count in zip(costs, found, strict=True)) == pytest.approx(cheapest)


def test_gate_gradients_are_sums_of_sizes_over_sequences(
    config_of: Make, model_of: Build, batches: list[Batch]
) -> None:
    """Gates of each sequence on its own, by autograd: their signs differ."""
    subject = LanguageModel(model_of(config_of()))
    layer, total, signs = 0, torch.zeros(4), set()
    for batch in batches:
        gates = torch.ones(len(batch), 1, 4, 1, requires_grad=True)
        hook = subject.views[layer].o.register_forward_pre_hook(
            lambda module, inputs, gates=gates: ((inputs[0].unflatten(-1, (4, -1)) * gates).flatten(-2),)
        )
        with hook:
            (slopes,) = torch.autograd.grad(subject.loss(batch) * len(batch), gates)
        total += slopes.abs().sum((0, 1, 3))
        signs |= set(slopes.sign().flatten().tolist())
    assert signs == {-1.0, 1.0}
    found = importance.gate_gradients(subject, batches)[layer]
    torch.testing.assert_close(found.float(), total, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("method", importance.METHODS)
def test_every_method_keeps_as_many_of_each_pool(method: str) -> None:
    view = layer_view(6, 2)
    z = torch.randn(80, 24, generator=torch.Generator().manual_seed(2)).double()
    moments = moments_of(z, z @ joined(view.o).T)
    kept = importance.choose_heads(
        method,
        view,
        moments,
        [[0, 1, 2], [3, 4, 5]],
        1,
        gate_gradients=torch.arange(6.0),
        generator=torch.Generator().manual_seed(0),
    )
    assert [head // 3 for head in kept] == [0, 1]
    if method == "taylor":
        assert kept == [2, 5]


def rotation_inside_pairs(head_dim: int, interleaved: bool, seed: int) -> Tensor:
    angles = torch.rand(head_dim // 2, generator=torch.Generator().manual_seed(seed)).double() * 2 * math.pi
    turn = torch.zeros(head_dim, head_dim, dtype=torch.float64)
    for j, angle in enumerate(angles):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + head_dim // 2)
        turn[a, a] = turn[b, b] = angle.cos()
        turn[b, a], turn[a, b] = angle.sin(), -angle.sin()
    return turn


@pytest.mark.parametrize("rope", [Rope(), Rope(interleaved=True), None])
def test_aligned_pooling_undoes_rotations_that_change_nothing(
    rope: Rope | None, model_of: Build, batches: list[Batch]
) -> None:
    """KV heads that are one head in disguise pool into it without loss; their plain mean does not."""
    attention = AttentionConfig(d_model=24, num_heads=4, num_query_heads=4, num_kv_heads=4, rope=rope, qkv_bias=True)
    config = ModelConfig(vocab_size=300, num_layers=1, d_ff=16, max_seq_len=64, attention=attention)
    model = model_of(config)
    layer = model.model.layers[0].self_attn
    size = attention.head_dim
    with torch.no_grad():
        for head in range(1, 4):
            own, first = slice(head * size, (head + 1) * size), slice(head // 2 * 2 * size, (head // 2 * 2 + 1) * size)
            if head == 2:
                continue
            turn_k = rotation_inside_pairs(size, bool(rope and rope.interleaved), head)
            if rope is None:
                turn_k = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(9)).double())[
                    0
                ]
            turn_v = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(head)).double())[0]
            for name, turn in (("k", turn_k), ("v", turn_v)):
                projection = getattr(layer, f"{name}_proj")
                projection.weight[own] = (turn @ projection.weight[first].double()).float()
                projection.bias[own] = (turn @ projection.bias[first].double()).float()
    subject = LanguageModel(model)
    view = subject.views[0]
    inputs = Moments(24, 0, constant=True)
    inputs.add(read_by(subject, batches, 0, "q"))
    pooled = {
        how: with_weights(subject, [attention.replace(num_kv_heads=2)], [surgery.cut(view, 2, range(4), x)])
        for how, x in (("aligned", inputs), ("mean", None))
    }
    expected = model(batches[0].input_ids).logits.detach()
    got = {how: (changed.model(batches[0].input_ids).logits - expected).abs().max() for how, changed in pooled.items()}
    scale = expected.abs().max()
    assert got["aligned"] < 1e-4 * scale  # fp32 weights through three products
    assert got["mean"] > 1e-2 * scale


def test_heads_are_aligned_on_the_inputs_that_there_are() -> None:
    """Values that are one in disguise on every input pool without loss, whatever they are where no input is."""
    view = layer_view(2, 2)
    size, generator = view.config.head_dim, torch.Generator().manual_seed(7)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    x = torch.zeros(50, 24, dtype=torch.float64)
    x[:, :12] = torch.randn(50, 12, generator=generator)
    with torch.no_grad():
        view.v.weight[size:, :12] = (turn @ view.v.weight[:size, :12].double()).float()
    inputs = Moments(24, 0, constant=True)
    inputs.add(x)
    weights = surgery.cut(view, 1, range(2), inputs)
    for head in range(2):
        own = slice(head * size, (head + 1) * size)
        before = x @ (view.o.weight[:, own] @ view.v.weight[own]).detach().double().T
        after = x @ (weights.o[:, own] @ weights.v[:, :24]).T
        torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)  # the turned weights are fp32


def test_under_qk_norm_keys_are_not_turned() -> None:
    view = layer_view(4, 4, qk_norm=True)
    inputs = Moments(24, 0, constant=True)
    inputs.add(torch.randn(50, 24, generator=torch.Generator().manual_seed(0)))
    weights = surgery.cut(view, 2, range(4), inputs)
    torch.testing.assert_close(weights.q[:, :24], view.q.weight.detach().double())
    mean = view.k.weight.detach().double().view(2, 2, -1, 24).mean(1).flatten(0, 1)
    torch.testing.assert_close(weights.k[:, :24], mean)


@pytest.mark.parametrize("kept", [(0, 1, 2, 3), (1, 3)])
def test_heads_that_keep_their_keys_compute_what_they_did(
    kept: tuple[int, ...], config_of: Make, model_of: Build, batches: list[Batch]
) -> None:
    """Dropping heads equals zeroing their output columns; dropping none changes no bit."""
    config = config_of(bias=True, qkv_bias=True)
    model = model_of(config)
    subject = LanguageModel(model)
    after, _ = surgery.plan_heads(config.layers[0], len(kept), None)
    weights = [surgery.cut(view, after.num_kv_heads, kept) for view in subject.views]
    cut = with_weights(subject, [after] * 2, weights).model
    size = config.layers[0].head_dim
    with torch.no_grad():
        for view in subject.views:
            for head in set(range(4)) - set(kept):
                view.o.weight[:, head * size : (head + 1) * size] = 0
    ids = batches[0].input_ids
    if len(kept) == 4:
        assert torch.equal(cut(ids).logits, model(ids).logits)
    else:
        torch.testing.assert_close(cut(ids).logits, model(ids).logits)


@pytest.mark.parametrize("pooling", ["aligned", "mean"])
def test_an_operation_chooses_and_fits_on_one_text_and_measures_on_the_other(
    pooling: str, config_of: Make, model_of: Build, batches: list[Batch]
) -> None:
    original = LanguageModel(model_of(config_of(num_query_heads=8, num_kv_heads=8)))
    fit, held = batches[:2], batches[2:]
    plans = [surgery.plan_heads(view.config, 4, 2) for view in original.views]
    settings = Settings(query_heads=4, kv_heads=2, pooling=pooling)  # type: ignore[arg-type]
    dropped, refitted, changes = operate(settings, original, plans, fit, held)
    chosen = []
    for index, (view, change) in enumerate(zip(original.views, changes, strict=True)):
        kept, other = (
            importance.choose_heads(
                "l2", view, moments_of(z, z), plans[index][1], 2, gate_gradients=None, generator=torch.Generator()
            )
            for z in (read_by(original, part, index, "o") for part in (fit, held))
        )
        chosen.append((kept, other))
        assert list(change.kept) == kept
        inputs = Moments(48, 0, constant=True)
        inputs.add(read_by(original, fit, index, "q"))
        weights = surgery.cut(view, 2, kept, inputs if pooling == "aligned" else None)
        for name in ("q", "k", "v", "o"):
            written = getattr(dropped.views[index], name).weight.detach().double()
            torch.testing.assert_close(written, getattr(weights, name)[:, : written.shape[1]], atol=1e-6, rtol=1e-6)

        reads: list[Moments] = []
        for part in (fit, held):
            pairs = []
            for batch in part:
                with torch.no_grad(), watched([dropped.views[index].o]) as seen:
                    x, target = list(original.layers(batch))[index]
                    dropped.attend(index, x, batch)
                pairs.append((seen[0][0].flatten(0, 1), target.flatten(0, 1)))
            reads.append(moments_of(*(torch.cat(each).double() for each in zip(*pairs, strict=True))))
        expected = surgery.refit(weights.o, *reads)
        torch.testing.assert_close(joined(refitted.views[index].o), expected, atol=1e-5, rtol=1e-5)
        assert change.dropped == pytest.approx(reads[1].error(weights.o))
        assert change.refitted == pytest.approx(reads[1].error(expected))
    assert any(kept != other for kept, other in chosen)


def test_random_heads_of_an_operation_follow_the_seed_of_its_settings(
    config_of: Make, model_of: Build, batches: list[Batch]
) -> None:
    original = LanguageModel(model_of(config_of()))
    plans = [surgery.plan_heads(view.config, 2, None) for view in original.views]
    kept = []
    for seed in (0, 1, 2, 3, 0):
        settings = Settings(query_heads=2, method="random", seed=seed)
        _, _, changes = operate(settings, original, plans, batches[:1], batches[:1])
        kept.append([change.kept for change in changes])
    assert kept[0] == kept[4]
    assert any(kept[0] != other for other in kept)
