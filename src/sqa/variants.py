"""The variants, one row each, and the named model shapes. A variant is a rule for head counts, never a class."""

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from sqa.config import AttentionConfig, ModelConfig, unknown
from sqa.errors import InputError
from sqa.records import reject_unknown


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A rule from the nominal head count H to (num_query_heads, num_kv_heads, head_dim).

    `query` and `kv` are fractions of H; `kv=None` means one KV head. Where `kv_free`, the caller may choose
    another number of KV heads. `head_dim_factor` multiplies the nominal `d_model // H`.
    """

    label: str
    query: Fraction
    kv: Fraction | None
    kv_free: bool = False
    head_dim_factor: int = 1


_WHOLE, _HALF, _QUARTER = Fraction(1), Fraction(1, 2), Fraction(1, 4)

VARIANTS: dict[str, Variant] = {
    "mha": Variant(label="MHA", query=_WHOLE, kv=_WHOLE),
    "gqa": Variant(label="GQA", query=_WHOLE, kv=_QUARTER, kv_free=True),
    "mqa": Variant(label="MQA", query=_WHOLE, kv=None),
    "sqa": Variant(label="SQA", query=_HALF, kv=_QUARTER, kv_free=True),
    "ssqa": Variant(label="sSQA", query=_HALF, kv=_HALF),  # symmetric
    "xsqa": Variant(label="xSQA", query=_QUARTER, kv=_QUARTER),  # extreme
    "xsmqa": Variant(label="xSMQA", query=_QUARTER, kv=None),
    "lsqa": Variant(label="lSQA", query=Fraction(3, 4), kv=_QUARTER, kv_free=True),  # light
    "rsqa": Variant(label="rSQA", query=_QUARTER, kv=_HALF),  # reverse
    # half the heads, twice as wide: the parameters and FLOPs of MHA and GQA, half the exponentials
    "wide-mha": Variant(label="wide MHA", query=_HALF, kv=_HALF, head_dim_factor=2),
    "wide-gqa": Variant(label="wide GQA", query=_HALF, kv=Fraction(1, 8), kv_free=True, head_dim_factor=2),
}
"""The rule of every variant, by its key."""

PUBLISHED_VARIANTS = ("mha", "gqa", "mqa", "sqa", "ssqa", "xsqa", "xsmqa")
"""The seven rows of the published experiment, in its order."""

DEFAULT_VARIANTS = (*PUBLISHED_VARIANTS, "wide-gqa")
"""The variants that a comparison trains by default: the published seven and the equal-cost baseline."""

BASELINE = "gqa"
"""The variant that others are compared with in loss, time and cost."""

MEASURED_VARIANTS = ("gqa", "sqa", "ssqa", "xsqa", "wide-gqa")
"""The variants that benchmarks time by default, with the equal-cost baseline."""

_SHAPES: dict[str, dict[str, Any]] = {
    # arXiv 2510.01817; eps is PyTorch's RMSNorm default for fp32
    "published": {
        "vocab_size": 10_000, "num_layers": 8, "d_ff": 768, "max_seq_len": 1024, "d_model": 256, "num_heads": 16,
        "bias": True, "final_norm": False, "norm_eps": 2.0**-23,
    },
    "demo": {
        "vocab_size": 512, "num_layers": 3, "d_ff": 384, "max_seq_len": 512, "d_model": 128, "num_heads": 8,
    },
    "larger": {
        "vocab_size": 32_000, "num_layers": 12, "d_ff": 2048, "max_seq_len": 2048, "d_model": 768, "num_heads": 12,
    },
    # heads of 128, as in Llama 2
    "1.3b": {
        "vocab_size": 32_000, "num_layers": 24, "d_ff": 5504, "max_seq_len": 4096, "d_model": 2048, "num_heads": 16,
    },
    # the sizes of Llama 3 8B, when the variant is gqa
    "8b": {
        "vocab_size": 128_256, "num_layers": 32, "d_ff": 14_336, "max_seq_len": 8192, "d_model": 4096, "num_heads": 32,
    },
}  # fmt: skip

PRESETS = tuple(_SHAPES)

# without the two that the variant decides
_LAYER_FIELDS = [f.name for f in fields(AttentionConfig) if f.name not in ("num_query_heads", "head_dim")]


def find_variant(name: str) -> tuple[str, Variant]:
    """The key and row of a variant, whatever its case. Raises InputError with the nearest name."""
    if not isinstance(name, str) or (key := name.lower()) not in VARIANTS:
        raise unknown("variant", name, VARIANTS)
    return key, VARIANTS[key]


def _heads(key: str, what: str, fraction: Fraction, num_heads: int) -> int:
    count = fraction * num_heads
    if count.denominator != 1:
        step = fraction.denominator
        below, above = num_heads // step * step, -(-num_heads // step) * step
        fits = f"{below} or {above}" if below else str(above)
        raise InputError(
            f"variant {key}: {what} is {fraction} of num_heads, which needs a multiple of {step}; "
            f"got num_heads={num_heads}, {fits} would fit; "
            "sqa.fewer_query_heads(config) finds counts for an existing shape"
        )
    return int(count)


def variant(
    name: str, *, d_model: int, num_heads: int, num_kv_heads: int | None = None, **options: Any
) -> AttentionConfig:
    """The AttentionConfig of a named variant: `variant("sqa", d_model=256, num_heads=16)` has 8 query, 4 KV heads.

    `num_kv_heads` overrides the rule's number where the rule leaves it free (gqa, sqa, lsqa, wide-gqa); `options`
    are AttentionConfig's other fields. Raises InputError for an unknown name, a fixed count that is overridden,
    or a `num_heads` the rule does not fit, naming those that would.
    """
    key, row = find_variant(name)
    reject_unknown(options, _LAYER_FIELDS, f"variant {key}")
    nominal = AttentionConfig(d_model=d_model, num_heads=num_heads, rope=None)  # checks both numbers first
    num_query_heads = _heads(key, "num_query_heads", row.query, num_heads)
    if num_kv_heads is None or not row.kv_free:
        fixed = 1 if row.kv is None else _heads(key, "num_kv_heads", row.kv, num_heads)
        if num_kv_heads not in (None, fixed):
            raise InputError(
                f"variant {key}: num_kv_heads is {fixed} for num_heads={num_heads}, got {num_kv_heads}; "
                "build an AttentionConfig for other counts"
            )
        num_kv_heads = fixed
    return AttentionConfig(
        d_model=d_model,
        num_heads=num_heads,
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        head_dim=nominal.head_dim * row.head_dim_factor,
        **options,
    )


def preset(name: str, variant_name: str, **changes: Any) -> ModelConfig:
    """A named shape with a variant's head counts. `changes` replace the shape's fields, attention's included."""
    return model_config(variant_name, **{**shape(name), **changes})


def shape(name: str) -> dict[str, Any]:
    """The fields of a named shape, for `model_config`."""
    if not isinstance(name, str) or name not in _SHAPES:
        raise unknown("preset", name, PRESETS)
    return dict(_SHAPES[name])


def model_config(variant_name: str, **shape_fields: Any) -> ModelConfig:
    """A ModelConfig of a variant from a flat set of fields, those of ModelConfig and of AttentionConfig."""
    own = [f.name for f in fields(ModelConfig) if f.name != "attention"]
    reject_unknown(shape_fields, own + _LAYER_FIELDS, "model")
    attention = variant(variant_name, **{k: v for k, v in shape_fields.items() if k in _LAYER_FIELDS})
    return ModelConfig(attention=attention, **{k: v for k, v in shape_fields.items() if k in own})
