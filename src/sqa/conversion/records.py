"""The records of a conversion and their JSON form, which conversion.json holds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from sqa.records import read_fields, read_value


@dataclass(frozen=True, kw_only=True)
class _Figures:
    """Named numbers, some of which may be None."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:,.4f}" for name, value in vars(self).items() if value is not None)


@dataclass(frozen=True, kw_only=True)
class LanguageQuality(_Figures):
    """Quality of a language model: loss in nats a real token, perplexity, KL(original || this) in nats a token.

    `agreement`: the share of positions at which both find the same token most likely.
    """

    loss: float
    perplexity: float
    kl: float
    agreement: float | None = None  # the first version did not measure it


@dataclass(frozen=True, kw_only=True)
class EmbeddingQuality(_Figures):
    """Quality of an encoder: cosine of embeddings to the original's; share of the nearest ten passages that stay."""

    cosine: float
    neighbours: float


Quality = LanguageQuality | EmbeddingQuality


def _quality(values: Mapping[str, Any]) -> Quality:
    kind: type[Quality] = LanguageQuality if "loss" in values else EmbeddingQuality
    return read_fields(kind, values, "quality")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Quality after a stage of the conversion, and the tokens of healing before it.

    `quality`: on the validation split of the calibration text. `elsewhere`: on the second domain, if measured.
    """

    stage: str
    tokens: int
    quality: Quality
    elsewhere: Quality | None = None

    def __str__(self) -> str:
        after = f" ({self.tokens:,} tokens of healing)" if self.tokens else ""
        return f"{self.stage}{after}: {self.quality}"

    def to_dict(self) -> dict[str, Any]:
        values = {"stage": self.stage, "tokens": self.tokens, **asdict(self.quality)}
        return values if self.elsewhere is None else values | {"elsewhere": asdict(self.elsewhere)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        elsewhere = read_value(dict[str, Any] | None, values.get("elsewhere"), "stage.elsewhere")
        found = {"quality": _quality(values), "elsewhere": None if elsewhere is None else _quality(elsewhere)}
        return read_fields(cls, {**values, **found}, "stage")


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """The query heads that a layer kept, and the errors of its attention output on the original's inputs.

    Errors are on held-out text, as shares of the output's energy.
    """

    kept: tuple[int, ...]
    dropped: float
    refitted: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of one pass over n tokens before and after, timed in turns: {p20, median, p80} each."""

    what: str
    n: int
    before: dict[str, float]
    after: dict[str, float]

    @property
    def ratio(self) -> float:
        """The median before over the median after."""
        return self.before["median"] / self.after["median"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The greedy continuation of a prompt by the original and by the converted model."""

    prompt: str
    original: str
    converted: str


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """All that is known of a conversion. While it runs, what is measured last is empty.

    `settings`: with digests of the model and the text that were read. `parameters`: before and after. `wall_s` and
    `peak_bytes`: of the last process, without what came before a resumption.
    """

    settings: dict[str, Any]
    stages: tuple[Stage, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    parameters: tuple[int, ...] | None = None
    speed: tuple[Speed, ...] = ()
    samples: tuple[Sample, ...] = ()
    serve: str | None = None
    wall_s: float | None = None
    peak_bytes: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git: str | None = None

    def with_stage(self, stage: Stage) -> Self:
        """A copy with this stage, which replaces an earlier measurement of the same."""
        others = (old for old in self.stages if (old.stage, old.tokens) != (stage.stage, stage.tokens))
        return replace(self, stages=(*others, stage))

    def has(self, stage: str, tokens: int) -> bool:
        """Whether a stage has been measured after so many tokens of healing."""
        return any((each.stage, each.tokens) == (stage, tokens) for each in self.stages)

    def last(self, stage: str) -> Stage:
        """The last measurement of a stage."""
        return next(each for each in reversed(self.stages) if each.stage == stage)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, which `from_dict` reads back equal."""
        values = asdict(self) | {
            "stages": [stage.to_dict() for stage in self.stages],
            "speed": [{**asdict(speed), "ratio": speed.ratio} for speed in self.speed],
        }
        if (counts := values.pop("parameters")) is not None:
            values["cost"] = {
                name: {"parameters": count} for name, count in zip(("before", "after"), counts, strict=True)
            }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s output, and what earlier versions wrote. Raises InputError that names a damaged field."""
        if "cost" in values:
            costs = read_value(dict[str, dict[str, Any]], values["cost"], "conversion.cost")
            counts = [costs.get(name, {}).get("parameters") for name in ("before", "after")]
            values = {**values, "parameters": counts}
        return read_fields(cls, values, "conversion")
