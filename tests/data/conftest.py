import random
from collections.abc import Callable

import pytest

from sqa.data import Corpus

WORDS = ["sparse", "query", "attention", "keeps", "fewer", "heads", "and", "each", "head", "sees", "every", "key"]


def make_text(seed: int, num_words: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


@pytest.fixture
def make_corpus() -> Callable[..., Corpus]:
    """A corpus in memory: `train` documents, and three for validation."""

    def make(train: list[str] | None = None, fingerprint: str = "f00d") -> Corpus:
        texts = {
            "train": train or [make_text(i, 60) for i in range(20)],
            "validation": [make_text(100 + i, 40) for i in range(3)],
        }
        return Corpus(name="memory", identify=lambda: fingerprint, read=lambda split: iter(texts[split]))

    return make
