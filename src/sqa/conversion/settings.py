"""What is asked of a conversion, checked before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from sqa import interop
from sqa.config import AttentionConfig, nearest
from sqa.conversion import importance, surgery
from sqa.data import open_corpus
from sqa.interop import native
from sqa.interop.hub import local_directory
from sqa.training.loop import StepReport


class Display(Protocol):
    """What a conversion tells while it runs."""

    def note(self, text: str) -> None: ...
    def start(self, label: str, steps: int) -> None: ...
    def step(self, report: StepReport | None) -> None: ...
    def finish(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a conversion gives.

    `query_heads` and `kv_heads` a layer (None: as surgery.plan_heads says). `method` chooses heads; `pooling` says how
    KV heads are joined. `sequences` rows of `length` tokens calibrate, an eighth of them held out. `heal_tokens` are
    spent on healing, of them `layerwise` (a share) layer by layer first; `train` says which parameters move. `control`
    also trains the original on the same tokens. `evaluation_tokens` measure; `speed_at` are the lengths that are timed.

    Raises ValueError, naming the field, for what cannot be run.
    """

    query_heads: int
    kv_heads: int | None = None
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
    speed_at: tuple[int, ...] = (512, 2048)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        choices = {
            "method": tuple(importance.METHODS),
            "pooling": ("aligned", "mean"),
            "train": ("attention", "all"),
            "dtype": ("float32", "bfloat16"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"convert: {name} must be one of {', '.join(known)}, got {value!r}{nearest(value, list(known))}"
                )
        for name, least in (("sequences", 8), ("length", 2), ("batch_size", 1), ("evaluation_tokens", self.length)):
            if getattr(self, name) < least:
                raise ValueError(f"convert: {name} must be at least {least}, got {getattr(self, name)}")
        if self.heal_tokens and self.heal_tokens < self.batch_size * self.length:
            raise ValueError(
                f"convert: heal must be 0 or at least one step of {self.batch_size * self.length} tokens, "
                f"got {self.heal_tokens}"
            )
        if not 0 <= self.layerwise <= 1:
            raise ValueError(f"convert: layerwise must be a share from 0 to 1, got {self.layerwise}")
        if not self.learning_rate > 0:
            raise ValueError(f"convert: learning_rate must be above 0, got {self.learning_rate}")

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


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion that is known to fit: from which directory, to where, by which heads."""

    source: Path
    out: Path
    calibration: str
    settings: Settings
    heads: tuple[surgery.Heads, ...]
    attention: tuple[AttentionConfig, ...]

    @property
    def work(self) -> Path:
        """Where a conversion keeps what it can go on from."""
        return self.out.with_name(f".{self.out.name}.converting")


def prepare(source: str, out: Path, calibration: str, settings: Settings) -> Job:
    """Check all that can be checked without reading a weight. Raises ValueError; nothing is written."""
    directory = local_directory(source)
    native.refuse_existing(out)
    if directory.resolve() in out.resolve().parents:
        raise ValueError(f"output: {out} lies inside the model {directory}, which is never changed; name another place")
    config = interop.load_config(directory)
    heads = tuple(surgery.plan_heads(layer, settings.query_heads, settings.kv_heads) for layer in config.layers)
    attention = tuple(
        layer.replace(num_query_heads=each.num_query_heads, num_kv_heads=each.num_kv_heads)
        for layer, each in zip(config.layers, heads, strict=True)
    )
    interop.check_like(config.replace(attention=attention), directory)
    if settings.length > config.max_seq_len:
        raise ValueError(
            f"convert: length must be at most the model's max_seq_len={config.max_seq_len}, got {settings.length}"
        )
    open_corpus(calibration)
    return Job(source=directory, out=out, calibration=calibration, settings=settings, heads=heads, attention=attention)
