"""A zero-shot test that needs no download: which of four paragraphs continues an article?

An item is the end of a paragraph, the beginning of the next one, and three beginnings of paragraphs of other articles,
which are the right answers of other items: without the context all choices are equally likely, and guessing gets a
quarter right. A model's answer is the choice with the highest log-likelihood per character, like `acc_norm` of
lm-evaluation-harness. Each article gives at most one item, so that items are independent.
"""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from rich.table import Table
from tokenizers import Tokenizer
from torch import Tensor

from sqa import storage
from sqa.config import unknown
from sqa.data import Corpus
from sqa.errors import InputError, first_line, load_extra
from sqa.interop import llama, open_source, read_text_side
from sqa.interop.hub import local_path
from sqa.measure.machine import find_device
from sqa.progress import Display
from sqa.tables import make_table

CHOICES = 4
PARAGRAPH = 120  # characters: shorter ones are headings, captions and lists
CONTEXT, CHOICE = 300, 120  # characters, at most
SEPARATOR = "\n\n"
Z = 1.959964  # of a normal distribution, two-sided 95 %


@dataclass(frozen=True, kw_only=True)
class Item:
    """The end of a paragraph, and beginnings of others; choice number `answer` is the one that follows it."""

    context: str
    choices: tuple[str, ...]
    answer: int


