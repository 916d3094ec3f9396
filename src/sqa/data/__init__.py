"""From text to batches: a corpus, a tokenizer trained on it, and both splits encoded on disk."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqa.data.corpus import Corpus, fingerprint_of, open_corpus
from sqa.data.shards import TokenShards, load_or_encode
from sqa.data.tokenizer import Tokenizer, check_vocab_size, load_or_train_tokenizer
from sqa.files import default_cache_dir

__all__ = ["Corpus", "Prepared", "Tokenizer", "open_corpus", "prepare"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a comparison reads its batches from."""

    corpus: Corpus
    tokenizer: Tokenizer
    train: TokenShards
    validation: TokenShards

    @property
    def fingerprint(self) -> str:
        """Hex digest. Two comparisons share it exactly when they train and evaluate on the same tokens."""
        return fingerprint_of(self.train.fingerprint, self.validation.fingerprint, self.tokenizer.fingerprint)


def prepare(
    source: str,
    *,
    vocab_size: int,
    train_fraction: float = 0.95,
    validation_fraction: float = 0.05,
    cache_dir: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Open `source`, train its tokenizer and encode both splits, or take them from the cache.

    `cache_dir` defaults to `default_cache_dir()`. `note` gets lines of text about the progress.
    Raises InputError as `open_corpus`, `load_or_train_tokenizer` and `load_or_encode` do.
    """
    check_vocab_size(vocab_size)
    corpus = open_corpus(source, train_fraction=train_fraction, validation_fraction=validation_fraction)
    cache_dir = cache_dir or default_cache_dir()
    tokenizer = load_or_train_tokenizer(corpus, vocab_size=vocab_size, cache_dir=cache_dir, note=note)
    # validation first: it is small, and the split more likely to be empty
    validation = load_or_encode(corpus, tokenizer, split="validation", cache_dir=cache_dir, note=note)
    train = load_or_encode(corpus, tokenizer, split="train", cache_dir=cache_dir, note=note)
    return Prepared(corpus=corpus, tokenizer=tokenizer, train=train, validation=validation)
