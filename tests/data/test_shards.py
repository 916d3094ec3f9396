import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sqa.data import Corpus, Tokenizer, prepare
from sqa.data import shards as shards_module
from sqa.data.shards import TokenShards, load_or_encode, write_shards
from sqa.data.tokenizer import load_or_train_tokenizer
from sqa.files import default_cache_dir


@pytest.fixture
def corpus(make_corpus: Callable[..., Corpus]) -> Corpus:
    return make_corpus()


@pytest.fixture
def tokenizer(corpus: Corpus, tmp_path: Path) -> Tokenizer:
    return load_or_train_tokenizer(corpus, vocab_size=280, cache_dir=tmp_path / "tokenizers")


def write(folder: Path, documents: list[list[int]], vocab_size: int = 300, tokens_per_file: int = 8) -> TokenShards:
    return write_shards(folder, [documents], vocab_size=vocab_size, origin={}, tokens_per_file=tokens_per_file)


def test_documents_come_back_with_their_end_token(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines: list[str] = []
    shards = load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path, note=lines.append)
    texts = list(corpus.documents("train"))
    assert shards.num_documents == len(texts)
    for i, text in enumerate(texts):
        assert shards.document(i).tolist() == [*tokenizer.encode(text), tokenizer.end_id]
        assert shards.lengths[i] == shards.document(i).size
    assert shards.num_tokens == shards.lengths.sum()
    assert shards.document(0).dtype == np.uint16
    assert lines == [f"Encoding memory (train): 20 documents, {shards.num_tokens:,} tokens"]


def test_manifest(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path / "c")
    (folder,) = (tmp_path / "c").iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["corpus"] == corpus.fingerprint
    assert manifest["tokenizer"] == tokenizer.fingerprint
    assert manifest["split"] == "train"
    assert manifest["num_documents"] == 20
    assert sorted(manifest["sha256"]) == ["offsets.bin", "tokens-00000.bin"]
    assert str(tmp_path) not in json.dumps(manifest)


@pytest.mark.parametrize("lengths", [[8], [16], [3, 5, 8], [1, 20, 1], [7, 2, 30, 1]])
def test_documents_run_over_files_of_a_fixed_size(lengths: list[int], tmp_path: Path) -> None:
    ids = iter(range(1000))
    documents = [[next(ids) for _ in range(length)] for length in lengths]
    shards = write(tmp_path / "s", documents, vocab_size=1000)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "s").glob("tokens-*"))]
    assert all(size == 16 for size in sizes[:-1])
    assert 0 < sizes[-1] <= 16
    assert [shards.document(i).tolist() for i in range(len(lengths))] == documents
    assert shards.tokens(0, sum(lengths)).tolist() == list(range(sum(lengths)))


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    shards = write(tmp_path / "s", [[70_000, 1, 65_536]], vocab_size=70_001)
    assert shards.document(0).dtype == np.uint32
    assert shards.document(0).tolist() == [70_000, 1, 65_536]
    assert write(tmp_path / "t", [[65_535]], vocab_size=65_536).document(0).dtype == np.uint16


def test_fingerprint_follows_the_tokens(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / name, [ids]) for name, ids in (("a", [1, 2]), ("b", [1, 2]), ("c", [1, 3])))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.fingerprint != write(tmp_path / "d", [[1], [2]]).fingerprint


def test_encoding_happens_once(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: pytest.fail("encoded again"))
    again = load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path)
    assert again.fingerprint == first.fingerprint
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        load_or_encode(corpus, tokenizer, split="validation", cache_dir=tmp_path)


def test_another_tokenizer_encodes_anew(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path)
    other = load_or_train_tokenizer(corpus, vocab_size=262, cache_dir=tmp_path / "tokenizers")
    text = next(corpus.documents("train"))
    assert other.encode(text) != tokenizer.encode(text)
    shards = load_or_encode(corpus, other, split="train", cache_dir=tmp_path)
    assert shards.document(0).tolist() == [*other.encode(text), other.end_id]


@pytest.mark.parametrize("name", ["tokens-00000.bin", "tokens-00001.bin", "offsets.bin"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write(folder, [list(range(10)), [1, 2]])
    data = bytearray((folder / name).read_bytes())
    data[3] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"/s is damaged \({name} does not match .*: delete the folder and run"):
        TokenShards(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        TokenShards(folder)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    write(folder, [[1, 2]])
    manifest = folder / "manifest.json"
    whole = json.loads(manifest.read_text())
    changes: list[dict[str, object]] = [
        {"format": 0}, {"sha256": None}, {"sha256": {}}, {"sha256": {"../x": "y"}}, {"dtype": "<f8"}, {"dtype": None},
        {"num_documents": 0}, {"num_documents": 2}, {"num_tokens": 3}, {"num_tokens": -1}, {"num_tokens": 10**18},
        {"num_tokens": "2"}, {"tokens_per_file": 0}, {"tokens_per_file": 1}, {"tokens_per_file": 2.5},
    ]  # fmt: skip
    texts = ["{", "[]", "null", "[" * 200_000, *(json.dumps(whole | change) for change in changes)]
    texts += [json.dumps({key: whole[key] for key in whole if key != left_out}) for left_out in ("sha256", "dtype")]
    for text in texts:
        manifest.write_text(text)
        with pytest.raises(ValueError, match=r"/s is damaged \(.*\): delete the folder"):
            TokenShards(folder)
    manifest.unlink()
    with pytest.raises(ValueError, match=r"/s is damaged \(.*manifest\.json'\): delete the folder"):
        TokenShards(folder)


def test_of_the_processes_of_a_machine_one_compares_checksums(
    corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path)
    checked: list[str] = []
    monkeypatch.setattr("sqa.data.shards.sha256", lambda path: checked.append(path.name) or "wrong")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path).num_documents
    assert not checked
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="does not match its checksum"):
        load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path)


