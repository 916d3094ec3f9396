"""The plan of a comparison: what to train, on what, for how long. Read from TOML and checked before anything runs."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

from sqa.config import ModelConfig
from sqa.cost import train_step_flops
from sqa.errors import InputError, shown
from sqa.records import Checked, nearest, read_value
from sqa.variants import DEFAULT_VARIANTS, VARIANTS, find_variant, model_config, shape

Cell = tuple[str, int]
"""One run of a comparison: the name of a variant, or of a shape of the plan's own, and a seed."""


def cell_name(cell: Cell) -> str:
    """`sqa seed 0`: a run's name in messages."""
    return f"{cell[0]} seed {cell[1]}"


BUDGETS = {"steps": 1e10, "tokens": 1e16, "epochs": 1e6, "flops": 1e30, "time": 1e9}
"""The kinds of budgets and the largest of each, far above what a machine can do."""

_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """How long a run trains: the amount of one kind, the same for every variant."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """`steps=1000`, `tokens=5M`, `epochs=1`, `flops=1e15` or `time=20m`. Raises InputError for anything else."""
        kind, _, amount = text.partition("=")
        if kind not in BUDGETS:
            raise InputError(
                f"budget: must be one of {', '.join(k + '=...' for k in BUDGETS)}, got {shown(repr(text))}"
            )
        units = _SECONDS if kind == "time" else _UNITS
        found = re.fullmatch(r"([0-9]+(?:_[0-9]+)*\.?[0-9]*(?:e[0-9]+)?)([a-zA-Z]?)", amount.strip())
        if found is None or found[2] not in units or not float(found[1]) > 0:
            known = ", ".join(filter(None, units))
            raise InputError(
                f"budget: {kind} needs a number above 0 with unit none or {known}, got {shown(repr(amount))}"
            )
        if (count := float(found[1]) * units[found[2]]) > BUDGETS[kind]:
            raise InputError(f"budget: {kind} must be at most {BUDGETS[kind]:.0e}, got {shown(repr(amount))}")
        return cls(kind, count)


@dataclass(frozen=True, kw_only=True)
class Plan(Checked):
    """Every field of a comparison; a TOML file gives some, the command line may override single ones.

    `shape` names a model shape, and `model` replaces fields of it; `shapes` has a table of further changes for single
    variants. A table under another name is a shape of the plan's own, which `variants` may list too: it has a
    `variant`, or `num_query_heads` and `num_kv_heads` (and `head_dim`), and perhaps a `label` for tables and figures.
    `context`: tokens of a row. `batch_size`: rows of a step, in all processes together, of which `micro_batch_size` at
    a time (0: all) go through the model on each. `budget`: see Budget.parse. `learning_rates` has a rate for single
    variants; attention's output projections learn at `output_projection_rate` times the rate. `padding_in_loss` trains
    on padding too, as the published experiment did (padded layout only). `evaluation_tokens`: runs are evaluated on the
    first validation documents that hold so many real tokens. `probes`: how often a run is probed
    (`sqa.training.probes`). `dtype` bfloat16 means autocast. `activation_checkpointing` computes each block again for
    its gradient: less memory, slower. `sharding` "full" gives each process a part of the model (FSDP2), "none" a copy
    (DDP). `threads` 0 keeps PyTorch's number. `timing_rounds` 0 skips the phase that times all variants in turns.

    Raises InputError, naming the field, for anything that cannot be run.
    """

    _where = "plan"
    name: str
    data: str = "builtin"
    variants: tuple[str, ...] = DEFAULT_VARIANTS
    seeds: tuple[int, ...] = (0,)
    shape: str = "demo"
    model: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, dict[str, Any]] = field(default_factory=dict)
    layout: Literal["packed", "padded"] = "packed"
    padding_in_loss: bool = False
    train_fraction: float = 0.95
    validation_fraction: float = 0.05
    context: int = 512
    batch_size: int = 8
    micro_batch_size: int = 0
    budget: str = "epochs=1"
    learning_rate: float = 5e-4
    learning_rates: dict[str, float] = field(default_factory=dict)
    output_projection_rate: float = 1.0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    clip_norm: float = 0.0
    evaluation_tokens: int = 100_000
    probes: int = 0
    timing_rounds: int = 9
    checkpoint_seconds: float = 300.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    sharding: Literal["none", "full"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, (least, most) in _LIMITS.items():
            if (value := getattr(self, name)) < least:
                raise InputError(f"plan: {name} must be at least {least}, got {value}")
            if value > most:
                raise InputError(f"plan: {name} must be at most {most}, got {value}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise InputError(f"plan: name must be letters, digits, '.', '_' and '-', got {shown(self.name)}")
        self._check_names()
        for name in ("variants", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(
                    f"plan: {name} must be one or more, none of them twice, got {shown(repr(list(values)))}"
                )
        labels = [self.label(name) for name in self.variants]
        if len(set(labels)) < len(labels):
            raise InputError(f"plan: labels must differ, or figures would join their lines, got {shown(repr(labels))}")
        if any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise InputError(f"plan: seeds must be 0 or more and below 2**63, got {shown(repr(list(self.seeds)))}")
        if self.padding_in_loss and self.layout != "padded":
            raise InputError(f"plan: padding_in_loss needs layout 'padded', got {self.layout!r}")
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise InputError(
                f"plan: micro_batch_size must divide batch_size={self.batch_size}, got {self.micro_batch_size}"
            )
        own_rates = {f"learning_rates.{name}": rate for name, rate in self.learning_rates.items()}
        for name, rate in {"learning_rate": self.learning_rate, **own_rates}.items():
            if not rate > 0:
                raise InputError(f"plan: {name} must be above 0, got {rate}")
        if not self.warmup_fraction < 1:
            raise InputError(f"plan: warmup_fraction must be from 0 to below 1, got {self.warmup_fraction}")
        if self.budget_kind == "time" and not self.timing_rounds:
            raise InputError("plan: a time budget needs timing_rounds of at least 1, got 0")
        if self.probes and self.context < 4:  # the second half of a repeated sequence needs two tokens
            raise InputError(f"plan: probes need a context of at least 4, got {self.context}")
        for config in map(self.model_config, self.variants):
            if not config.causal:
                raise InputError("plan: causal must be true, or a model trained on the next token would see it")
            if self.context > (longest := config.max_seq_len):
                raise InputError(f"plan: context must be at most the model's max_seq_len={longest}, got {self.context}")

    def _check_names(self) -> None:
        """Check that all names are those of variants, or of complete shapes of the plan's own."""
        for name, given in self.shapes.items():
            own = sorted(given.keys() & {"variant", "num_query_heads", "head_dim"})
            if name in VARIANTS and own:
                raise InputError(f"plan: shapes.{name} is a variant and has no {own[0]}; give the shape another name")
            if name not in VARIANTS and ("variant" in given) == ("num_query_heads" in given):
                raise InputError(
                    f"plan: shapes.{name} must have either a variant or num_query_heads (and num_kv_heads), "
                    f"or be named after a variant{nearest(name, list(VARIANTS))}"
                )
            if "variant" in given:
                find_variant(read_value(str, given["variant"], f"plan: shapes.{name}.variant"))
            if "vocab_size" in given:
                raise InputError(f"plan: shapes cannot give {name} a vocab_size, variants share the tokens; use model")
            label = read_value(str, given.get("label", name), f"plan: shapes.{name}.label")
            if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,39}", name) or not 0 < len(label) <= 40:
                raise InputError(
                    f"plan: a shape must be named by at most 40 of a-z, 0-9, '.', '_', '-', and its label be as short, "
                    f"got {shown(name)}"
                )
        names = tuple(name if name in self.shapes else find_variant(name)[0] for name in self.variants)
        object.__setattr__(self, "variants", names)
        for table in ("shapes", "learning_rates"):
            if unused := [name for name in getattr(self, table) if name not in names]:
                raise InputError(f"plan: {table} must be of the variants {list(names)}, got {shown(repr(unused[0]))}")

    @property
    def budget_kind(self) -> str:
        """A key of BUDGETS."""
        return Budget.parse(self.budget).kind

    def base(self, name: str) -> str | None:
        """The variant that gives `name` its head counts; None if its shape gives them."""
        given = self.shapes.get(name, {})
        return None if "num_query_heads" in given else given.get("variant", name).lower()

    def label(self, name: str) -> str:
        """Its name in tables and figures."""
        known = VARIANTS[name].label if name in VARIANTS else name
        return str(self.shapes.get(name, {}).get("label", known))

    def model_config(self, name: str) -> ModelConfig:
        """The model of a variant, or of a shape of the plan's own. Raises InputError for what does not fit."""
        own = {key: value for key, value in self.shapes.get(name, {}).items() if key not in ("variant", "label")}
        fields = shape(self.shape)
        fields["max_seq_len"] = max(fields["max_seq_len"], self.context)
        fields |= self.model
        if base := self.base(name):
            return model_config(base, **fields | own)
        heads = {key: own.pop(key) for key in ("num_query_heads", "num_kv_heads", "head_dim") if key in own}
        config = model_config("mha", **fields | own)
        return config.replace(attention=config.layers[0].replace(**{"num_kv_heads": heads["num_query_heads"], **heads}))

    def rate(self, name: str) -> float:
        """The highest learning rate of a variant."""
        return self.learning_rates.get(name, self.learning_rate)

    @property
    def cells(self) -> list[Cell]:
        """All runs, seeds outermost."""
        return [(name, seed) for seed in self.seeds for name in self.variants]

    def find_cells(self, names: Sequence[str]) -> list[Cell]:
        """The runs with these names, `variant:seed`, in the plan's order.

        Raises InputError for no name, and for a name that is not in the plan.
        """
        if not names:
            raise InputError("only: must name one run or more, such as sqa:0")
        known = {f"{name}:{seed}": (name, seed) for name, seed in self.cells}
        for name in names:
            if name.lower() not in known:
                have = f"variants {', '.join(self.variants)}; seeds {', '.join(map(str, self.seeds))}"
                raise InputError(f"only: {name!r} is not a run of the plan ({have}){nearest(name, list(known))}")
        return [cell for name, cell in known.items() if name in {given.lower() for given in names}]

    def steps(self, *, batches_per_epoch: int, step_seconds: Mapping[str, float]) -> dict[str, int]:
        """Training steps of each variant under the budget; `step_seconds` is measured, for a time budget.

        Raises InputError for a budget of less than one step.
        """
        budget = Budget.parse(self.budget)
        counts = {}
        for name in self.variants:
            match budget.kind:
                case "steps":
                    count = budget.amount
                case "tokens":
                    count = budget.amount / (self.batch_size * self.context)  # padding included
                case "epochs":
                    count = budget.amount * batches_per_epoch
                case "flops":
                    count = budget.amount / train_step_flops(self.model_config(name), self.context, self.batch_size)
                case _:
                    count = budget.amount / step_seconds[name]
            counts[name] = round(count)
            if counts[name] < 1:
                raise InputError(f"plan: budget {self.budget} is less than one step of {name}")
        return counts

    @classmethod
    def read(cls, source: str, changes: Mapping[str, Any] | None = None) -> Self:
        """The package's plan of that name, or the plan in a TOML file, named after the file unless it has a name.

        `changes` replace fields before anything is checked. Shapes and rates of variants that they drop are dropped.
        """
        ours = shipped_plans()
        if source in ours:
            raw, stem = (files("sqa.experiments") / "plans" / f"{source}.toml").read_bytes(), source
        elif Path(source).is_file():
            raw, stem = Path(source).read_bytes(), Path(source).stem
        else:
            known = f"the package ({', '.join(ours)}){nearest(source, ours)}"
            raise InputError(f"plan: {source!r} is neither a file nor a plan of {known}")
        try:
            values = tomllib.loads(raw.decode())
        except (ValueError, RecursionError) as error:  # of either encoding, syntax or a number of 5,000 digits
            raise InputError(f"plan: {source} is not TOML: {error}") from None
        if not values:  # more likely a file that was cut short than a wish for all defaults
            raise InputError(f'plan: {source} is empty; give at least one field, such as budget = "tokens=1M"')
        changes = changes or {}
        if "variants" in changes and isinstance(replaced := values.get("variants", DEFAULT_VARIANTS), list | tuple):
            dropped = {str(name).lower() for name in replaced} - {str(name).lower() for name in changes["variants"]}
            for table in ("shapes", "learning_rates"):
                if isinstance(values.get(table), dict):
                    values[table] = {name: value for name, value in values[table].items() if name not in dropped}
        return cls.from_dict({"name": stem, **values, **changes})

    @classmethod
    def read_single(cls, source: str, variant: str, seed: int, changes: Mapping[str, Any]) -> Self:
        """As `read`, for one run alone, without the timing phase unless a budget in time needs it."""
        plan = cls.read(source, {**changes, "variants": (variant,), "seeds": (seed,)})
        return plan if plan.budget_kind == "time" else plan.replace(timing_rounds=0)


_LIMITS: dict[str, tuple[float, float]] = {
    "context": (2, 2**31), "batch_size": (1, 2**31), "micro_batch_size": (0, 2**31), "evaluation_tokens": (1, 10**15),
    "warmup_fraction": (0, 1), "output_projection_rate": (0, 1e9), "weight_decay": (0, 1e9),
    "clip_norm": (0, 1e30), "probes": (0, 1000),
    "timing_rounds": (0, 10_000), "checkpoint_seconds": (0, 1e9), "threads": (0, 1024),
}  # fmt: skip
"""The smallest and the largest value of a field; the largest is far above what a machine can do."""


def shipped_plans() -> list[str]:
    """The plans that ship with the package."""
    folder = files("sqa.experiments") / "plans"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))
