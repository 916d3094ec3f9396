"""The four-way choice: items from articles, models that must win or guess, intervals, the command."""

import json
import random
import shutil
import string
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer

from sqa import AttentionConfig, ModelConfig, Transformer, evaluation
from sqa.data import Corpus
from sqa.errors import InputError
from sqa.evaluation import Item, Reader, Score, make_items, open_reader, score_table
from test_cli import sqa as command

LETTERS = string.ascii_lowercase


def articles(count: int) -> Iterator[str]:
    """Three paragraphs each, of the few words of that article; a heading between them."""
    draw = random.Random(1)
    for number in range(count):
        words = ["".join(draw.choices(LETTERS, k=5)) for _ in range(6)]
        paragraphs = [" ".join(draw.choices(words, k=40)) for _ in range(3)]
        yield f"Article {number}\n\n{paragraphs[0]}\n\nA heading.\n\n{paragraphs[1]}\n\n{paragraphs[2]}"


def accuracy(reader: Reader, items: list[Item]) -> float:
    return sum(reader.choose(item) == item.answer for item in items) / len(items)


def test_items_are_the_next_paragraph_and_those_of_other_articles() -> None:
    texts = list(articles(30))
    items = make_items([*texts[:10], "too short\n\nfor an item", *texts[10:]], 30)
    right = [item.choices[item.answer] for item in items]
    for text, item in zip(texts, items, strict=True):
        before, after = text.index(item.context), text.index(item.choices[item.answer])
        assert before < after
        assert text[before + len(item.context) : after] in ("\n\n", "\n\nA heading.\n\n")
        assert len(set(item.choices)) == 4
        assert sum(choice in text for choice in item.choices) == 1
        assert set(item.choices) <= set(right)
    assert {item.answer for item in items} == {0, 1, 2, 3}
    assert items == make_items([*texts[:10], "too short\n\nfor an item", *texts[10:]], 30)
    assert items != make_items(texts, 30, seed=1)


def test_long_paragraphs_are_cut_at_their_inner_ends_between_words() -> None:
    """The end of the first, up to 300 characters, and the beginning of the second, up to 120."""
    first, second = (" ".join(f"{letter}{i:03}" for i in range(200)) for letter in "xy")
    for item in make_items([f"{first}\n\n{second}"] * 4, 4):
        choice = item.choices[item.answer]
        assert first.endswith(f" {item.context}")
        assert 295 <= len(item.context) <= 300
        assert second.startswith(f"{choice} ")
        assert 115 <= len(choice) <= 120


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(InputError, match="30 were asked for, but only 12 articles"):
        make_items(articles(12), 30)
    with pytest.raises(InputError, match=r"at least 4.*got 3"):
        make_items(articles(12), 3)


def test_a_model_that_expects_the_words_of_the_context_wins(small_tokenizer: Tokenizer) -> None:
    """It gives likelihood to pairs of tokens that it has read, so it must see the context, and nothing after."""

    def predict(ids: torch.Tensor, n: int) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, 300)
        for row, tokens in enumerate(ids.tolist()):
            for t, token in enumerate(tokens):
                for s in range(t):
                    if tokens[s] == token:
                        logits[row, t, tokens[s + 1]] = 5.0
        return logits[:, -n:]

    reader = Reader(tokenizer=small_tokenizer, predict=predict)
    assert accuracy(reader, make_items(articles(24), 24)) > 0.9


def test_a_long_choice_is_not_less_likely_for_its_length(small_tokenizer: Tokenizer) -> None:
    """To a model that expects nothing, fewer tokens are likelier; a character of the longer choice is."""
    reader = Reader(tokenizer=small_tokenizer, predict=lambda ids, n: torch.zeros(len(ids), n, 300))
    item = Item(context="def", choices=("zx", "return softmax(q @ k.T) @ v"), answer=1)
    short, long = reader.log_likelihoods(item)
    assert short > long
    assert reader.choose(item) == 1


def bigram_model(tokenizer: Tokenizer, text: str) -> Transformer:
    """Whose logits are the logarithms of how often each token follows the last one in `text`."""
    size = 300
    counts = torch.full((size, size), 0.01)
    ids = torch.tensor(tokenizer.encode(text).ids)
    counts.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    layer = AttentionConfig(d_model=size, num_heads=10, num_query_heads=2, num_kv_heads=2)
    config = ModelConfig(
        vocab_size=size, num_layers=1, d_ff=8, max_seq_len=512, attention=layer, final_norm=False, tie_embeddings=False
    )
    model = Transformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_((counts / counts.sum(1, keepdim=True)).log().T)
    return model


