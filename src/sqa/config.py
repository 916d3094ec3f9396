"""Shapes of attention layers and models: frozen, keyword-only, validated before any tensor exists. No torch here."""

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import MISSING, dataclass, field
from typing import Literal

from sqa.errors import InputError, shown
from sqa.records import Checked, nearest

RopeKind = Literal["linear", "llama3", "yarn"]


def unknown(field: str, name: object, known: Collection[str]) -> InputError:
    """The error for a name that is not in `known`."""
    return InputError(
        f"{field}: {shown(repr(name))} is unknown{nearest(name, list(known))} ({field}s: {', '.join(known)})"
    )


MOST_LAYERS, LONGEST, LARGEST = 10_000, 2**40, 2**24
"""The most layers, tokens and anything else (rows, columns, heads, entries) that a config may ask for."""

_LIMITS = {"num_layers": MOST_LAYERS, "max_seq_len": LONGEST, "original_max_seq_len": LONGEST, "window": LONGEST}


def _check_count(where: str, name: str, value: object, least: int = 1) -> None:
    """Raise InputError unless it is a whole number from `least` to the limit of its name."""
    limit = _LIMITS.get(name, LARGEST)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive whole number" if least else "0 or more"
        raise InputError(f"{where}: {name} must be {wanted}, got {shown(repr(value))}")
    if value > limit:
        raise InputError(f"{where}: {name} must be at most {limit:,}, got {shown(repr(value))}")


@dataclass(frozen=True, kw_only=True)
class _Config(Checked):
    """What all configs share."""

    def _check_counts(self, *names: str, least: int = 1) -> None:
        for name in names:
            _check_count(self._where, name, getattr(self, name), least)

    def _check_above(self, bound: int, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) is not None and value <= bound:
                raise InputError(f"{self._where}: {name} must be above {bound}, got {value!r}")

    def unusual(self, known: Collection[str]) -> Iterator[str]:
        """Yield `field=value (field=default)` for each field that is not in `known` and does not have its default.

        Fields of inner configs count too. Code that supports only the fields in `known` refuses a config for which this
        yields anything: then it also refuses fields that are added later.
        """
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if item.name not in known and value != default:
                change = "" if default is MISSING else f" ({item.name}={default!r})"
                yield f"{item.name}={shown(repr(value))}{change}"
            for inner in dict.fromkeys(value) if isinstance(value, tuple) else (value,):
                if item.name in known and isinstance(inner, _Config):
                    yield from inner.unusual(known)


@dataclass(frozen=True, kw_only=True)
class RopeScaling(_Config):
    """How published models stretch rotary frequencies beyond the length they were trained at.

    `linear` divides every frequency by `factor`; `llama3` leaves short wavelengths alone (Llama 3.1 config);
    `yarn` interpolates by wavelength and scales the tables by `attention_factor` (arXiv 2309.00071).

    Raises InputError for a number out of its range, and without the length that llama3 and yarn need.
    """

    _where = "rope scaling"
    kind: RopeKind
    factor: float
    original_max_seq_len: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1:
            raise InputError(f"rope scaling: factor must be at least 1, got {self.factor!r}")
        self._check_above(0, "beta_fast", "beta_slow", "attention_factor")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                f"rope scaling llama3: low_freq_factor must be below high_freq_factor={self.high_freq_factor}, "
                f"got {self.low_freq_factor}"
            )
        if self.kind != "linear":
            self._check_counts("original_max_seq_len")


