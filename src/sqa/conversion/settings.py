"""The settings of a conversion, checked before any weight is read."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqa import storage
from sqa.config import AttentionConfig
from sqa.conversion import surgery
from sqa.conversion.allocation import allocate
from sqa.conversion.importance import Method
from sqa.conversion.language_model import LanguageModel
from sqa.conversion.subject import Subject
from sqa.conversion.surgery import Plan
from sqa.data import Corpus, open_corpus
from sqa.errors import InputError
from sqa.interop.hub import local_path
from sqa.measure.machine import find_device
from sqa.records import Checked


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """Everything that decides the result of a conversion.

    `query_heads`, `kv_heads`: heads that each layer keeps (kv_heads None: all of them; in multi-head attention one for
    each query head). `allocation`: `uniform` gives every layer the same number of query heads; `measured` gives the
    layers that need them most more of the same total; under `measured-kv` a layer may also lose KV heads, with all of
    their query heads. `method`: how heads are chosen. `pooling`: how KV heads are merged. `sequences`: rows of `length`
    tokens to calibrate on; an eighth of them is held out. `heal_tokens`: tokens of healing; the share `layerwise` of
    them trains each layer alone first. `train`: the parameters that healing changes. `control`: whether the original is
    trained on the same tokens, too. `evaluation_tokens`: tokens to measure on, in each domain. `speed_at`: lengths to
    time (None: 512, 2,048 and 8,192; for an encoder 128, 256 and 512). `dtype`: bfloat16 computes everything under
    autocast. `compile`: whether the model that is healed is compiled. `device`: PyTorch's name of it. `threads`: of the
    CPU, 0 for PyTorch's choice.

    Raises InputError, naming the field, for what cannot be run.
    """

    _where = "convert"
    query_heads: int
    kv_heads: int | None = None
    allocation: Literal["uniform", "measured", "measured-kv"] = "uniform"
    method: Method = "l2"
    pooling: Literal["aligned", "mean"] = "aligned"
    sequences: int = 128
    length: int = 512
    heal_tokens: int = 0
    layerwise: float = 0.2
    train: Literal["attention", "all"] = "attention"
    learning_rate: float = 3e-4
    batch_size: int = 8
    control: bool = False
    evaluation_tokens: int = 16_384
    speed_at: tuple[int, ...] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    device: str = "cpu"
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 4 * (os.cpu_count() or 1)
        for name, fits, wanted in (
            ("sequences", self.sequences >= 8, "at least 8"),
            ("length", self.length >= 2, "at least 2"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("evaluation_tokens", self.evaluation_tokens >= self.length, f"at least length={self.length}"),
            ("threads", 0 <= self.threads <= most, f"0 to {most} (four a core)"),
            ("speed_at", min(self.speed_at or (1,)) >= 1, "lengths of at least 1"),
            (
                "heal_tokens",
                self.heal_tokens == 0 or self.heal_tokens >= self.tokens_per_step,
                f"0 or at least one step of {self.tokens_per_step} tokens",
            ),
            ("layerwise", 0 <= self.layerwise <= 1, "a share from 0 to 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
        ):
            if not fits:
                raise InputError(f"convert: {name} must be {wanted}, got {getattr(self, name)}")
        find_device(self.device)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step of healing."""
        return self.batch_size * self.length

    @property
    def steps(self) -> int:
        """Steps of healing in all."""
        return self.heal_tokens // self.tokens_per_step

    @property
    def layerwise_steps(self) -> int:
        """The first steps, which heal layer by layer."""
        return round(self.layerwise * self.steps)


def subject_class(directory: Path) -> type[Subject]:
    """LanguageModel or Encoder, by the model_type of the directory."""
    if directory.is_dir() and storage.read_config(directory).get("model_type") in ("bert", "sqa_bert"):
        from sqa.conversion.encoder import Encoder

        return Encoder
    return LanguageModel


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion that has been checked: source, output, text and settings.

    `second`: the second domain to measure on, if there is one. `before`: the original's attention layers. `speed_at`:
    the lengths to time that the model can read.
    """

    source: Path
    out: Path
    calibration: Corpus
    second: Corpus | None
    settings: Settings
    before: tuple[AttentionConfig, ...]
    speed_at: tuple[int, ...]

    @property
    def work(self) -> Path:
        """The folder from which a stopped conversion continues."""
        return self.out.with_name(f".{self.out.name}.converting")

    @property
    def total(self) -> int:
        """Query heads of all layers after the conversion."""
        return self.settings.query_heads * len(self.before)

    def counts(self) -> list[list[tuple[int, int]]]:
        """For each layer the numbers of query and KV heads that a measured allocation may leave it with."""
        found = []
        for layer in self.before:
            surgery.check_heads(layer)
            heads, kv_heads = layer.num_query_heads, layer.num_kv_heads
            if heads == kv_heads:  # multi-head attention, whose KV heads go with their query heads
                found.append([(n, n) for n in range(1, heads + 1)])
                continue
            fewest = 1 if self.settings.allocation == "measured-kv" else kv_heads
            of_each = range(1, heads // kv_heads + 1)
            found.append([(n * each, n) for n in range(kv_heads, fewest - 1, -1) for each in of_each])
        return found

    def uniform(self) -> list[Plan]:
        """The plan of each layer where all keep the same number of query heads."""
        return [surgery.plan_heads(layer, self.settings.query_heads, self.settings.kv_heads) for layer in self.before]

    def shapes(self) -> list[AttentionConfig]:
        """The layers after the conversion, where they may differ those of any allocation with the same total.

        Raises InputError for counts that do not fit.
        """
        if self.settings.allocation == "uniform":
            return [after for after, _ in self.uniform()]
        kv_heads = [dict(reversed(pairs)) for pairs in self.counts()]  # the most for each number of query heads
        query_heads = allocate([dict.fromkeys(each, 0.0) for each in kv_heads], self.total)
        return [
            layer.replace(num_query_heads=n, num_kv_heads=of_each[n])
            for layer, n, of_each in zip(self.before, query_heads, kv_heads, strict=True)
        ]


def prepare(source: str | Path, out: Path, settings: Settings, *, calibration: str, evaluate: str | None) -> Job:
    """Check all that needs no weights and no text. Raises InputError, and writes nothing."""
    directory = local_path(source)
    storage.refuse_inside(out, directory)
    subject = subject_class(directory)
    before, longest = subject.shape(directory)
    speed_at = subject.default_speed_at if settings.speed_at is None else settings.speed_at
    job = Job(
        source=directory,
        out=out,
        calibration=open_corpus(calibration),
        second=None if evaluate is None or evaluate == calibration else open_corpus(evaluate),
        settings=settings,
        before=before,
        speed_at=tuple(n for n in speed_at if n <= longest),
    )
    only_figures_missing = out.name and (job.work / "state.json").is_file() and (out / "conversion.json").is_file()
    if not only_figures_missing:
        storage.refuse_existing(out)
    measured = settings.allocation != "uniform"
    if measured and settings.kv_heads is not None:
        raise InputError(f"convert: allocation {settings.allocation} decides about KV heads; leave kv_heads out")
    job.shapes()  # refuses counts that do not fit
    if settings.length > longest:
        raise InputError(f"convert: length must be at most what the model reads, {longest}, got {settings.length}")
    for name, needs_loss in (
        ("method taylor", settings.method == "taylor"),
        (f"allocation {settings.allocation}", measured),
        ("control", settings.control),
    ):
        if needs_loss and not subject.predicts:
            raise InputError(f"convert: {name} needs a loss, which an encoder has not; leave it out")
    return job
