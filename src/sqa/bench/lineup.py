"""The models that take part in a benchmark, and what times them in turns."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import nn

from sqa.attention.call import Call
from sqa.attention.kernels import resolve
from sqa.bench.measurement import Contestant, Measurement, choose_baseline, time_all, with_ratios
from sqa.bench.peers import OURS, Entrant, Unavailable, build, difference, ours
from sqa.config import ModelConfig
from sqa.dtypes import find_dtype
from sqa.errors import InputError
from sqa.interop import load_config, load_model
from sqa.losses import IGNORE
from sqa.measure.timing import TimeLimit
from sqa.model import Transformer
from sqa.records import at_least_one
from sqa.variants import MEASURED_VARIANTS, find_variant
from sqa.variants import preset as model_preset

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models to measure: a config for each variant, and its source; without a source it has initial weights."""

    name: str
    configs: Mapping[str, ModelConfig]
    sources: Mapping[str, str | Path] = field(default_factory=dict)

    @classmethod
    def of_preset(cls, preset: str, variants: Sequence[str] = MEASURED_VARIANTS) -> Self:
        """A named shape in each variant. Raises InputError for an unknown name, or no variant."""
        at_least_one("benchmark", variants=len(variants))
        return cls(name=preset, configs={find_variant(name)[0]: model_preset(preset, name) for name in variants})

    @classmethod
    def of_sources(cls, *sources: str | Path) -> Self:
        """Models that `sqa.load_model` reads. The file name of each stands for a variant.

        Raises InputError for anything else, and for two with the same name.
        """
        named = {Path(source).absolute().name.removesuffix(".gguf"): source for source in sources}
        if len(named) < len(sources):
            raise InputError(f"models: two of {', '.join(map(str, sources))} have one name; rename a directory")
        return cls(name=next(iter(named)), configs={n: load_config(s) for n, s in named.items()}, sources=named)

    @property
    def vocab_size(self) -> int:
        """The number of token ids that all models know."""
        return min(config.vocab_size for config in self.configs.values())

    def fitted(self, length: int, peers: Sequence[str]) -> Self:
        """A copy for sequences of `length`. With peers a preset gets the shape they have: no biases, a final norm."""
        changes = {"bias": False, "final_norm": True} if peers and not self.sources else {}
        configs = {
            name: config.replace(max_seq_len=max(config.max_seq_len, length), **changes)
            for name, config in self.configs.items()
        }
        return replace(self, configs=configs)

    def build(self, variant: str) -> Transformer:
        """The model of a variant, in fp32."""
        model = Transformer(self.configs[variant])
        if variant in self.sources:
            model.load_state_dict(load_model(self.sources[variant]).float().state_dict())
        return model


class Runner(NamedTuple):
    """An entrant ready to run: `module` is called, compiled or not, as `setting` says."""

    implementation: str
    variant: str
    setting: str
    entrant: Entrant
    module: nn.Module


class LineUp(NamedTuple):
    """All that take part, and the reason why a (peer, variant) does not."""

    runners: list[Runner]
    absent: dict[tuple[str, str], str]


def compiled(name: str, module: nn.Module) -> nn.Module:
    """Compile our model in its own way, in place; a peer by torch.compile."""
    if name == OURS:
        module.compile()
        return module
    wrapped: nn.Module = torch.compile(module)  # type: ignore[assignment]
    return wrapped