@dataclass(frozen=True, kw_only=True)
class Rope(_Config):
    """Rotary position embedding (arXiv 2104.09864) over the whole head.

    `interleaved` pairs dimension 2j with 2j+1; otherwise j pairs with j + head_dim/2, as in Llama.

    Raises InputError for a base that is not above 1.
    """

    _where = "rope"
    base: float = 10_000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_above(1, "base")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(_Config):
    """One attention layer.

    `num_heads` is the nominal count H that fixes `head_dim = d_model // num_heads`; the layer really has
    `num_query_heads` (default H) and `num_kv_heads` (default `num_query_heads`). Either count divides the other;
    query head i reads KV head `i // (num_query_heads // num_kv_heads)`. With fewer query than KV heads (reverse
    SQA) each query head serves several KV heads and the output has `num_kv_heads` heads.

    `window=W` lets query i see keys i-W+1..i; `num_sink_tokens` first tokens of a document stay visible to all.
    `scale` defaults to `head_dim ** -0.5`; `logit_softcap=c` replaces scores s by `c * tanh(s / c)`.

    Raises InputError, naming the field and both numbers, for a shape that cannot be built.
    """

    _where = "attention"
    d_model: int
    num_heads: int
    num_query_heads: int = None  # type: ignore[assignment]
    num_kv_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    causal: bool = True
    window: int | None = None
    num_sink_tokens: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    logit_softcap: float | None = None
    scale: float | None = None
    rope: Rope | None = field(default_factory=Rope)

    def __post_init__(self) -> None:
        def default(name: str, value: int) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        self._check_counts("d_model", "num_heads")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise InputError(
                f"attention: num_heads must divide d_model or head_dim be given, "
                f"got num_heads={self.num_heads} and d_model={self.d_model}"
            )
        default("head_dim", self.d_model // self.num_heads)
        default("num_query_heads", self.num_heads)
        default("num_kv_heads", self.num_query_heads)
        self._check_counts("num_query_heads", "num_kv_heads", "head_dim")
        if self.window is not None:
            self._check_counts("window")
        self._check_counts("num_sink_tokens", least=0)
        super().__post_init__()
        for name in ("num_query_heads", "num_kv_heads"):
            if (count := getattr(self, name)) > self.num_heads:
                raise InputError(f"attention: {name} must be at most num_heads={self.num_heads}, got {count}")
        more, fewer = sorted((self.num_query_heads, self.num_kv_heads), reverse=True)
        if more % fewer:
            heads, given = self.num_query_heads, self.num_kv_heads

            def fits(n: int) -> bool:
                return n % heads == 0 or heads % n == 0

            below, above = range(given, 0, -1), range(given, self.num_heads + 1)
            near = [str(n) for n in (next(filter(fits, below)), next(filter(fits, above), None)) if n is not None]
            raise InputError(
                f"attention: num_kv_heads must divide num_query_heads={heads} or be a multiple of it, "
                f"got num_kv_heads={given}; {' or '.join(near)} would fit"
            )
        if self.rope is not None and self.head_dim % 2:
            raise InputError(f"attention: head_dim must be even for rotary positions, got head_dim={self.head_dim}")
        if self.window is not None and not self.causal:
            raise InputError(f"attention: window needs causal=True, got window={self.window} and causal=False")
        if self.num_sink_tokens and self.window is None:
            raise InputError(f"attention: num_sink_tokens needs a window, got num_sink_tokens={self.num_sink_tokens}")
        self._check_above(0, "logit_softcap", "scale")

    @property
    def num_output_heads(self) -> int:
        """Heads of the attention output, for which scores are computed: max(num_query_heads, num_kv_heads)."""
        return max(self.num_query_heads, self.num_kv_heads)

    @property
    def query_width(self) -> int:
        """Columns of the query projection."""
        return self.num_query_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def output_width(self) -> int:
        """Columns of the attention output, which the output projection reads."""
        return self.num_output_heads * self.head_dim

    def visible_pairs(self, n: int) -> int:
        """(query, key) pairs that one head scores over `n` tokens: those that the layer's mask leaves visible."""
        if not self.causal:
            return n * n
        if self.window is None or self.window >= n:
            return n * (n + 1) // 2
        w, s = self.window, self.num_sink_tokens
        pairs = w * (w + 1) // 2 + (n - w) * w
        # query i sees sink j < s outside its window when j <= i - w: sum of min(s, i - w + 1) over i = w..n-1
        far = n - w
        return pairs + (far * (far + 1) // 2 if far <= s else s * (s + 1) // 2 + (far - s) * s)


def window_pattern(
    attention: AttentionConfig, *, num_layers: int, window: int, full_every: int = 4, num_sink_tokens: int = 0
) -> tuple[AttentionConfig, ...]:
    """One config for each layer: every `full_every`-th layer has no window, the others have it.

    Raises InputError as AttentionConfig does, and for counts below 1.
    """
    if not isinstance(attention, AttentionConfig):
        raise InputError(f"window pattern: attention must be an AttentionConfig, got {shown(repr(attention))}")
    for name, value in (("num_layers", num_layers), ("window", window), ("full_every", full_every)):
        _check_count("window pattern", name, value)
    windowed = attention.replace(window=window, num_sink_tokens=num_sink_tokens)
    full = attention.replace(window=None, num_sink_tokens=0)
    return tuple(full if (i + 1) % full_every == 0 else windowed for i in range(num_layers))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Config):
    """A Transformer: pre-norm blocks of attention and SwiGLU, a decoder (`causal`) or an encoder.

    `attention` is one AttentionConfig for all layers, or a sequence of one per layer; a sequence of equal configs
    becomes one. `bias` adds a bias to the attention output projection, the feed-forward projections and the output
    head. `final_norm=False` leaves out the last RMSNorm. The published shape has biases and no final norm (10,655,504
    parameters for SQA).

    Raises InputError, naming the field, for a shape that cannot be built.
    """

    _where = "model"
    vocab_size: int
    num_layers: int
    d_ff: int
    max_seq_len: int
    attention: AttentionConfig | tuple[AttentionConfig, ...]
    bias: bool = False
    final_norm: bool = True
    tie_embeddings: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        self._check_counts("vocab_size", "num_layers", "d_ff", "max_seq_len")
        super().__post_init__()
        self._check_above(0, "norm_eps")
        if isinstance(self.attention, tuple):
            if len(self.layers) != self.num_layers:
                raise InputError(
                    f"model: attention must have one config per layer, "
                    f"got {len(self.layers)} for num_layers={self.num_layers}"
                )
            for name in ("d_model", "causal"):
                if len(values := sorted({getattr(layer, name) for layer in self.layers})) > 1:
                    raise InputError(
                        f"model: every layer must have the same {name}, got {' and '.join(map(str, values))}"
                    )
            if len(set(self.layers)) == 1:
                object.__setattr__(self, "attention", self.layers[0])

    @property
    def layers(self) -> tuple[AttentionConfig, ...]:
        """The attention config of each layer."""
        if isinstance(self.attention, AttentionConfig):
            return (self.attention,) * self.num_layers
        return self.attention

    @property
    def head_counts(self) -> set[tuple[int, int]]:
        """The pairs of query and KV heads that the layers have: several where layers differ in their heads."""
        return {(layer.num_query_heads, layer.num_kv_heads) for layer in self.layers}

    @property
    def d_model(self) -> int:
        """Width of the residual stream, the same in every layer."""
        return self.layers[0].d_model

    @property
    def causal(self) -> bool:
        """Whether the model is a decoder; False for an encoder."""
        return self.layers[0].causal
