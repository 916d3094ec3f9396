import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sqa.data import corpus as corpus_module
from sqa.data import open_corpus


def write_parquet(path: Path, texts: list[str | None], column: str = "text", **options: int) -> None:
    pq.write_table(pa.table({"id": [str(i) for i in range(len(texts))], column: texts}), path, **options)


def documents(source: Path, **fractions: float) -> tuple[list[str], list[str]]:
    corpus = open_corpus(str(source), **fractions)
    return list(corpus.documents("train")), list(corpus.documents("validation"))


def test_hash_split_is_stable_disjoint_and_follows_the_fractions(tmp_path: Path) -> None:
    texts = [f"document number {i}" for i in range(1000)]
    write_parquet(tmp_path / "a.parquet", texts)
    train, validation = documents(tmp_path, train_fraction=0.45, validation_fraction=0.05)
    assert not set(train) & set(validation)
    assert 400 < len(train) < 500
    assert 30 < len(validation) < 75
    assert train == [text for text in texts if text in set(train)], "stored order"
    # a document keeps its split when others come or go, and in another format
    write_parquet(tmp_path / "a.parquet", texts[500:])
    assert documents(tmp_path, train_fraction=0.45, validation_fraction=0.05)[0] == [
        text for text in train if text in set(texts[500:])
    ]
    everything = documents(tmp_path, train_fraction=0.95, validation_fraction=0.05)
    assert sorted(everything[0] + everything[1]) == sorted(texts[500:])


def test_the_split_of_a_text_never_changes(tmp_path: Path) -> None:
    """Golden: cached corpora and published results depend on it."""
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    train, validation = documents(tmp_path, train_fraction=0.5, validation_fraction=0.25)
    assert train == ["text 2", "text 3", "text 6"]
    assert validation == ["text 0", "text 1", "text 7"]


def test_formats_agree_and_empty_documents_are_skipped(tmp_path: Path) -> None:
    texts = ["one", "", "two\nlines", "  \n", "日本語 🙂"]
    kept = ["one", "two\nlines", "日本語 🙂"]
    for kind in ("parquet", "jsonl", "text"):
        (tmp_path / kind).mkdir()
    write_parquet(tmp_path / "parquet" / "a.parquet", [*texts, None])
    lines = "\n\n".join(json.dumps({"title": "x", "text": text}) for text in [*texts, None])
    (tmp_path / "jsonl" / "a.jsonl").write_text(lines)
    for i, text in enumerate(texts):
        (tmp_path / "text" / f"{i}.{'md' if i % 2 else 'txt'}").write_text(text, encoding="utf-8")
    for source in ("parquet", "jsonl", "text", "jsonl/a.jsonl", "parquet/a.parquet"):
        train, validation = documents(tmp_path / source)
        assert sorted(train + validation) == sorted(kept), source


def test_lone_surrogates_in_json_become_encodable(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    train, validation = documents(tmp_path)
    assert train + validation == ["a?b"]


def test_file_names_give_the_splits_and_other_files_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ["a", "b"])
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ["c"])
    write_parquet(tmp_path / "validation.parquet", ["d"])
    write_parquet(tmp_path / "sample.parquet", ["a"])
    with caplog.at_level(logging.INFO, logger="sqa"):
        train, validation = documents(tmp_path, train_fraction=0.1, validation_fraction=0.1)
    assert (train, validation) == (["a", "b", "c"], ["d"])
    assert len(caplog.records) == 1
    assert "left out: 1" in caplog.text