def test_a_failed_encoding_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def read(split: str) -> Iterator[str]:
        yield "one document"
        raise OSError("disk gone")

    cache = tmp_path / "cache"
    with pytest.raises(OSError, match="disk gone"):
        load_or_encode(Corpus(name="x", identify=lambda: "0", read=read), tokenizer, split="train", cache_dir=cache)
    assert not list(cache.iterdir())


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from sqa.data import Corpus
from sqa.data.shards import load_or_encode
from sqa.data.tokenizer import Tokenizer

def read(split):
    yield "x" * 2**20
    os.kill(os.getpid(), signal.SIGKILL)

cache = Path(sys.argv[1])
load_or_encode(
    Corpus(name="x", identify=lambda: "0", read=read), Tokenizer.load(cache / "t.json"), split="train", cache_dir=cache
)
"""


def test_what_a_killed_writer_left_is_removed(corpus: Corpus, tokenizer: Tokenizer, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    tokenizer.save(cache / "t.json")
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITER, cache], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = cache.glob(".tokens-*.tmp")
    load_or_encode(corpus, tokenizer, split="train", cache_dir=cache)
    assert not left.exists()
    assert sorted(path.name for path in cache.iterdir() if not path.name.startswith("tokens-")) == ["t.json"]


def test_an_empty_split_is_an_error_and_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = Corpus(name="short", identify=lambda: "0", read=lambda split: iter(["", " "]))
    with pytest.raises(ValueError, match=r"validation split of short has no documents.*validation_fraction"):
        load_or_encode(corpus, tokenizer, split="validation", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_second_writer_waits_and_takes_what_the_first_made(tokenizer: Tokenizer, tmp_path: Path) -> None:
    begun, waits = threading.Event(), threading.Event()

    def read(split: str) -> Iterator[str]:
        yield "one document"
        begun.set()
        assert waits.wait(60)

    def first() -> str:
        corpus = Corpus(name="x", identify=lambda: "0", read=read)
        return load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path / "cache").fingerprint

    def waiting(text: str) -> None:
        assert f"cache is being written by process {os.getpid()}; waiting for it" in text
        waits.set()

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(first)
        assert begun.wait(60)
        never = Corpus(name="x", identify=lambda: "0", read=lambda split: pytest.fail("encoded again"))
        shards = load_or_encode(never, tokenizer, split="train", cache_dir=tmp_path / "cache", note=waiting)
        assert shards.fingerprint == writer.result()
    assert [path.name.endswith(".tmp") for path in (tmp_path / "cache").iterdir()] == [False]


def test_encoding_streams(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more documents are drawn from the corpus than one chunk holds before they are encoded."""
    monkeypatch.setattr(shards_module, "_CHARACTERS_PER_CHUNK", 100)
    drawn = 0
    most_waiting = 0
    encode_batch = Tokenizer.encode_batch

    def read(split: str) -> Iterator[str]:
        nonlocal drawn
        for _ in range(200):
            drawn += 1
            yield "ten chars."

    def counting(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        nonlocal drawn, most_waiting
        most_waiting, drawn = max(most_waiting, drawn), 0
        return encode_batch(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", counting)
    corpus = Corpus(name="long", identify=lambda: "0", read=read)
    assert load_or_encode(corpus, tokenizer, split="train", cache_dir=tmp_path).num_documents == 200
    assert most_waiting == 10


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "sqa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "sqa"


def test_prepare_twice_writes_once(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    for split, count in (("train", 5), ("validation", 2)):
        lines = (json.dumps({"text": f"{split} text number {i}"}) for i in range(count))
        (source / f"{split}.jsonl").write_text("\n".join(lines))
    cache = tmp_path / "cache"
    prepared = prepare(str(source), vocab_size=262, cache_dir=cache)
    assert (prepared.train.num_documents, prepared.validation.num_documents) == (5, 2)
    assert prepared.tokenizer.vocab_size == 262
    times = {path: os.stat(path).st_mtime_ns for path in cache.rglob("*")}
    again = prepare(str(source), vocab_size=262, cache_dir=cache)
    assert {path: os.stat(path).st_mtime_ns for path in cache.rglob("*")} == times
    assert again.fingerprint == prepared.fingerprint
    (source / "train.jsonl").write_text('{"text": "something else altogether, something else"}')
    assert prepare(str(source), vocab_size=262, cache_dir=cache).fingerprint != prepared.fingerprint


def test_prepare_checks_the_numbers_before_the_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        prepare(str(tmp_path / "nowhere"), vocab_size=10, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        prepare(str(tmp_path / "nowhere"), vocab_size=300, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.articles
def test_the_articles_sample(articles: Path, tmp_path: Path) -> None:
    prepared = prepare(str(articles / "sample.parquet"), vocab_size=2000, cache_dir=tmp_path)
    assert prepared.train.num_documents + prepared.validation.num_documents == 1000
    text = next(prepared.corpus.documents("validation"))
    ids = prepared.validation.document(0)
    assert prepared.tokenizer.decode(ids.tolist()) == text
    assert prepared.tokenizer.token_bytes[ids].sum() == len(text.encode())