def make_items(documents: Iterable[str], count: int, seed: int = 0) -> list[Item]:
    """Items from the first `count` documents that have two paragraphs of 120 characters, in their order.

    Raises InputError when there are fewer, and for fewer items than an item has choices.
    """
    if count < CHOICES:
        raise InputError(f"items must be at least {CHOICES}, as many as there are choices, got {count}")
    draw = random.Random(seed)
    pairs: list[tuple[str, str]] = []
    for text in documents:
        paragraphs = [part for part in map(str.strip, text.split(SEPARATOR)) if len(part) >= PARAGRAPH]
        if len(paragraphs) > 1:
            at = draw.randrange(len(paragraphs) - 1)
            # cut between words
            context = paragraphs[at][-CONTEXT:].partition(" ")[2] or paragraphs[at][-CONTEXT:]
            choice = paragraphs[at + 1][:CHOICE].rpartition(" ")[0] or paragraphs[at + 1][:CHOICE]
            pairs.append((context, choice))
        if len(pairs) == count:
            break
    else:
        raise InputError(
            f"items: {count} were asked for, but only {len(pairs)} articles of this text have two paragraphs of at "
            f"least {PARAGRAPH} characters; ask for fewer, or give more text"
        )
    items = []
    for i, (context, choice) in enumerate(pairs):
        others = [j + (j >= i) for j in draw.sample(range(count - 1), CHOICES - 1)]
        answer = draw.randrange(CHOICES)
        choices = [pairs[j][1] for j in others]
        choices.insert(answer, choice)
        items.append(Item(context=context, choices=tuple(choices), answer=answer))
    return items


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A causal language model: `predict(ids, n)` gives logits (B, n, V) of the last n positions of ids (B, T)."""

    tokenizer: Tokenizer
    predict: Callable[[Tensor, int], Tensor]
    device: str = "cpu"

    @torch.no_grad()
    def log_likelihoods(self, item: Item) -> list[float]:
        """Nats of each choice after the context. Raises InputError where one is not finite."""
        begun = len(self.tokenizer.encode(item.context).ids)
        rows = [self.tokenizer.encode(item.context + SEPARATOR + choice).ids for choice in item.choices]
        longest = max(map(len, rows))
        # no token of a causal model sees the padding on its right
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        log_p = self.predict(padded, longest - begun + 1)[:, :-1].float().log_softmax(-1)
        taken = log_p.gather(-1, padded[:, begun:, None])[..., 0].cpu()
        found = [float(values[: len(row) - begun].sum()) for values, row in zip(taken, rows, strict=True)]
        if not all(map(math.isfinite, found)):
            raise InputError(f"model: it gives log-likelihoods that are not finite ({found})")
        return found

    def choose(self, item: Item) -> int:
        """The index of the choice with the highest log-likelihood per character."""
        scores = [nats / len(choice) for nats, choice in zip(self.log_likelihoods(item), item.choices, strict=True)]
        return scores.index(max(scores))


def open_reader(source: str | Path) -> Callable[[str], Reader]:
    """A function that loads a model on a device: one that `sqa.load_model` reads, or a directory of transformers.

    Raises InputError, before weights are read, for a model that neither reads, or that has no tokenizer.json.
    """
    path = local_path(source)
    load: Callable[[], Any]
    kind = storage.read_config(path).get("model_type") if path.is_dir() else None
    if kind in (None, storage.MODEL_TYPE, *llama.MODEL_TYPES):
        found = open_source(path)
        if path.is_dir() and storage.count_tensors(path) is None:
            found.read_tensors()  # raises the error
        load, vocab_size, argument = found.load, found.config.vocab_size, "num_logits"
    else:
        vocab_size, argument = _of_transformers(path, "AutoConfig").get_text_config().vocab_size, "logits_to_keep"
        load = partial(_of_transformers, path, "AutoModelForCausalLM", use_safetensors=True)
    tokenizer = read_text_side(path, vocab_size).tokenizer
    if tokenizer is None:
        raise InputError(f"model: {source} has no tokenizer.json, which the items are encoded with")

    def loaded(device: str) -> Reader:
        model = load().eval().to(device)
        return Reader(tokenizer=tokenizer, predict=lambda ids, n: model(ids, **{argument: n}).logits, device=device)

    return loaded


def _of_transformers(path: Path, kind: str, **options: Any) -> Any:
    """Read a directory with one of transformers' Auto classes, without running code from there."""
    transformers = load_extra("transformers", f"{path} needs transformers", "hf")
    try:
        automatic = getattr(transformers, kind)
        return automatic.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers may raise anything
        raise InputError(
            f"model: {path} is no causal language model that transformers reads: {first_line(error)}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Score:
    """Whether a model answered each item right, in the items' order."""

    model: str
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of the items answered right, 0 to 1."""
        return sum(self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, by Wilson."""
        n, p = len(self.right), self.accuracy
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
        return middle - half, middle + half

    def minus(self, other: Self) -> tuple[float, float, float]:
        """Accuracy minus the other's on the same items, and the low and high end of its 95 % interval.

        Agresti and Min 2005 (doi 10.1002/sim.1781): Wald's interval of paired shares with half an item added to each
        of the four cells, so that the interval of two models with the same answers has a width.
        """
        n = len(self.right)
        gained = sum(a and not b for a, b in zip(self.right, other.right, strict=True))
        lost = sum(b and not a for a, b in zip(self.right, other.right, strict=True))
        middle = (gained - lost) / (n + 2)
        half = Z * math.sqrt((gained + lost + 1) / (n + 2) - middle**2) / math.sqrt(n + 2)
        return (gained - lost) / n, max(-1.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `right` is what `from_dict` needs."""
        low, high = self.interval
        return {
            "model": self.model,
            "accuracy": self.accuracy,
            "interval": [low, high],
            "right": [int(each) for each in self.right],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s output."""
        return cls(model=values["model"], right=tuple(map(bool, values["right"])))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The items that were drawn, and how each model did on them."""

    items: tuple[Item, ...]
    scores: tuple[Score, ...]


def evaluate(
    sources: Sequence[str | Path],
    corpus: Corpus,
    *,
    items: int = 500,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    display: Display | None = None,
) -> Evaluation:
    """Test models on the same items, drawn from the validation split of `corpus`; bfloat16 uses autocast.

    Raises InputError, before weights are read, for what `open_reader` or `make_items` refuses and for another dtype or
    device.
    """
    if dtype not in ("float32", "bfloat16"):
        raise unknown("dtype", dtype, ("float32", "bfloat16"))
    find_device(device)
    display = display or Display()
    readers = [(str(source), open_reader(source)) for source in sources]
    display.note(f"drawing {items:,} items from {corpus.name}")
    drawn = make_items(corpus.documents("validation"), items, seed)
    scores = []
    for name, load in readers:
        display.note(f"reading the model {name}")
        reader = load(device)
        right = []
        display.start(name, items)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            for item in drawn:
                right.append(reader.choose(item) == item.answer)
                display.step(None)
        scores.append(Score(model=name, right=tuple(right)))
        display.finish(f"{name}: {scores[-1].accuracy:.1%} of {items} items")
    return Evaluation(items=tuple(drawn), scores=tuple(scores))


def score_table(scores: Sequence[Score]) -> Table:
    """The accuracy of each model, and its difference to the first one's."""
    first, *_ = scores
    table = make_table("model", "right", "95 %", "vs first", "95 % ", names=("model",), gap=2)
    for score in scores:
        low, high = score.interval
        row = [score.model, f"{score.accuracy:.1%}", f"{low:.1%} to {high:.1%}"]
        if score is not first:
            difference, low, high = score.minus(first)
            row += [f"{difference:+.1%}", f"{low:+.1%} to {high:+.1%}"]
        table.add_row(*row)
    return table