def test_a_bigram_lookup_knows_text_from_shuffled_letters(
    small_tokenizer: Tokenizer, saved: Callable[[Transformer], Path]
) -> None:
    text = " ".join((Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").split())
    draw = random.Random(0)
    items = []
    for i in range(20):
        start = draw.randrange(len(text) - 200)
        true = text[start + 100 : start + 200]
        choices = ["".join(draw.sample(true, len(true) - i)) for _ in range(4)]  # also shorter than the true one
        choices[i % 4] = true
        items.append(Item(context=text[start : start + 100], choices=tuple(choices), answer=i % 4))
    reader = open_reader(saved(bigram_model(small_tokenizer, text)))("cpu")
    assert accuracy(reader, items) == 1.0


def test_a_random_model_guesses(
    model_of: Callable[[ModelConfig], Transformer], config_of: Callable[..., ModelConfig], saved
) -> None:
    config = config_of().replace(max_seq_len=1024)
    items = make_items(articles(300), 300)
    # 25 % and four standard deviations of a binomial share
    reader = open_reader(saved(model_of(config)))("cpu")
    assert accuracy(reader, items) == pytest.approx(0.25, abs=4 * (0.1875 / 300) ** 0.5)


def test_choices_of_other_lengths_beside_it_do_not_change_a_likelihood(saved, model_of, config_of) -> None:
    reader = open_reader(saved(model_of(config_of().replace(max_seq_len=1024))))("cpu")
    choices = ("return softmax", "return q @ k.T, and more of it than in the others", "42")
    context = "def attend(q, k, v):"
    alone = [reader.log_likelihoods(Item(context=context, choices=(choice,), answer=0))[0] for choice in choices]
    together = reader.log_likelihoods(Item(context=context, choices=choices, answer=0))
    assert together == pytest.approx(alone, rel=1e-5)
    ids = torch.tensor([reader.tokenizer.encode(f"{context}\n\n42").ids])
    begun = len(reader.tokenizer.encode(context).ids)
    nll = torch.nn.functional.cross_entropy(reader.predict(ids, ids.shape[1])[0, :-1], ids[0, 1:], reduction="none")
    assert together[2] == pytest.approx(-float(nll[begun - 1 :].detach().sum()), rel=1e-5)


def test_transformers_own_models_are_read(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=512, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        open_reader(tmp_path / "gpt2")("cpu")
    small_tokenizer.save(str(tmp_path / "gpt2" / "tokenizer.json"))
    ids = torch.tensor([[5, 6, 7, 8]])
    given = open_reader(tmp_path / "gpt2")("cpu").predict(ids, 2)
    torch.testing.assert_close(given, model(ids).logits[:, -2:])


def test_no_pickle_and_no_code_of_a_directory_is_loaded(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "pickle")
    small_tokenizer.save(str(tmp_path / "pickle" / "tokenizer.json"))
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "code").mkdir()
    auto_map = {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (tmp_path / "code" / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "code" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name in ("pickle", "code"):
        with pytest.raises(InputError, match=f"{name} is no causal language model that transformers reads"):
            open_reader(tmp_path / name)("cpu")
    assert not (tmp_path / "ran").exists()


def test_what_transformers_cannot_read_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(InputError, match="no causal language model that transformers reads"):
        open_reader(tmp_path)("cpu")


def test_intervals() -> None:
    """Wilson's of 7 of 10, and Agresti and Min's, worked out by hand for 3 gained, 1 lost of 10."""
    a = Score(model="a", right=(True,) * 7 + (False,) * 3)
    assert a.interval == pytest.approx((0.39677, 0.89221), abs=1e-4)
    b = Score(model="b", right=(True,) * 4 + (False,) * 3 + (True, False, False))
    # gained 3, lost 1: (3 - 1) / 12, sqrt((5 / 12 - 1 / 36) / 12) = 0.18002
    assert a.minus(b) == pytest.approx((0.2, 1 / 6 - 1.959964 * 0.18002, 1 / 6 + 1.959964 * 0.18002), abs=1e-4)
    console = Console(file=StringIO(), width=80)
    console.print(score_table([b, a]))
    *_, last = console.file.getvalue().splitlines()
    assert last.split() == ["a", "70.0%", "39.7%", "to", "89.2%", "+20.0%", "-18.6%", "to", "+52.0%"]
    same, low, high = a.minus(a)
    assert same == 0
    assert low < 0 < high
    assert Score.from_dict(json.loads(json.dumps(a.to_dict()))) == a


def test_bfloat16_is_autocast_and_the_items_are_of_the_validation_text(
    small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def predict(ids: torch.Tensor, n: int) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return torch.zeros(len(ids), n, 300)

    def read(split: str) -> Iterator[str]:
        seen.append(split)
        return articles(8)

    reader = Reader(tokenizer=small_tokenizer, predict=predict)
    monkeypatch.setattr(evaluation, "open_reader", lambda source: lambda device: reader)
    corpus = Corpus(name="made up", identify=lambda: "0", read=read)
    for dtype, autocast in (("float32", False), ("bfloat16", True)):
        seen.clear()
        found = evaluation.evaluate(["model"], corpus, items=4, dtype=dtype)
        assert seen == ["validation"] + [autocast] * 4
        assert found.items == tuple(make_items(articles(8), 4))
    assert evaluation.evaluate(["model"], corpus, items=4, seed=3).items == tuple(make_items(articles(8), 4, seed=3))


def test_the_command_compares_two_models(
    saved, model_of, config_of, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = list(articles(200))
    saved(bigram_model(small_tokenizer, texts[0]), "bigram")
    saved(model_of(config_of().replace(max_seq_len=1024)), "random")
    with open(tmp_path / "text.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    for name in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text((tmp_path / "text.jsonl").read_text())
    options = ("--data", "data", "--items", "40", "--json", "out.json", "--items-file", "items.jsonl")
    done = command("evaluate", "random", "bigram", *options, cwd=tmp_path)
    assert max(map(len, done.stdout.splitlines())) <= 80
    first, second = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert (first["model"], second["model"]) == ("random", "bigram")
    items = [Item(**json.loads(line)) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    made = make_items(texts, 40)
    assert [item.context for item in items] == [item.context for item in made]
    assert second["accuracy"] == accuracy(open_reader(tmp_path / "bigram")("cpu"), made)
    assert f"{first['accuracy']:.1%}" in done.stdout

    (tmp_path / "no-tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "random" / name, tmp_path / "no-tokenizer")
    wrong = command("evaluate", "random", "no-tokenizer", *options, cwd=tmp_path, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "sqa: model: no-tokenizer has no tokenizer.json, which the items are encoded with\n"

    wrong = command("evaluate", "random", "--data", "data", "--items", "1000", cwd=tmp_path, check=False)
    assert wrong.returncode == 2
    assert "only 200 articles" in wrong.stderr
