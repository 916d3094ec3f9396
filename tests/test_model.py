"""The Transformer: names, files, losses, generation, encoders."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sqa import KVCache, ModelConfig, SparseQueryAttention, Transformer, variant, window_pattern
from sqa.attention.kernels import KERNELS, Kernel
from sqa.attention.rope import RotaryEmbedding
from sqa.model import sample
from sqa.variants import preset

VOCAB = 32


def config(**changes) -> ModelConfig:
    fields = {
        "vocab_size": VOCAB,
        "num_layers": 3,
        "d_ff": 48,
        "max_seq_len": 40,
        "attention": variant("sqa", d_model=32, num_heads=4),
    }
    return ModelConfig(**{**fields, **changes})


def make(seed: int = 0, **changes) -> Transformer:
    """A model whose weights are large enough to prefer some tokens to others."""
    torch.manual_seed(seed)
    model = Transformer(config(**changes)).eval()
    for name, parameter in model.named_parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
        if "norm" in name:
            parameter.data += 0.1
    return model


LAYERS = (
    variant("gqa", d_model=32, num_heads=4),
    variant("xsqa", d_model=32, num_heads=4, window=5, num_sink_tokens=1),
    variant("rsqa", d_model=32, num_heads=4, qk_norm=True),
)
MODELS = {
    "plain": {},
    "published": {"bias": True, "final_norm": False},
    "tied": {"tie_embeddings": True},
    "per-layer": {"attention": LAYERS, "bias": True},
    "windows": {"attention": window_pattern(variant("sqa", d_model=32, num_heads=4), num_layers=3, window=4)},
}


def test_parameter_names_are_llamas() -> None:
    names = set(make(num_layers=1).state_dict())
    block = "model.layers.0."
    attention = {f"{block}self_attn.{x}_proj.weight" for x in "qkvo"}
    feed_forward = {f"{block}mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    norms = {f"{block}input_layernorm.weight", f"{block}post_attention_layernorm.weight", "model.norm.weight"}
    assert names == {"model.embed_tokens.weight", "lm_head.weight"} | attention | feed_forward | norms


def test_biases_of_the_published_shape() -> None:
    names = {name for name in make(num_layers=1, bias=True, final_norm=False).state_dict() if name.endswith("bias")}
    block = "model.layers.0."
    expected = {f"{block}mlp.{x}_proj.bias" for x in ("gate", "up", "down")}
    assert names == {*expected, f"{block}self_attn.o_proj.bias", "lm_head.bias"}


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = Transformer(config(num_layers=8, bias=True, attention=variant("sqa", d_model=256, num_heads=4)))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_save_and_load_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(**MODELS[name]).to(dtype)
    model.save(tmp_path / "new" / "folder")
    loaded = Transformer.load(tmp_path / "new" / "folder").eval()
    assert loaded.config == model.config
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == dtype
        assert torch.equal(loaded.state_dict()[key], value)
    ids = torch.randint(VOCAB, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tied = model.config.tie_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "new" / "folder" / "model.safetensors")) != tied
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def _config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object"),
        (lambda d: _config(d, model_type="bert"), "model_type 'bert'"),
        (lambda d: _config(d, d_fff=3), "no field 'd_fff'; did you mean 'd_ff'"),
        (lambda d: _config(d, d_ff=50), r"gate_proj.weight is \(48, 32\), expected \(50, 32\)"),
        (lambda d: _config(d, num_layers=2), "unknown model.layers.2"),
        (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\x80" * 99), "damaged or incomplete"),
        (lambda d: _tensors(d, lambda t: t.pop("model.norm.weight")), "missing model.norm.weight"),
        (lambda d: _tensors(d, lambda t: t.update(extra=torch.ones(1))), "unknown extra"),
        (
            lambda d: _tensors(d, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})),
            "weight is int8, expected",
        ),
        (lambda d: (d / "config.json").write_text("[" * 200_000), "is not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files(damage, message: str, tmp_path: Path) -> None:
    make().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        Transformer.load(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no directory"):
        Transformer.load(tmp_path / "absent")


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_the_mean_over_real_labels(name: str) -> None:
    model = make(**MODELS[name])
    ids, labels = torch.randint(VOCAB, (2, 9)), torch.randint(VOCAB, (2, 9))
    labels[0, 4:] = -100
    out = model(ids, labels=labels)
    logits = model(ids).logits
    torch.testing.assert_close(out.loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    assert out.num_tokens == 13
    torch.testing.assert_close(out.nll_sum / 13, out.loss)
    assert out.logits is None
    nll, correct = model.token_losses(ids, labels)
    torch.testing.assert_close(nll.sum(), out.nll_sum)
    assert correct.sum() == (logits.argmax(-1) == labels).sum()


def test_shapes_are_known_on_the_meta_device() -> None:
    model = Transformer(config(**MODELS["windows"])).to("meta")
    assert model(torch.zeros(2, 9, dtype=torch.long, device="meta")).logits.shape == (2, 9, VOCAB)


def test_last_logits_alone() -> None:
    model, ids = make(), torch.randint(VOCAB, (2, 9))
    torch.testing.assert_close(model(ids, num_logits=2).logits, model(ids).logits[:, -2:])


@pytest.mark.parametrize("name", ["sqa", "rsqa", "wide-gqa"])
def test_encoder_with_padding(name: str) -> None:
    model = make(attention=variant(name, d_model=64, num_heads=8, causal=False))
    ids = torch.randint(VOCAB, (2, 9))
    real = torch.arange(9) < torch.tensor([[9], [5]])
    padded, alone = model(ids, padding_mask=real).logits, model(ids[1:, :5]).logits
    torch.testing.assert_close(padded[1:, :5], alone)
    assert not torch.allclose(model(ids).logits[1, :5], alone[0])
    with pytest.raises(ValueError, match="got causal=False"):
        model.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: m(ids[0]), r"input_ids must be \(B, T\), got \(9,\)"),
        (lambda m, ids: m(ids.float()), "input_ids must be a tensor of int64 or int32, got torch.float32"),
        (lambda m, ids: m(ids.byte()), "input_ids must be a tensor of int64 or int32, got torch.uint8"),
        (
            lambda m, ids: m.generate(ids.tolist(), max_new_tokens=2),
            "input_ids must be a tensor of int64 or int32, got",
        ),
        (lambda m, ids: m(ids, ids.float()), "labels must be a tensor of int64 or int32, got torch.float32"),
        (lambda m, ids: m(ids, ids.tolist()), r"labels must be a tensor of int64 or int32, got \[\["),
        (lambda m, ids: m(ids + VOCAB), r"input_ids must be from 0 to vocab_size - 1 = 31, got \d\d"),
        (lambda m, ids: m(ids - VOCAB), r"input_ids must be from 0 to vocab_size - 1 = 31, got -\d"),
        (lambda m, ids: m(ids, labels=ids + VOCAB), r"labels must be from 0 to vocab_size - 1 = 31, got \d\d"),
        (lambda m, ids: m(ids, labels=ids - 5), r"labels must be from 0 to vocab_size - 1 = 31, got -5"),
        (lambda m, ids: m(ids, num_logits="x"), "num_logits must be a whole number of at least 1, got 'x'"),
        (lambda m, ids: m(ids, cache=5), "cache must be a KVCache or None, got 5"),
        (lambda m, ids: m.save(""), "save needs the name of a directory, got ''"),
        (lambda m, ids: Transformer(None), "model: config must be a ModelConfig, got None"),
        (lambda m, ids: m(ids, labels=ids[:, 1:]), r"labels must be \(2, 9\) as input_ids, got \(2, 8\)"),
        (lambda m, ids: m(ids.repeat(1, 5)), "45 tokens, but the model's max_seq_len is 40"),
        (lambda m, ids: m(ids, padding_mask=torch.ones(2, 8) > 0), r"padding_mask must be \(2, 9\), got \(2, 8\)"),
    ],
)
def test_forward_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make(), torch.zeros(2, 9, dtype=torch.long))


@torch.no_grad()
def slowly(model: Transformer, ids: Tensor, count: int) -> Tensor:
    """Greedy continuation with the whole text read again for every token."""
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_reading_everything_again(name: str) -> None:
    model = make(**MODELS[name])
    ids = torch.randint(VOCAB, (3, 6))
    got = model.generate(ids, max_new_tokens=20)
    assert torch.equal(got, slowly(model, ids, 20))
    assert len(got[:, 6:].unique()) > 1


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_batch_equals_single_rows(name: str) -> None:
    model = make(**MODELS[name])
    prompts = [torch.randint(VOCAB, (1, n)) for n in (2, 9, 5)]
    batch = torch.cat([F.pad(prompt, (9 - prompt.shape[1], 0)) for prompt in prompts])
    real = torch.arange(9) >= torch.tensor([[9 - prompt.shape[1]] for prompt in prompts])
    together = model.generate(batch, max_new_tokens=15, padding_mask=real)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[-15:], model.generate(prompt, max_new_tokens=15)[0, -15:])


def test_end_id_fills_the_row_and_stops() -> None:
    model = make()
    ids = torch.randint(VOCAB, (3, 6))
    free = model.generate(ids, max_new_tokens=20)[:, 6:]
    end = int(free[0, 3])
    got = model.generate(ids, max_new_tokens=20, end_id=end)[:, 6:]
    stops = [row.index(end) if end in row else 20 for row in free.tolist()]
    assert got.shape[1] == min(20, max(stops) + 1)
    for row, before, stop in zip(got.tolist(), free.tolist(), stops, strict=True):
        assert row[:stop] == before[:stop][: len(row)]
        assert set(row[stop:]) <= {end}
    assert model.generate(ids[:1], max_new_tokens=20, end_id=end).shape[1] == 6 + stops[0] + 1


def test_generation_is_repeatable_and_ignores_the_mode() -> None:
    model = make()
    ids = torch.randint(VOCAB, (2, 6))

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids, max_new_tokens=12, temperature=1.0, generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1)[:, :6], ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.5}, "temperature must be 0 or more, got -0.5"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"temperature": "x"}, "temperature must be a number, got 'x'"),
        ({"top_k": 1.5}, "top_k must be a whole number, got 1.5"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": torch.ones(2)}, r"temperature must be a number, got tensor\(\[1., 1.\]\)"),
        ({"top_p": 10**400}, "top_p must be a number, got 1000"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"end_id": 1.5}, "end_id must be a whole number, got 1.5"),
        ({"end_id": [1, True]}, "end_id must be a whole number, got True"),
        ({"end_id": "2"}, "end_id must be a whole number, got '2'"),
        ({"padding_mask": torch.ones(6) > 0}, r"padding_mask must be bool \(1, 6\), got \(6,\)"),
        ({"padding_mask": [[True] * 6]}, r"padding_mask must be bool \(1, 6\), got \[\[True"),
        ({"generator": 5}, "generator must be a torch.Generator or None, got 5"),
        ({"max_new_tokens": 35}, "6 prompt tokens and 35 new ones exceed max_seq_len=40"),
    ],
)
def test_generate_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().generate(torch.zeros(1, 6, dtype=torch.long), **{"max_new_tokens": 3, **changes})


@pytest.mark.parametrize("end_id", [[3, 5], (3, 5), {3, 5}, range(3, 6, 2), np.array([3, 5]), torch.tensor([3, 5])])
def test_several_ids_end_a_text_in_any_collection(end_id: Any) -> None:
    model, ids = make(), torch.randint(VOCAB, (4, 6))
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": math.inf}
    seed = torch.Generator().manual_seed
    new = model.generate(ids, end_id=end_id, generator=seed(0), **options)[:, 6:].tolist()
    free = model.generate(ids, generator=seed(0), **options)[:, 6:].tolist()
    ended = [min((i for i, token in enumerate(row) if token in (3, 5)), default=len(row)) for row in free]
    assert min(ended) < 29
    for row, other, end in zip(new, free, ended, strict=True):
        assert row[: end + 1] == other[: len(row)][: end + 1]
        assert set(row[end:]) <= {3, 5}
        assert len(set(row[end:])) <= 1  # a row goes on with the id that ended it


def test_numbers_of_other_libraries_and_any_temperature_are_taken() -> None:
    model, ids = make(), torch.randint(VOCAB, (1, 6))
    seed = torch.Generator().manual_seed
    plain = model.generate(ids, max_new_tokens=8, temperature=0.5, top_k=4, top_p=0.5, end_id=3, generator=seed(0))
    for whole, real in ((np.int64, np.float32), (torch.tensor, torch.tensor)):
        given = {"max_new_tokens": whole(8), "top_k": whole(4), "temperature": real(0.5), "top_p": real(0.5)}
        assert torch.equal(model.generate(ids, **given, end_id=whole(3), generator=seed(0)), plain)
    counts = frequencies([9.0, 0.0, -9.0], temperature=math.inf)
    torch.testing.assert_close(counts, torch.full((3,), 1 / 3), atol=0.02, rtol=0)  # six deviations


def test_generate_to_the_very_end() -> None:
    assert make().generate(torch.zeros(1, 6, dtype=torch.long), max_new_tokens=34).shape == (1, 40)


def frequencies(logits: list[float], **options) -> Tensor:
    torch.manual_seed(0)
    drawn = sample(torch.tensor([logits]).expand(20_000, -1), **options)
    return drawn.bincount(minlength=len(logits)) / 20_000


LOGITS = [1.0, 3.0, 2.0, 0.0, -1.0]  # probabilities .086 .633 .233 .032 .012 (rounded)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 1.0, "top_k": 2}, [1, 2]),
        ({"temperature": 1.0, "top_k": 9}, [0, 1, 2, 3, 4]),
        ({"temperature": 1.0, "top_p": 0.5}, [1]),
        ({"temperature": 1.0, "top_p": 0.7}, [1, 2]),
        ({"temperature": 1.0, "top_p": 0.9}, [0, 1, 2]),
        ({"temperature": 1.0, "top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.6}, [1, 2]),
    ],
)
def test_sampling(options: dict, kept: list[int]) -> None:
    expected = torch.zeros(5)
    expected[kept] = (torch.tensor(LOGITS)[kept] / options["temperature"]).softmax(0)
    torch.testing.assert_close(frequencies(LOGITS, **options), expected, atol=0.012, rtol=0)


def test_temperature_zero_is_greedy() -> None:
    for temperature in (0.0, 1e-300):
        assert frequencies(LOGITS, temperature=temperature)[1] == 1


def test_generate_refuses_right_padding_and_empty_prompts() -> None:
    model = Transformer(preset("demo", "sqa"))
    ids = torch.ones(2, 4, dtype=torch.long)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(ids, max_new_tokens=1, padding_mask=mask)
    with pytest.raises(ValueError, match="T of at least 1"):
        model.generate(ids[:, :0], max_new_tokens=1)
    with pytest.raises(ValueError, match="num_logits must be a whole number of at least 1, got 0"):
        model(ids, num_logits=0)


def test_a_cache_of_another_layer_is_refused() -> None:
    config = variant("sqa", d_model=64, num_heads=8)
    x = torch.randn(1, 3, 64)
    for other, message in (
        (config.replace(window=2), "made for window=2, got None"),
        (config.replace(num_kv_heads=1), "made for num_kv_heads=1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseQueryAttention(config)(x, cache=KVCache(other, batch_size=1, capacity=4))
    with pytest.raises(ValueError, match="made for 1 layers, got layer 1"):
        SparseQueryAttention(config, layer_index=1)(x, cache=KVCache(config, batch_size=1, capacity=4))
    with pytest.raises(ValueError, match="dtype must be a floating-point one"):
        KVCache(config, batch_size=1, capacity=4, dtype=torch.int32)


def test_a_model_with_a_cache_takes_no_documents() -> None:
    model, ids = make(), torch.zeros(2, 6, dtype=torch.long)
    cache = KVCache(model.config, batch_size=2, capacity=9)
    with pytest.raises(ValueError, match="a cache holds one document a row"):
        model(ids, document_ids=torch.arange(6).expand(2, 6) // 3, cache=cache)
    assert cache.length == 0


def test_a_cache_for_fewer_layers_is_refused() -> None:
    model = make(**MODELS["per-layer"])
    with pytest.raises(ValueError, match="made for 1 layers, got layer 1"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=KVCache(model.config.layers[:1], batch_size=1, capacity=4))


def test_a_label_that_is_no_token_is_an_error_not_token_zero() -> None:
    model = Transformer(preset("demo", "sqa"))
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="labels must be from 0 to vocab_size - 1 = 511, got -1"):
        model(ids, torch.full_like(ids, -1))


def test_tied_matrices_stay_one(tmp_path: Path) -> None:
    tied = {"tie_embeddings": True}
    with torch.device("meta"):
        model = Transformer(config(**tied))
    model.to_empty(device="cpu")
    model.load_state_dict(make(**tied).state_dict(), assign=True)
    whole = torch.nn.Sequential(model)
    whole.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()}, assign=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    model.save(tmp_path)
    torch.testing.assert_close(Transformer.load(tmp_path)(ids).logits, model(ids).logits)


class Adapted(torch.nn.Linear):
    """A head with an addition that its weight does not show, as adapters are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.linspace(1, 2, VOCAB)


