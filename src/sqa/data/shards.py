"""Encoded documents on disk: token files of a fixed size, memory-mapped, with a manifest that is checked."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np

from sqa.data.corpus import Corpus, Split, fingerprint_of
from sqa.data.tokenizer import Tokenizer
from sqa.errors import InputError
from sqa.files import LOCK, locked, new_folder, sha256, write_json
from sqa.records import read_json, read_record

TOKENS_PER_FILE = 1 << 26

_FORMAT = 1  # part of the cache key and of the manifest: raise it when the files change
_CHARACTERS_PER_CHUNK = 1 << 20


@dataclass(frozen=True)
class _Manifest:
    """What manifest.json says of the files beside it."""

    format: int
    dtype: Literal["<u2", "<u4"]
    num_documents: int
    num_tokens: int
    tokens_per_file: int
    sha256: dict[str, str]

    def check_counts(self, folder: Path) -> None:
        """Raise InputError when the files do not have the sizes that the counts give."""
        if min(self.num_documents, self.tokens_per_file) < 1 or self.num_tokens < self.num_documents:
            raise InputError("its counts cannot be true")
        sizes = {"offsets.bin": 8 * (self.num_documents + 1)}
        starts = range(0, self.num_tokens, self.tokens_per_file)
        for i, start in zip(range(len(self.sha256)), starts, strict=False):  # damaged counts may be huge
            sizes[f"tokens-{i:05d}.bin"] = int(self.dtype[2:]) * min(self.tokens_per_file, self.num_tokens - start)
        if sizes.keys() != self.sha256.keys():
            raise InputError("its files are not those of its counts")
        for name, size in sizes.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise InputError(f"{name} is missing or has not the {size:,} bytes of its counts")


class TokenShards:
    """The documents of one split as token ids, each with an end token, memory-mapped from a folder.

    `num_documents`, `num_tokens` and `fingerprint` (hex, follows from the contents) are plain attributes; `offsets`,
    (num_documents + 1,) int64 and memory-mapped, says where each document starts, then `num_tokens`.
    """

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        """Open `folder`; InputError names a file that is missing or damaged. `verify`: compare the checksums too."""
        try:
            values = read_json(folder / "manifest.json")
            if values.get("format") != _FORMAT:
                raise InputError(f"manifest.json is not of format {_FORMAT}")
            manifest = read_record(_Manifest, values, "manifest.json")
            manifest.check_counts(folder)
            for name, checksum in manifest.sha256.items() if verify else ():
                if sha256(folder / name) != checksum:
                    raise InputError(f"{name} does not match its checksum")
            self.offsets: np.ndarray = np.memmap(folder / "offsets.bin", dtype="<i8", mode="r")
            if self.offsets[0] != 0 or self.offsets[-1] != manifest.num_tokens or np.any(np.diff(self.offsets) < 1):
                raise InputError("offsets.bin does not fit the counts")
        except (OSError, InputError) as error:
            raise InputError(
                f"data: the encoded text in {folder} is damaged ({error}): delete the folder and run again to encode it"
            ) from None
        self.num_documents = manifest.num_documents
        self.num_tokens = manifest.num_tokens
        self.fingerprint = fingerprint_of("shards", json.dumps(values, sort_keys=True))
        self._tokens_per_file = manifest.tokens_per_file
        self._files = [
            np.memmap(folder / name, dtype=manifest.dtype, mode="r")
            for name in sorted(manifest.sha256)
            if name != "offsets.bin"
        ]

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) uint16 or uint32: tokens start .. stop - 1 of all documents laid end to end."""
        size = self._tokens_per_file
        files = range(start // size, (stop - 1) // size + 1)
        parts = [self._files[i][max(start - i * size, 0) : stop - i * size] for i in files]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, index: int) -> np.ndarray:
        """(length,) uint16 or uint32: the tokens of one document, the end token last."""
        return self.tokens(int(self.offsets[index]), int(self.offsets[index + 1]))

    @cached_property
    def lengths(self) -> np.ndarray:
        """(num_documents,) int64: tokens of each document, the end token included."""
        return np.diff(self.offsets)


def load_or_encode(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    split: Split,
    cache_dir: Path,
    note: Callable[[str], None] = lambda text: None,
) -> TokenShards:
    """The documents of one split: encoded in parallel as they stream by, or opened if they are in the cache.

    `note` gets a line with the counts so far after every chunk of about a million characters. One process at a
    time encodes, and others wait for it. One of the processes that train together on a machine checks the files.

    Raises InputError if the split has no documents or cached files are damaged.
    """
    key = fingerprint_of(_FORMAT, corpus.fingerprint, tokenizer.fingerprint, split)
    folder = cache_dir / f"tokens-{key}"

    def encoded() -> Iterator[list[list[int]]]:
        num_documents = num_tokens = 0
        for texts in _chunks(corpus.documents(split)):
            documents = [[*ids, tokenizer.end_id] for ids in tokenizer.encode_batch(texts)]
            yield documents
            num_documents += len(documents)
            num_tokens += sum(map(len, documents))
            note(f"Encoding {corpus.name} ({split}): {num_documents:,} documents, {num_tokens:,} tokens")
        if not num_documents:
            raise InputError(
                f"The {split} split of {corpus.name} has no documents: give more text or a larger {split}_fraction"
            )

    if not folder.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir / LOCK, note):
            if not folder.exists():
                origin = {"corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "split": split}
                write_shards(folder, encoded(), vocab_size=tokenizer.vocab_size, origin=origin)
    return TokenShards(folder, verify=os.environ.get("LOCAL_RANK", "0") == "0")


def write_shards(
    folder: Path,
    chunks: Iterable[list[list[int]]],
    *,
    vocab_size: int,
    origin: dict[str, str],
    tokens_per_file: int = TOKENS_PER_FILE,
) -> TokenShards:
    """Write documents, given as chunks of lists of token ids below `vocab_size`, to `folder` and open it.

    `origin` says in the manifest where the documents come from. `folder` appears at once and complete.
    """
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    num_documents = num_tokens = 0
    with new_folder(folder) as temporary:
        with (temporary / "offsets.bin").open("wb") as offsets:
            offsets.write(np.zeros(1, "<i8").tobytes())
            for documents in chunks:
                num_documents += len(documents)
                ends = num_tokens + np.cumsum([len(ids) for ids in documents], dtype="<i8")
                offsets.write(ends.tobytes())
                tokens = np.fromiter(chain.from_iterable(documents), dtype)
                while tokens.size:
                    piece = tokens[: tokens_per_file - num_tokens % tokens_per_file]
                    with (temporary / f"tokens-{num_tokens // tokens_per_file:05d}.bin").open("ab") as file:
                        file.write(piece.tobytes())
                    num_tokens += piece.size
                    tokens = tokens[piece.size :]
        manifest = {
            "format": _FORMAT,
            **origin,
            "dtype": dtype,
            "num_documents": num_documents,
            "num_tokens": num_tokens,
            "tokens_per_file": tokens_per_file,
            "sha256": {path.name: sha256(path) for path in sorted(temporary.iterdir())},
        }
        write_json(temporary / "manifest.json", manifest)
    return TokenShards(folder, verify=False)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHARACTERS_PER_CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
