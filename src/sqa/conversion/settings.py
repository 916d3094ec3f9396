"""What is asked of a conversion, checked before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqa import storage
from sqa.config import AttentionConfig, nearest
from sqa.conversion import importance, surgery
from sqa.conversion.decoder import Decoder
from sqa.conversion.subject import Subject
from sqa.data import open_corpus
from sqa.errors import InputError
from sqa.interop import check_like, load_config
from sqa.interop.hub import local_path


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a conversion gives.

    `query_heads` and `kv_heads` a layer (None: as surgery.plan_heads says). `method` chooses heads; `pooling` says how
    KV heads are joined. `sequences` rows of `length` tokens calibrate, an eighth of them held out. `heal_tokens` are
    spent on healing, of them `layerwise` (a share) layer by layer first; `train` says which parameters move. `control`
    also trains the original on the same tokens. `evaluation_tokens` measure. `speed_at` are the lengths timed (None:
    512 and 2,048; of an encoder 128, 256 and 512).

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
    speed_at: tuple[int, ...] | None = None
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
                raise InputError(
                    f"convert: {name} must be one of {', '.join(known)}, got {value!r}{nearest(value, list(known))}"
                )
        for name, least in (("sequences", 8), ("length", 2), ("batch_size", 1), ("evaluation_tokens", self.length)):
            if getattr(self, name) < least:
                raise InputError(f"convert: {name} must be at least {least}, got {getattr(self, name)}")
        if self.heal_tokens and self.heal_tokens < self.batch_size * self.length:
            raise InputError(
                f"convert: heal must be 0 or at least one step of {self.batch_size * self.length} tokens, "
                f"got {self.heal_tokens}"
            )
        if not 0 <= self.layerwise <= 1:
            raise InputError(f"convert: layerwise must be a share from 0 to 1, got {self.layerwise}")
        if not self.learning_rate > 0:
            raise InputError(f"convert: learning_rate must be above 0, got {self.learning_rate}")

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


@dataclass(frozen=True, kw_only=True)
class Job:
    """A conversion that is known to fit: from which directory, to where, by which layers and pools of their heads."""

    source: Path
    out: Path
    calibration: str
    settings: Settings
    before: tuple[AttentionConfig, ...]
    after: tuple[AttentionConfig, ...]
    pools: tuple[list[range], ...]
    speed_at: tuple[int, ...]

    @property
    def work(self) -> Path:
        """Where a conversion keeps what it can go on from."""
        return self.out.with_name(f".{self.out.name}.converting")


def prepare(source: str, out: Path, calibration: str, settings: Settings) -> Job:
    """Check all that can be checked without reading a weight. Raises ValueError; nothing is written."""
    directory = local_path(source)
    storage.refuse_existing(out)
    if directory.resolve() in out.resolve().parents:
        raise InputError(f"output: {out} lies inside the model {directory}, which is never changed; name another place")
    subject = subject_class(directory)
    before, longest = subject.shape(directory)
    planned = (surgery.plan_heads(layer, settings.query_heads, settings.kv_heads) for layer in before)
    after, pools = zip(*planned, strict=True)
    if subject is Decoder:
        check_like(load_config(directory).replace(attention=after), directory)
    if settings.length > longest:
        raise InputError(f"convert: length must be at most what the model reads, {longest}, got {settings.length}")
    if subject is not Decoder and (settings.method == "taylor" or settings.control):
        raise InputError("convert: method taylor and control need a loss, which an encoder has not; leave them out")
    open_corpus(calibration)
    speed_at = subject.default_speed_at if settings.speed_at is None else settings.speed_at
    return Job(
        source=directory,
        out=out,
        calibration=calibration,
        settings=settings,
        before=before,
        after=after,
        pools=pools,
        speed_at=tuple(n for n in speed_at if n <= longest),
    )
