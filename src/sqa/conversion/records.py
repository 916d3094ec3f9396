"""What a conversion found, as records with a JSON form: the contents of conversion.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class LanguageQuality:
    """Of a language model: loss in nats a real token, its perplexity, KL(original || this) in nats a token.

    `agreement`: the share of positions at which both find the same token most likely.
    """

    loss: float
    perplexity: float
    kl: float
    agreement: float | None = None  # conversions of the first version did not measure it


@dataclass(frozen=True, kw_only=True)
class EmbeddingQuality:
    """Of an encoder: cosine of embeddings to the original's; share of each passage's nearest ten that stay."""

    cosine: float
    neighbours: float


Quality = LanguageQuality | EmbeddingQuality


def _shown(quality: Quality) -> str:
    return ", ".join(f"{name} {value:,.4f}" for name, value in asdict(quality).items() if value is not None)


def _quality(values: dict[str, Any]) -> Quality:
    kind = LanguageQuality if "loss" in values else EmbeddingQuality
    return kind(**{item.name: values[item.name] for item in fields(kind) if item.name in values})


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Quality after a stage of the conversion and so many tokens of healing.

    `quality` is on the validation split of the calibration text, `elsewhere` on the second domain, where measured.
    """

    stage: str
    tokens: int
    quality: Quality
    elsewhere: Quality | None = None

    def __str__(self) -> str:
        """One line: what a display tells when it is measured."""
        parts = [
            f"{self.stage} ({self.tokens:,} tokens of healing)" if self.tokens else self.stage,
            _shown(self.quality),
        ]
        return ": ".join(parts) + (f"; second domain: {_shown(self.elsewhere)}" if self.elsewhere else "")

    def to_dict(self) -> dict[str, Any]:
        values = {"stage": self.stage, "tokens": self.tokens, **asdict(self.quality)}
        return values if self.elsewhere is None else values | {"elsewhere": asdict(self.elsewhere)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        elsewhere = values.get("elsewhere")
        return cls(
            stage=values["stage"],
            tokens=values["tokens"],
            quality=_quality(values),
            elsewhere=None if elsewhere is None else _quality(elsewhere),
        )


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """Which query heads a layer kept, and the error of its attention output on the original's inputs.

    Errors are on held-out text, as a share of the output's energy.
    """

    kept: tuple[int, ...]
    dropped: float
    refitted: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(kept=tuple(values["kept"]), dropped=values["dropped"], refitted=values["refitted"])


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of one pass over a row of n tokens, before and after, in turns: {p20, median, p80} each."""

    what: str
    n: int
    before: dict[str, float]
    after: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.before["median"] / self.after["median"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The greedy continuation of a prompt by the original and by the converted model."""

    prompt: str
    original: str
    converted: str


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """All that is known of a conversion; what is measured last is empty while it runs.

    `settings` are those asked for, with fingerprints of the text that was read. `parameters`: before and after.
    `wall_s` and `peak_bytes` are those of the last process: what came before a resumption is not in them.
    """

    settings: dict[str, Any]
    stages: tuple[Stage, ...] = ()
    layers: tuple[LayerChange, ...] = ()
    parameters: tuple[int, int] | None = None
    speed: tuple[Speed, ...] = ()
    samples: tuple[Sample, ...] = ()
    serve: str | None = None
    wall_s: float | None = None
    peak_bytes: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git: str | None = None

    def with_stage(self, stage: Stage) -> Conversion:
        """With this stage measured, for the first time or again."""
        others = (old for old in self.stages if (old.stage, old.tokens) != (stage.stage, stage.tokens))
        return replace(self, stages=(*others, stage))

    def has(self, stage: str, tokens: int) -> bool:
        """Whether a stage was measured after so many tokens of healing."""
        return any((each.stage, each.tokens) == (stage, tokens) for each in self.stages)

    def last(self, stage: str) -> Stage:
        """The last measurement of a stage."""
        return next(each for each in reversed(self.stages) if each.stage == stage)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back equal."""
        values = asdict(self) | {
            "stages": [stage.to_dict() for stage in self.stages],
            "layers": [{**asdict(layer), "kept": list(layer.kept)} for layer in self.layers],
            "speed": [{**asdict(speed), "ratio": speed.ratio} for speed in self.speed],
            "samples": [asdict(sample) for sample in self.samples],
        }
        before_and_after = values.pop("parameters")
        if before_and_after is not None:
            names = ("before", "after")
            values["cost"] = {n: {"parameters": p} for n, p in zip(names, before_and_after, strict=True)}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s output, and what earlier versions wrote."""
        given = {name: values[name] for name in (item.name for item in fields(cls)) if name in values}
        if "cost" in values:
            given["parameters"] = tuple(values["cost"][name]["parameters"] for name in ("before", "after"))
        speeds = (Speed(**{k: v for k, v in each.items() if k != "ratio"}) for each in values.get("speed", ()))
        return cls(
            **given
            | {
                "stages": tuple(map(Stage.from_dict, values.get("stages", ()))),
                "layers": tuple(map(LayerChange.from_dict, values.get("layers", ()))),
                "speed": tuple(speeds),
                "samples": tuple(Sample(**each) for each in values.get("samples", ())),
            }
        )