def line_up(models: Models, peers: Sequence[str], *, compile: bool, device: torch.device) -> LineUp:
    """Our model of each variant and its peers, in fp32.

    Peers get our weights, if they can, and must then compute the same. Each peer in PyTorch takes part eager and, with
    `compile`, also compiled; both share one module. Ours takes part once, compiled or eager.
    """
    found = LineUp([], {})
    for variant, config in models.configs.items():
        input_ids, labels = torch.randint(config.vocab_size, (2, 2, min(config.max_seq_len, 128)), device=device)
        labels[:, ::4] = IGNORE
        model = models.build(variant).to(device)
        own = ours(model)
        setting = "compiled" if compile else "eager"
        module = compiled(OURS, model) if compile else model
        found.runners.append(Runner(OURS, variant, setting, own, module))
        for name in peers:
            logger.info("building %s %s and comparing it with ours", name, variant)
            try:
                entrants = build(name, model)
                for entrant in entrants.values():
                    entrant.module.to(device)
                    if entrant.same_function and (problem := difference(own, entrant, input_ids, labels)):
                        raise Unavailable(problem)
            except Unavailable as reason:
                found.absent[name, variant] = str(reason)
                continue
            found.runners.extend(Runner(name, variant, s, e, e.module) for s, e in entrants.items())
            if compile and "eager" in entrants:
                eager = entrants["eager"]
                found.runners.append(Runner(name, variant, "compiled", eager, compiled(name, eager.module)))
    return found


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all contestants of a table do: a step or prefill (`kind`) of `batch_size` rows of `n` tokens, or decode.

    A turn of decode makes `new_tokens` in each row, after `n` cached ones.
    """

    kind: str
    preset: str
    dtype: str
    batch_size: int
    n: int
    new_tokens: int | None = None
    device: torch.device

    def measurement(self, implementation: str, variant: str, config: ModelConfig) -> Measurement:
        """All that is known of a contestant before timing."""
        layer = config.layers[0]
        call = Call.of_layer(
            layer,
            length=self.n,
            num_queries=None if self.new_tokens is None else 1,
            device=self.device,
            dtype=find_dtype(self.dtype),
            grad=self.kind == "step",
        )
        kernel = {OURS: resolve(call).kernel, "llama-cpp": "llama.cpp"}.get(implementation, "sdpa")
        return Measurement(
            kind=self.kind,
            preset=self.preset,
            implementation=implementation,
            variant=variant,
            num_query_heads=layer.num_query_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            batch_size=self.batch_size,
            n=self.n,
            dtype=self.dtype,
            kernel=kernel,
        )


def measure(
    lineup: LineUp,
    task: Task,
    work: Callable[[Runner], Callable[[], None]],
    configs: Mapping[str, ModelConfig],
    *,
    rounds: int,
    limit: TimeLimit,
) -> list[Measurement]:
    """Time the `work` of all runners in turns. Each implementation of a variant gets a measurement: its best setting's.

    `checked` says of a peer whether it was shown to compute what ours does. What is absent or cannot run has a note.
    The order is that of `configs`, ours before its peers.
    """

    def contestants() -> Iterator[Contestant]:
        for (implementation, variant), reason in lineup.absent.items():
            yield replace(task.measurement(implementation, variant, configs[variant]), note=reason), None
        for runner in lineup.runners:
            logger.info("warming %s (by %s, %s)", runner.variant, runner.implementation, runner.setting)
            measurement = task.measurement(runner.implementation, runner.variant, configs[runner.variant])
            checked = None if runner.implementation == OURS else runner.entrant.same_function
            yield replace(measurement, setting=runner.setting, checked=checked), partial(work, runner)

    # time_all runs each once to see that it works: warm enough for a forward pass, but a second step still allocates
    warmup = 1 if task.kind == "step" else 0
    timed = time_all(contestants(), rounds=rounds, warmup=warmup, device=task.device, limit=limit)
    tokens = task.batch_size * (task.new_tokens or task.n)
    timed = [m if m.seconds is None else replace(m, tokens_per_s=tokens / m.median) for m in timed]
    best = with_ratios(best_settings(timed), same=lambda m: m.implementation, baseline=choose_baseline(configs))
    order = list(configs)
    return sorted(beside_peers(best), key=lambda m: (order.index(m.variant), m.implementation != OURS))


def best_settings(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurement with the lowest median of each implementation and variant, with all medians as `tried`."""
    rivals: dict[tuple[str | None, str], list[Measurement]] = {}
    for m in measurements:
        rivals.setdefault((m.implementation, m.variant), []).append(m)
    best = []
    for same in rivals.values():
        tried = {m.setting or "": m.median for m in same if m.seconds is not None}
        fastest = min(same, key=lambda m: math.inf if m.seconds is None else m.median)
        best.append(replace(fastest, tried=tried) if tried else fastest)
    return best


def beside_peers(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Set, in our measurements, the ratios to the fastest peer of the variant and to that with the least memory."""

    def compared(m: Measurement) -> Measurement:
        if m.implementation != OURS:
            return m
        rivals = [r for r in measurements if r.variant == m.variant and r.implementation != OURS]
        times = [r.median for r in rivals if r.seconds is not None]
        peaks = [r.peak_bytes for r in rivals if r.peak_bytes is not None]
        if m.seconds is not None and times:
            m = replace(m, ratio_to_peer=min(times) / m.median)
        return replace(m, memory_to_peer=m.peak_bytes / min(peaks)) if m.peak_bytes is not None and peaks else m

    return [compared(m) for m in measurements]
