"""Byte-level BPE by the `tokenizers` library: trained on a corpus, and cached."""

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sqa.data.corpus import Corpus, fingerprint_of
from sqa.errors import InputError
from sqa.files import write_text
from sqa.progress import interruptible

END_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
MIN_VOCAB_SIZE = 2 + 256  # the special tokens and the single bytes
MAX_VOCAB_SIZE = 1 << 20  # four times that of the largest known; the library ends the process where memory is short
MAX_TRAINING_CHARACTERS = 100_000_000

_FORMAT = 1  # part of the cache key: raise it when the same corpus would give another tokenizer


class Tokenizer:
    """A byte-level BPE vocabulary. It can encode every text, and decoding gives back exactly that text.

    Encoding never produces `<|endoftext|>` and `<|pad|>`: in a text they are ordinary characters.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap `backend`; InputError if it lacks the two special tokens."""
        end_id, pad_id = backend.token_to_id(END_TOKEN), backend.token_to_id(PAD_TOKEN)
        if end_id is None or pad_id is None:
            raise InputError(f"A tokenizer must have the special tokens {END_TOKEN} and {PAD_TOKEN}")
        backend.encode_special_tokens = True
        self._backend = backend
        self.end_id: int = end_id
        self.pad_id: int = pad_id
        self.vocab_size: int = backend.get_vocab_size()
        self.fingerprint: str = fingerprint_of("tokenizer", backend.to_str())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end token."""
        return self._backend.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without end tokens; the texts are encoded in parallel."""
        encodings = interruptible(lambda: self._backend.encode_batch_fast(list(texts)))
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out, incomplete UTF-8 becomes U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    @property
    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int64: how many UTF-8 bytes each token stands for, 0 for special tokens."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._backend.get_vocab().items():
            sizes[index] = len(token)  # byte-level BPE writes each byte as one character
        sizes[[self.end_id, self.pad_id]] = 0
        return sizes

    def save(self, path: Path) -> None:
        """Write `path` in the JSON format of the `tokenizers` library, atomically."""
        write_text(path, self._backend.to_str())

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read what `save` wrote; InputError if there is no such file or it holds no tokenizer."""
        if not path.is_file():
            raise InputError(f"The tokenizer file {path} does not exist")
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"The tokenizer file {path} is damaged ({error}): delete it") from None
        return cls(backend)


def check_vocab_size(vocab_size: int) -> None:
    """Raise InputError if `vocab_size` is too small to hold every byte, or beyond reason."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and 2 special tokens), not {vocab_size}"
        )
    if vocab_size > MAX_VOCAB_SIZE:
        raise InputError(f"vocab_size must be at most {MAX_VOCAB_SIZE:,}, not {vocab_size:,}")


def load_or_train_tokenizer(
    corpus: Corpus,
    *,
    vocab_size: int,
    cache_dir: Path,
    note: Callable[[str], None] = lambda text: None,
) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` entries, trained on the train documents of `corpus` or cached.

    Training streams the documents and stops after MAX_TRAINING_CHARACTERS. End and pad are ids 0 and 1.
    `note` gets a line when training starts. Raises InputError if `vocab_size` is too small to hold all
    bytes, or so large that the text does not fill it.
    """
    check_vocab_size(vocab_size)
    key = fingerprint_of(_FORMAT, corpus.fingerprint, vocab_size, MAX_TRAINING_CHARACTERS)
    path = cache_dir / f"tokenizer-{key}.json"
    if path.exists():
        return Tokenizer.load(path)
    note(f"Training a tokenizer of {vocab_size:,} entries on {corpus.name}")
    backend = _train(_first_characters(corpus.documents("train"), MAX_TRAINING_CHARACTERS), vocab_size)
    if backend.get_vocab_size() != vocab_size:
        if next(corpus.documents("train"), None) is None:
            raise InputError(f"The train split of {corpus.name} has no documents: give more text")
        raise InputError(
            f"vocab_size {vocab_size} is more than the corpus {corpus.name} fills: its train documents give "
            f"{backend.get_vocab_size()} entries; give more text or a smaller vocab_size"
        )
    tokenizer = Tokenizer(backend)
    cache_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return tokenizer


def _train(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    ended = threading.Event()
    try:
        interruptible(lambda: backend.train_from_iterator(takewhile(lambda text: not ended.is_set(), texts), trainer))
    finally:
        ended.set()  # an interrupted call reads no more text
    return backend


def _first_characters(texts: Iterator[str], count: int) -> Iterator[str]:
    for text in texts:
        yield text[:count]
        count -= len(text)
        if count <= 0:
            return
