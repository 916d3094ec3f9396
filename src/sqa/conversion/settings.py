"""What is asked of a conversion, checked before a weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqa import storage
from sqa.config import AttentionConfig, nearest
from sqa.conversion import allocation, importance, surgery
from sqa.conversion.decoder import Decoder
from sqa.conversion.subject import Subject
from sqa.data import Corpus, open_corpus
from sqa.errors import InputError
from sqa.interop.hub import local_path
from sqa.measure.machine import find_device


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a conversion gives.

    `query_heads` and `kv_heads` a layer (None: as surgery.plan_heads says). `allocation` says how query heads are
    spread: `uniform` gives every layer as many, `measured` gives as many in all to the layers that need them most.
    `method` chooses heads; `pooling` says how KV heads are joined. `sequences` rows of `length` tokens calibrate, an
    eighth of them held out. `heal_tokens` are spent on healing, of them `layerwise` (a share) layer by layer first;
    `train` says which parameters move. `control` also trains the original on the same tokens. `evaluation_tokens`
    measure, on each domain. `speed_at` are the lengths timed (None: 512, 2,048 and 8,192; of an encoder 128, 256 and
    512). `dtype` bfloat16 is autocast, of everything that is computed; `compile` compiles what healing trains.
    `device` is PyTorch's name of one, `threads` of the CPU 0 for PyTorch's choice.

    Raises ValueError, naming the field, for what cannot be run.
    """

    query_heads: int
    kv_heads: int | None = None
    allocation: Literal["uniform", "measured"] = "uniform"
    method: str = "l2"
    pooling: Literal["aligned", "mean"] = "aligned"
    sequences: int = 128
    length: int = 512
    heal_tokens: int = 0
    layerwise: float = 0.2
    train: Literal["attention", "all"] = "all"
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
        choices = {
            "allocation": ("uniform", "measured"),
            "method": tuple(importance.METHODS),
            "pooling": ("aligned", "mean"),
            "train": ("attention", "all"),
            "dtype": ("float32", "bfloat16"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise InputError(
                    f"convert: {name} must be one of {', '.join(known)}, got {value!r}{nearest(value, list(known))}"
                )
        for name, least in (("sequences", 8), ("length", 2), ("batch_size", 1), ("evaluation_tokens", self.length)):
            if getattr(self, name) < least:
                raise InputError(f"convert: {name} must be at least {least}, got {getattr(self, name)}")
        most = 4 * (os.cpu_count() or 1)
        if not 0 <= self.threads <= most:
            raise InputError(f"convert: threads must be 0 to {most} (four a core), got {self.threads}")
        if self.speed_at and min(self.speed_at) < 1:
            raise InputError(f"convert: speed_at must be lengths of at least 1, got {min(self.speed_at)}")
        find_device(self.device)
        if self.heal_tokens and self.heal_tokens < self.batch_size * self.length:
            raise InputError(
                f"convert: heal must be 0 or at least one step of {self.batch_size * self.length} tokens, "
                f"got {self.heal_tokens}"
            )
        if not 0 <= self.layerwise <= 1:
            raise InputError(f"convert: layerwise must be a share from 0 to 1, got {self.layerwise}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"convert: learning_rate must be above 0 and finite, got {self.learning_rate}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.length

    @property
    def steps(self) -> int:
        """Steps of healing in all."""
        return self.heal_tokens // self.tokens_per_step

    @property
    def layerwise_steps(self) -> int:
        """Those of them that heal layer by layer."""
        return round(self.layerwise * self.steps)


def subject_class(directory: Path) -> type[Subject]:
    """Decoder or Encoder, by the model_type of the directory."""
    if directory.is_dir() and storage.read_config(directory).get("model_type") in ("bert", "sqa_bert"):
        from sqa.conversion.encoder import Encoder

        return Encoder
    return Decoder


Plan = tuple[AttentionConfig, list[range]]
"""Of a layer: its shape afterwards, and the pools of heads of which it keeps the same number each."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion that is known to fit: from which directory, to where, with which text.

    `second` is the second domain that measures, if there is one.
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
        """Where a conversion keeps what it can go on from."""
        return self.out.with_name(f".{self.out.name}.converting")

    def plans(self, counts: Sequence[int]) -> list[Plan]:
        """Of each layer the plan that keeps so many query heads."""
        kv_heads = self.settings.kv_heads
        return [surgery.plan_heads(layer, n, kv_heads) for layer, n in zip(self.before, counts, strict=True)]

    @property
    def uniform(self) -> list[int]:
        """Query heads of each layer where all keep as many."""
        return [self.settings.query_heads] * len(self.before)

    def counts(self) -> list[int]:
        """Query heads of each layer: of `measured`, one of the spreads with this total, all of which cost as much."""
        if self.settings.allocation == "uniform":
            return self.uniform
        return allocation.spread([dict.fromkeys(plans, 0.0) for plans in self.choices()], sum(self.uniform))

    def choices(self) -> list[dict[int, Plan]]:
        """Of each layer all plans that keep its KV heads, by how many query heads stay."""
        return [_choices(layer) for layer in self.before]


def _choices(layer: AttentionConfig) -> dict[int, Plan]:
    multi_head = layer.num_query_heads == layer.num_kv_heads  # where KV heads go with their query heads
    step = 1 if multi_head else layer.num_kv_heads
    return {n: surgery.plan_heads(layer, n, None) for n in range(step, layer.num_query_heads + 1, step)}


def prepare(source: str | Path, out: Path, settings: Settings, *, calibration: str, evaluate: str | None) -> Job:
    """Check all that can be checked without reading a weight or a text. Raises ValueError; nothing is written."""
    directory = local_path(source)
    if directory.resolve() in out.resolve().parents:
        raise InputError(f"output: {out} lies inside the model {directory}, which is never changed; name another place")
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
    if not ((job.work / "state.json").is_file() and (out / "conversion.json").is_file()):  # only figures are missing
        storage.refuse_existing(out)
    if settings.allocation == "measured" and settings.kv_heads is not None:
        raise InputError("convert: allocation measured keeps the KV heads of each layer; leave kv_heads out")
    subject.check_source(directory, [after for after, _ in job.plans(job.counts())])
    if settings.length > longest:
        raise InputError(f"convert: length must be at most what the model reads, {longest}, got {settings.length}")
    if not subject.predicts:
        for name, asked in (
            ("method taylor", settings.method == "taylor"),
            ("allocation measured", settings.allocation == "measured"),
            ("control", settings.control),
        ):
            if asked:
                raise InputError(f"convert: {name} needs a loss, which an encoder has not; leave it out")
    return job