def test_names_that_only_begin_like_a_split_are_no_splits(tmp_path: Path) -> None:
    for name in ("trainings.txt", "validations.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    train, validation = documents(tmp_path, train_fraction=1e-9, validation_fraction=1e-9)
    assert (train, validation) == ([], [])


def test_fingerprint_follows_content_and_split_but_not_the_place(tmp_path: Path) -> None:
    prints = []
    for folder, text in (("one", "same"), ("two", "same"), ("three", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
        corpus = open_corpus(str(tmp_path / folder))
        assert corpus.name == folder
        assert str(tmp_path) not in repr(corpus)
        prints.append(corpus.fingerprint)
    assert prints[0] == prints[1] != prints[2]
    assert open_corpus(str(tmp_path / "one"), train_fraction=0.5).fingerprint != prints[0]
    assert open_corpus(str(tmp_path / "one"), validation_fraction=0.01).fingerprint != prints[0]
    assert all(set(print_) <= set("0123456789abcdef") for print_ in prints)


def test_a_file_that_moves_to_the_other_split_is_another_corpus(tmp_path: Path) -> None:
    for name in ("train-0", "train-1", "validation-2"):
        (tmp_path / f"{name}.txt").write_text(name)
    before = open_corpus(str(tmp_path)).fingerprint
    (tmp_path / "train-1.txt").rename(tmp_path / "validation-1.txt")
    assert open_corpus(str(tmp_path)).fingerprint != before


def test_parquet_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first document comes before the second row group has been read."""
    write_parquet(tmp_path / "a.parquet", [f"text {i}" for i in range(5000)], row_group_size=500)
    rows_read = []
    original = pq.ParquetFile.iter_batches

    def counting(*args: object, **kwargs: object) -> Iterator[pa.RecordBatch]:
        for batch in original(*args, **kwargs):
            rows_read.append(batch.num_rows)
            assert batch.schema.names == ["text"]
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    stream = open_corpus(str(tmp_path)).documents("train")
    assert not rows_read
    next(stream)
    assert sum(rows_read) <= 500


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train_fraction": 0.0}, r"train_fraction must lie in \(0, 1\], not 0.0"),
        ({"validation_fraction": 1.5}, r"validation_fraction must lie in \(0, 1\], not 1.5"),
        ({"train_fraction": 0.9, "validation_fraction": 0.2}, "train_fraction 0.9 .* 0.2 must not exceed 1"),
    ],
)
def test_bad_fractions(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_corpus("builtin", **fractions)


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be builtin, wikipedia or the path of a file or folder, not ''"):
        open_corpus("")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"holds no data files \(\.parquet, \.jsonl, \.txt, \.md\)"):
        open_corpus(str(tmp_path))
    (tmp_path / "table.csv").write_text("text\n")
    with pytest.raises(ValueError, match=r"table\.csv must be one of \.parquet"):
        open_corpus(str(tmp_path / "table.csv"))
    with pytest.raises(ValueError, match="The data file /dev/null must be one of"):
        open_corpus("/dev/null")


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["x"], column="content")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'; its columns are: id, content"):
        open_corpus(str(path))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(ValueError, match="must hold strings, not int64"):
        open_corpus(str(path))
    path.write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet"):
        open_corpus(str(path))
    columns = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(columns, path)
    with pytest.raises(ValueError, match=r"a\.parquet has 2 columns named 'text'"):
        open_corpus(str(path))
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"text": not_utf8}), path)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet \('utf-8' codec"):
        documents(path)
    write_parquet(path, [f"{i} {'x' * 500}" for i in range(5000)])
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet"):
        documents(path)
    path = tmp_path / "a.jsonl"
    for line in ('{"content": "x"}', "[1]", '{"text": 7}', "nonsense", "[" * 200_000):
        path.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(ValueError, match=r"Line 2 of .*a\.jsonl must be a JSON object"):
            documents(path)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8"):
        documents(path)


def test_builtin_is_a_few_million_characters_of_distinct_files() -> None:
    corpus = open_corpus("builtin")
    train, validation = list(corpus.documents("train")), list(corpus.documents("validation"))
    assert corpus.name == "builtin"
    assert sum(map(len, train)) > 5_000_000
    assert sum(map(len, validation)) > 100_000
    assert open_corpus("builtin").fingerprint == corpus.fingerprint
    assert list(open_corpus("builtin").documents("validation")) == validation
    # sources and documentation topics, each topic once
    assert any("class OrderedDict" in text for text in train + validation)
    assert sum('The "import" statement\n' in text for text in train + validation) == 1


class FakeRows(list[dict[str, str]]):
    def select_columns(self, columns: list[str]) -> "FakeRows":
        return FakeRows({name: row[name] for name in columns} for row in self)


def test_wikipedia_is_streamed_from_a_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")
    calls = []

    def load_dataset(path: str, name: str, *, revision: str, split: str, streaming: bool) -> FakeRows:
        calls.append((path, name, len(revision), split, streaming))
        return FakeRows({"title": "t", "text": f"article {i}"} for i in range(200))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_corpus("wikipedia", train_fraction=0.45, validation_fraction=0.05)
    assert not calls, "a finished comparison is reprinted without the network"
    assert 60 < len(list(corpus.documents("train"))) < 120
    assert calls == [("wikimedia/wikipedia", "20231101.en", 40, "train", True)]
    assert corpus.fingerprint != open_corpus("wikipedia").fingerprint


def test_wikipedia_out_of_reach_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra hub")

    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'wikimedia/wikipedia' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"Hub cannot be reached.*--data PATH"):
        next(open_corpus("wikipedia").documents("train"))


def test_wikipedia_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"\.\[hub\]"):
        next(open_corpus("wikipedia").documents("train"))


@pytest.mark.articles
def test_the_articles(articles: Path) -> None:
    sample = open_corpus(str(articles / "sample.parquet"))
    train, validation = list(sample.documents("train")), list(sample.documents("validation"))
    assert len(train) + len(validation) == 1000
    assert 25 < len(validation) < 80
    corpus = open_corpus(str(articles))
    assert corpus.name == "wikipedia-en"
    assert sum(1 for _ in corpus.documents("validation")) == 933
    stream = corpus.documents("train")
    assert {next(stream) for _ in range(1000)} == {*train, *validation}, "sample.parquet is the first thousand"


def test_the_module_needs_no_hub() -> None:
    assert not hasattr(corpus_module, "datasets")