@pytest.mark.parametrize("way", ["module", "hook", "pre-hook"])
def test_what_a_head_does_beyond_its_weights_is_in_the_loss(way: str) -> None:
    model = make()
    if way == "module":
        model.lm_head = Adapted(32, VOCAB)
    elif way == "hook":
        model.lm_head.register_forward_hook(lambda module, inputs, output: output.flip(-1))
    else:
        model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(-1),))
    ids, labels = torch.randint(VOCAB, (2, 2, 9)).unbind()
    labels[:, 3] = -100
    wanted = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 9)
    output = model(ids, labels)
    torch.testing.assert_close(output.nll_sum, wanted.sum())
    torch.testing.assert_close(model.token_losses(ids, labels)[0], wanted.detach())
    gradients = [torch.autograd.grad(x, [*model.parameters()]) for x in (output.nll_sum, wanted.sum())]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="labels must be from 0 to vocab_size - 1 = 31, got -1"):
        model(ids, torch.full_like(ids, -1))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_torch_func_gives_the_gradients_of_each_row() -> None:
    model = make()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    ids, labels = torch.randint(VOCAB, (2, 2, 9)).unbind()

    def loss(weights: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (ids[None], labels[None])).loss

    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, ids, labels)
    for row in range(2):
        model.zero_grad()
        model(ids[row : row + 1], labels[row : row + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(rows[name][row], parameter.grad, atol=1e-5, rtol=1e-4)


def test_activation_checkpointing_drops_what_was_dropped() -> None:
    model = make()
    for block in model.model.layers:
        block.mlp.down_proj = torch.nn.Sequential(torch.nn.Dropout(), block.mlp.down_proj)
    model.train()
    ids, gradients = torch.randint(VOCAB, (2, 9)), []
    for again in (False, True):
        model.model.activation_checkpointing = again
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(model(ids, ids).loss, [*model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_forward_derivatives_are_right_or_refused() -> None:
    layer = SparseQueryAttention(variant("sqa", d_model=64, num_heads=4))
    x, direction = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(x)
    y = x.clone().requires_grad_()
    layer(y).square().sum().backward()
    torch.testing.assert_close(gradient, y.grad)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(layer, (x,), (direction,))


def test_a_kernel_by_name_reaches_every_layer() -> None:
    torch.manual_seed(0)
    model, ids = Transformer(config(), kernel="reference"), torch.randint(VOCAB, (2, 9))
    assert {layer.self_attn.kernel for layer in model.model.layers} == {"reference"}
    other = Transformer(config())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids).logits, other(ids).logits)
    with pytest.raises(ValueError, match="kernel: 'flash' is unknown"):
        Transformer(config(), kernel="flash")


def test_what_layers_share_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and rotary tables of three layers alike: one of each, also with a cache and for the backward pass."""
    made = []
    prepare, tables = KERNELS["reference"].prepare, RotaryEmbedding.tables
    row = Kernel(**{**vars(KERNELS["reference"]), "prepare": lambda call: made.append("mask") or prepare(call)})
    monkeypatch.setitem(KERNELS, "reference", row)
    monkeypatch.setattr(RotaryEmbedding, "tables", lambda *args: made.append("tables") or tables(*args))
    attention = variant("sqa", d_model=32, num_heads=4, window=3)
    model = Transformer(config(attention=attention), kernel="reference")
    ids = torch.randint(VOCAB, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert sorted(made) == ["mask", "tables"]
    cache = KVCache(model.config, batch_size=2, capacity=20)
    for piece in (ids[:, :4], ids[:, 4:6]):
        made.clear()
        model(piece, cache=cache)
        assert sorted(made) == ["mask", "tables"]
    made.clear()
    Transformer(config(attention=window_pattern(attention, num_layers=3, window=4, full_every=2)), kernel="reference")(
        ids
    )
    assert sorted(made) == ["mask", "mask", "tables", "tables"]


def test_compiling_leaves_the_settings_of_pytorch_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    model, ids = Transformer(config()), torch.zeros(1, 4, dtype=torch.long)
    monkeypatch.setattr("sqa.model._compiler_lacks", lambda: None)
    monkeypatch.setattr("sqa.model.Block.compile", lambda self, **options: None)
    model.model.register_forward_pre_hook(lambda *_: seen.append(torch._dynamo.config.recompile_limit))
    before = torch._dynamo.config.recompile_limit
    model.compile()
    model(ids)
    assert seen == [64]
    with pytest.raises(ValueError, match="input_ids must be from 0 to vocab_size - 1 = 31, got 32"):
        model(ids + VOCAB)
    assert torch._dynamo.config.recompile_limit == before
