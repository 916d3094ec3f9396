"""Sources of text: streams of documents, split into train and validation."""

import hashlib
import json
import logging
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from sqa.errors import InputError, first_line, load_extra
from sqa.files import read_text
from sqa.records import nearest

Split = Literal["train", "validation"]

_SUFFIXES = (".parquet", ".jsonl", ".txt", ".md")
_WIKIPEDIA = ("wikimedia/wikipedia", "20231101.en", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa")
# Folders of the standard library that hold installed packages, tests, or tables instead of text.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Documents in a fixed order, each in at most one split.

    `name` is for people and holds no absolute path. `read` yields the documents of a split, empty ones included.
    `identify` gives the fingerprint, for which it reads all of them.
    """

    name: str
    identify: Callable[[], str] = field(repr=False, compare=False)
    read: Callable[[Split], Iterator[str]] = field(repr=False, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the content and of how it is split: two corpora that share it have the same documents."""
        return self.identify()

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of `split` that are not empty, one at a time, so that memory does not grow with the corpus.

        Raises InputError for a source that cannot be read as text, or a Hub out of reach.
        """
        return (text for text in self.read(split) if text and not text.isspace())


def open_corpus(source: str, *, train_fraction: float = 0.95, validation_fraction: float = 0.05) -> Corpus:
    """Open `source`: "builtin", "wikipedia", or the path of a file or folder (Parquet, JSONL, .txt, .md).

    Parquet and JSONL hold one document in each `text` field, a text file is one document. In a folder that
    has both files named train* and files named validation*, these names are the splits. Everywhere else the
    hash of a document's text places it in [0, 1): below `train_fraction` is train, the following
    `validation_fraction` is validation, the rest is not used.

    Files are read when documents or the fingerprint are asked for, and the Hub is reached only for documents.

    Raises InputError for a fraction outside (0, 1], a path that is empty, missing or holds no data files, and a
    Parquet file without a string column `text`.
    """
    for name, fraction in (("train_fraction", train_fraction), ("validation_fraction", validation_fraction)):
        if not 0 < fraction <= 1:
            raise InputError(f"{name} must lie in (0, 1], not {fraction}")
    if train_fraction + validation_fraction > 1 + 1e-9:
        raise InputError(
            f"train_fraction {train_fraction} and validation_fraction {validation_fraction} must not exceed 1 together"
        )
    if not source:
        raise InputError("data must be builtin, wikipedia or the path of a file or folder, not ''")
    bounds = {"train": (0.0, train_fraction), "validation": (train_fraction, train_fraction + validation_fraction)}

    def hashed(name: str, identity: Callable[[], Iterable[object]], texts: Callable[[], Iterator[str]]) -> Corpus:
        """A corpus without splits of its own: the hash of each text decides its split."""

        def read(split: Split) -> Iterator[str]:
            low, high = bounds[split]
            return (text for text in texts() if low <= _place(text) < high)

        how = f"hash split {train_fraction!r} {validation_fraction!r}"
        return Corpus(name=name, identify=lambda: fingerprint_of(*identity(), how), read=read)

    if source == "builtin":
        return hashed(source, lambda: ("builtin", _digest(_read_builtin())), _read_builtin)
    if source == "wikipedia":
        return hashed(source, lambda: ("hub", *_WIKIPEDIA), _read_wikipedia)
    path = Path(source)
    name, files = path.resolve().name, _data_files(path)
    by_split = _files_by_split(files) if path.is_dir() else None
    if by_split is None:
        return hashed(name, lambda: ("files", *map(_file_digest, files)), lambda: _read_files(files))
    if left_out := len(files) - sum(map(len, by_split.values())):
        what = "the splits are the files named train* and validation*; other data files left out"
        logger.info("%s: %s: %d", name, what, left_out)

    def identify() -> str:
        digests = (f"{split} {_file_digest(file)}" for split, chosen in by_split.items() for file in chosen)
        return fingerprint_of("files", *digests)

    return Corpus(name=name, identify=identify, read=lambda split: _read_files(by_split[split]))


def fingerprint_of(*parts: object) -> str:
    """A short hex digest of the parts, which must have an exact text form (strings, integers)."""
    return hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=16).hexdigest()


def _place(text: str) -> float:
    """A document's place in [0, 1), by its text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(hashlib.blake2b(text.encode()).digest())
    return digest.hexdigest()


def _read_builtin() -> Iterator[str]:
    """The standard library of this Python, and the topics of its `help()`."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path
        for path in root.rglob("*.py")
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    if not files:
        raise InputError("This Python has no standard-library sources for the builtin corpus: give a path")
    for path in files:
        yield path.read_text(encoding="utf-8", errors="replace")
    for _, text in sorted(topics.items()):
        yield text


def _read_wikipedia() -> Iterator[str]:
    datasets = load_extra("datasets", "Reading 'wikipedia' needs the package datasets", "hub")
    path, name, revision = _WIKIPEDIA
    try:
        rows = datasets.load_dataset(path, name, revision=revision, split="train", streaming=True)
        for row in rows.select_columns(["text"]):
            yield row["text"]
    except OSError as error:  # includes ConnectionError, which datasets raises for everything out of reach
        raise InputError(
            f"The Hugging Face Hub cannot be reached for {path} ({error}): "
            "give a file or folder of your own with --data PATH"
        ) from error


def _data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder. Raises InputError for what cannot be read as text."""
    if not path.exists():
        raise InputError(f"The data path {path} does not exist{nearest(str(path), ['builtin', 'wikipedia'])}")
    found = [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if "/." not in f"/{file.relative_to(path).as_posix()}"]
    files = sorted(file for file in found if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        what = "folder {} holds no data files ({})" if path.is_dir() else "file {} must be one of {}"
        raise InputError(f"The data {what.format(path, ', '.join(_SUFFIXES))}")
    for file in files:
        if file.suffix == ".parquet":
            _check_parquet(file)
    return files


def _files_by_split(files: Sequence[Path]) -> dict[Split, list[Path]] | None:
    """The files named train* and those named validation*; None unless there are both."""
    by_split: dict[Split, list[Path]] = {
        split: [file for file in files if re.match(rf"{split}(?![A-Za-z])", file.name)] for split in get_args(Split)
    }
    return by_split if all(by_split.values()) else None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return path.suffix + hashlib.file_digest(file, "blake2b").hexdigest()


def _read_files(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        match file.suffix:
            case ".parquet":
                yield from _read_parquet(file)
            case ".jsonl":
                yield from _read_jsonl(file)
            case _:
                yield read_text(file)


@contextmanager
def _naming_parquet(path: Path) -> Iterator[None]:
    """Name the file in the errors of the library about it."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as Parquet ({first_line(error)})") from error


def _check_parquet(path: Path) -> None:
    with _naming_parquet(path):
        schema = pq.read_schema(path)
    count = schema.names.count("text")
    if count != 1:
        what = "no column 'text'" if not count else f"{count} columns named 'text'"
        raise InputError(f"{path} has {what}; its columns are: {', '.join(schema.names)}")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InputError(f"The column 'text' of {path} must hold strings, not {kind}")


def _read_parquet(path: Path) -> Iterator[str]:
    # pre_buffer would keep every row group in memory
    with _naming_parquet(path), pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        for batch in file.iter_batches(batch_size=256, columns=["text"]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)["text"]
                text = "" if text is None else text.encode(errors="replace").decode()  # no lone surrogates
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(f"Line {number} of {path} must be a JSON object with a string field 'text'") from error
            yield text
