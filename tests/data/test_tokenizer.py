import os
import signal
import string
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqa.data import Corpus, Tokenizer
from sqa.data import tokenizer as tokenizer_module
from sqa.data.tokenizer import load_or_train_tokenizer
from sqa.progress import Interrupted, stop_flag

TEXTS = [
    "plain words",
    "naïve café",
    "日本語の文章です。",
    "emoji 🙂👩‍👩‍👧 end",
    "a\r\n\tb  c\x00",
    "<|endoftext|><|pad|>",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [f"{a}{b}{c} {a}{b} naïve 日本語" for a in "abcd" for b in string.ascii_lowercase for c in "xyz"]
    corpus = Corpus(name="letters", identify=lambda: "1e77e5", read=lambda split: iter(texts))
    return load_or_train_tokenizer(corpus, vocab_size=300, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_and_text_come_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.end_id, tokenizer.pad_id} & set(ids), "text never makes a special token"


@given(text=st.text())
def test_bytes_and_text_come_back_for_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_vocabulary(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.pad_id) == (300, 0, 1)
    sizes = tokenizer.token_bytes
    assert sizes.shape == (300,)
    assert sizes.dtype == np.int64
    assert (sizes[:2] == 0).all()
    assert (sizes[2:] >= 1).all()
    assert (sizes[2:] == 1).sum() == 256
    assert tokenizer.decode([tokenizer.end_id]) == ""


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_load_errors(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(path)
    path.write_text('{"version": "1.0", "tru')
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged .* delete it"):
        Tokenizer.load(path)
    path.write_text(tokenizer_module.tokenizers.Tokenizer(tokenizer_module.models.BPE()).to_str())
    with pytest.raises(ValueError, match=r"must have the special tokens <\|endoftext\|> and <\|pad\|>"):
        Tokenizer.load(path)


def test_cached_by_corpus_and_settings(
    make_corpus: Callable[..., Corpus], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    first = load_or_train_tokenizer(make_corpus(), vocab_size=270, cache_dir=tmp_path, note=lines.append)
    assert lines == ["Training a tokenizer of 270 entries on memory"]
    again = load_or_train_tokenizer(make_corpus(), vocab_size=270, cache_dir=tmp_path / "other")
    assert again.fingerprint == first.fingerprint, "training is deterministic"

    def train(texts: Iterator[str], vocab_size: int) -> None:
        raise RuntimeError("trained")

    monkeypatch.setattr(tokenizer_module, "_train", train)
    cached = load_or_train_tokenizer(make_corpus(), vocab_size=270, cache_dir=tmp_path)
    assert cached.fingerprint == first.fingerprint
    with pytest.raises(RuntimeError, match="trained"):
        load_or_train_tokenizer(make_corpus(), vocab_size=271, cache_dir=tmp_path)
    with pytest.raises(RuntimeError, match="trained"):
        load_or_train_tokenizer(make_corpus(fingerprint="beef"), vocab_size=270, cache_dir=tmp_path)
    monkeypatch.setattr(tokenizer_module, "MAX_TRAINING_CHARACTERS", 100)
    with pytest.raises(RuntimeError, match="trained"):
        load_or_train_tokenizer(make_corpus(), vocab_size=270, cache_dir=tmp_path)


def test_trains_on_the_train_split_up_to_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_TRAINING_CHARACTERS", 950)
    seen = []

    def read(split: str) -> Iterator[str]:
        assert split == "train"
        for i in range(1000):
            seen.append(i)
            yield "abcd" * 25

    corpus = Corpus(name="counted", identify=lambda: "c0", read=read)
    load_or_train_tokenizer(corpus, vocab_size=260, cache_dir=tmp_path)
    assert len(seen) == 10


def test_vocabularies_that_cannot_be(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be at least 258 .* not 200"):
        load_or_train_tokenizer(make_corpus(), vocab_size=200, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size must be at most 1,048,576, not 1,000,000,000,000"):
        load_or_train_tokenizer(make_corpus(), vocab_size=10**12, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size 5000 is more than the corpus memory fills.* \d+ entries"):
        load_or_train_tokenizer(make_corpus(), vocab_size=5000, cache_dir=tmp_path)
    empty = Corpus(name="empty.jsonl", identify=lambda: "0", read=lambda split: iter([""]))
    with pytest.raises(ValueError, match=r"train split of empty\.jsonl has no documents: give more text"):
        load_or_train_tokenizer(empty, vocab_size=300, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_signal_ends_a_long_training(tmp_path: Path) -> None:
    """The library spends seconds in one call on this text, and does not look for signals."""
    words = [" ".join(f"w{seed * 7919 % 100_003 + i * 31 % 5003}" for i in range(400)) for seed in range(3000)]
    corpus = Corpus(name="long", identify=lambda: "1", read=lambda split: iter(words))
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM])
    timer.start()
    start = time.monotonic()
    with pytest.raises(Interrupted), stop_flag():
        load_or_train_tokenizer(corpus, vocab_size=30_000, cache_dir=tmp_path)
    assert time.monotonic() - start < 2.5
    assert not list(tmp_path.iterdir())
