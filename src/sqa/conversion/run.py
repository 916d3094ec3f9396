"""A conversion from start to end: choose, cut and refit heads, heal the model, measure every stage."""

import copy
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqa import storage
from sqa.conversion import allocation
from sqa.conversion.healing import Distillation, Healing, Layerwise, OwnLoss, heal
from sqa.conversion.operation import operate
from sqa.conversion.records import Conversion, Quality, Sample, Speed, Stage
from sqa.conversion.settings import Job, Settings, prepare, subject_class
from sqa.conversion.subject import Subject
from sqa.dtypes import find_dtype
from sqa.errors import InputError
from sqa.files import LOCK, locked, write_json
from sqa.measure.machine import cpu_threads, git_revision, machine, slow_dtype, versions
from sqa.measure.timing import TimeLimit, take_turns
from sqa.progress import Display, Interrupted, StepReport, StopFlag
from sqa.records import differences, read_json
from sqa.training.loop import Hooks

MEASUREMENTS = 4  # the most in a phase of healing; they take about a tenth of its time
GO_ON = "stopped; the same command goes on from what is done"
SAMPLES, SAMPLE_TOKENS = 3, 32  # of each prompt, and of its continuation
TIMING_SECONDS = 600.0  # after this time no further round of timings begins


def convert(
    source: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    calibration: str,
    evaluate: str | None = "builtin",
    display: Display | None = None,
    stop: StopFlag | None = None,
) -> Conversion:
    """Give a pretrained model fewer query heads and write it to `out`, with conversion.json in it; returns its content.

    source: a directory of transformers (Llama, Mistral, Qwen2, Qwen3, BERT) or of ours, a .gguf file, or a name on the
    Hub. `out` must not exist. It appears whole, as a directory of ours if `source` is one, else of transformers; what
    no stock class holds, such as layers that differ in their heads, needs trust_remote_code. calibration, evaluate:
    "builtin", "wikipedia" or the path of a file or folder of text; the model is fitted and healed on the train split of
    the first, and measured on its validation split and on that of the second (None: on the first alone).

    A signal that `stop` (progress.stop_flag) got stops it at once; the same call then continues the conversion.

    Raises InputError, before anything is computed where that can be, for what cannot be converted, for too little text
    and for weights or losses that are not finite; also when another process, or an unfinished conversion with other
    settings, is in the way. Raises Interrupted when stopped, and NonFiniteLoss when healing diverges.
    """
    job = prepare(source, Path(out), settings, calibration=calibration, evaluate=evaluate)
    return run(job, display or Display(), stop or StopFlag())


def run(job: Job, display: Display, stop: StopFlag) -> Conversion:
    """Run or continue a conversion that `prepare` has checked. See `convert`."""
    job.out.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(job.work.with_name(f"{LOCK}-{job.out.name}"))
    with lock, stop.at_once(GO_ON), cpu_threads(job.settings.threads):
        return _Run(job, display, stop).finish()


@dataclass(frozen=True, kw_only=True)
class _Text:
    """All batches of a conversion; `elsewhere` is from the second domain."""

    fit: Sequence[Any]
    held_out: Sequence[Any]
    healing: Sequence[Any]
    evaluation: Sequence[Any]
    elsewhere: Sequence[Any]


class _Run:
    """One process's work on a conversion. `state` is always what state.json holds."""

    def __init__(self, job: Job, display: Display, stop: StopFlag) -> None:
        self.job, self.display, self.stop = job, display, stop
        self.settings, self.kind = job.settings, subject_class(job.source)
        self.start = time.perf_counter()
        self.state_path = job.work / "state.json"
        self.state = self._begin()

    def finish(self) -> Conversion:
        job, settings = self.job, self.settings
        if (slow := slow_dtype(settings.dtype, settings.device)) is not None:
            self.display.note(slow)
        self.display.note(f"reading the model {job.source}")
        self.original = self._load(job.source)
        self.original.check_finite(job.source)
        self.text = self._read()
        self.domains = {"the validation text": self.text.evaluation}
        if job.second:
            self.domains["the second domain"] = self.text.elsewhere
        with self._autocast():
            self.references = {
                domain: self.original.outputs(self._shown(f"the original on {domain}", batches))
                for domain, batches in self.domains.items()
            }
        if not self.state.has("original", 0):
            self._record("original", self.original)
        if not (job.work / "refitted").is_dir():
            self._operate()
        for stage in ("dropped", "refitted"):
            if not self.state.has(stage, 0):
                self._record(stage, self._load(job.work / stage))
        if not job.out.is_dir():
            self._heal()
        converted = self._load(job.out)
        with self._autocast():
            self._save(samples=self._samples(converted), serve=self.kind.serve(job.out))
            self._save(speed=self._speed(converted))
        self._save(
            wall_s=time.perf_counter() - self.start,
            peak_bytes=_peak_bytes(),
            machine=machine(settings.device).to_dict(),
            versions=versions(),
            git=git_revision(),
        )
        write_json(job.out / "conversion.json", self.state)
        shutil.rmtree(job.work)
        return self.state

    def _begin(self) -> Conversion:
        """The state of this conversion, which is new or left by an earlier process."""
        second = None if self.job.second is None else self.job.second.name
        settings = {"calibration": self.job.calibration.name, "evaluate": second, **self.settings.to_dict()}
        if not self.state_path.is_file():
            storage.refuse_existing(self.job.out)  # `prepare` has not seen what a process before this one finished
            return Conversion(settings=settings)
        state = Conversion.from_dict(read_json(self.state_path))
        self._compare(state.settings, settings)
        return state

    def _compare(self, held: dict[str, Any], now: dict[str, Any]) -> None:
        if changed := differences(held, now):
            raise InputError(
                f"output: {self.job.work} holds an unfinished conversion with other settings ({'; '.join(changed)}); "
                f"give those, or delete the folder"
            )

    def _save(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        self.job.work.mkdir(parents=True, exist_ok=True)
        write_json(self.state_path, self.state)

    def _load(self, directory: Path) -> Subject:
        subject = self.kind.load(directory)
        subject.model.to(self.settings.device)
        return subject

    def _autocast(self) -> torch.autocast:
        """Autocast without its cache of weights, which would miss a change of the weights inside the block."""
        dtype = find_dtype(self.settings.dtype)
        return torch.autocast(
            torch.device(self.settings.device).type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False
        )

    def _shown(self, label: str, batches: Sequence[Any]) -> Iterator[Any]:
        """Yield the batches, and show each as a step of the phase `label`."""
        self.display.start(label, len(batches))
        for batch in batches:
            yield batch
            self.display.step(None)
        self.display.finish("")

    def _read(self) -> _Text:
        """Read the text, each split once and only as far as needed."""
        job, settings = self.job, self.settings
        self.display.note(f"reading {job.calibration.name}" + (f" and {job.second.name}" if job.second else ""))
        self.side = self.original.text_side(job.source)
        rows_of = partial(self.original.batches, self.side, length=settings.length, batch_size=settings.batch_size)
        training, measured = job.calibration.documents("train"), settings.evaluation_tokens // settings.length
        held_out = rows_of(training, settings.sequences // 8)
        second, rows = job.second.documents("validation") if job.second else iter(()), measured
        if not self.original.predicts:  # it reads a document a row, and the built-in corpus has few documents
            found = list(islice(second, rows))
            second, rows = iter(found), len(found) or 1
        text = _Text(
            held_out=held_out,
            fit=rows_of(training, settings.sequences - settings.sequences // 8),
            healing=rows_of(training, settings.batch_size * settings.steps),
            evaluation=rows_of(job.calibration.documents("validation"), measured),
            elsewhere=rows_of(second, rows) if job.second else (),
        )
        held, ids = self.state.settings, (batch.input_ids for part in vars(text).values() for batch in part)
        read = {"model": _digest(self.original.model.parameters()), "text": _digest(ids)}
        self._compare(held, {name: digest for name, digest in read.items() if name in held})
        self._save(settings={**held, **read})
        return text

    def _record(self, stage: str, subject: Subject, tokens: int = 0, *, midway: bool = False) -> None:
        """Measure a stage, print it and keep it; `midway` through healing, on the first domain only."""
        domains = list(self.domains)[: 1 if midway else 2]
        quality = [self._measure(stage, subject, domain) for domain in domains]
        measured = Stage(stage=stage, tokens=tokens, quality=quality[0], elsewhere=next(iter(quality[1:]), None))
        self.display.note(str(measured))
        if measured.elsewhere:
            self.display.note(f"  second domain: {measured.elsewhere}")
        self.state = self.state.with_stage(measured)
        self._save()

    def _measure(self, stage: str, subject: Subject, domain: str) -> Quality:
        with self._autocast():
            batches = self._shown(f"measuring {stage} on {domain}", self.domains[domain])
            quality = subject.measure(batches, self.original, self.references[domain])
        if not all(math.isfinite(value) for value in vars(quality).values()):
            what = "the original" if subject is self.original else "the converted model"
            raise InputError(f"model: {what} gives values that are not finite ({quality}); nothing was converted")
        return quality

    def _operate(self) -> None:
        job, text = self.job, self.text
        with self._autocast():
            if self.settings.allocation == "uniform":
                plans = job.uniform()
            else:
                part = self._shown("measuring what each layer's heads are worth", text.fit[: -(-len(text.fit) // 4)])
                plans = allocation.cheapest(allocation.layer_choices(self.original, part, job.counts()), job.total)
            counts = ", ".join(f"{after.num_query_heads}/{after.num_kv_heads}" for after, _ in plans)
            self.display.note(f"query/KV heads of the layers: {counts}")
            self.display.start("refitting layer by layer", len(plans))
            dropped, refitted, layers = operate(
                self.settings, self.original, plans, text.fit, text.held_out, lambda: self.display.step(None)
            )
        self.display.finish("refitted")
        self._save(layers=layers)
        self._write(dropped, job.work / "dropped", torch.float32)
        self._write(refitted, job.work / "refitted", torch.float32)

    def _write(self, subject: Subject, folder: Path, dtype: torch.dtype) -> None:
        """Write a model to a folder inside the work folder, whole or not at all, in the place of any before it."""
        shutil.rmtree(folder, ignore_errors=True)
        with storage.new_directory(folder) as temporary:
            subject.save(temporary, self.job.source, dtype)

    def _heal(self) -> None:
        job, batches, first = self.job, self.text.healing, self.settings.layerwise_steps
        student = self._load(job.work / "refitted")
        self._phase("layers healed", Layerwise(student, self.original), batches[:first])
        spent = sum(map(student.count, batches[:first]))
        self._phase("distilled", Distillation(student, self.original), batches[first:], spent)
        if self.settings.control:
            self._phase("control", OwnLoss(copy.deepcopy(self.original)), batches)
        both = (self.original, student)
        self._save(parameters=tuple(sum(p.numel() for p in subject.model.parameters()) for subject in both))
        self._write(student, job.work / "converted", self.original.dtype)
        write_json(job.work / "converted" / "conversion.json", self.state)
        (job.work / "converted").rename(job.out)
        self.display.note(f"wrote {job.out}")

    def _phase(self, stage: str, task: Healing, batches: Sequence[Any], offset: int = 0) -> None:
        if not batches:
            return
        subject = task.student
        self.display.start(f"healing: {stage}", len(batches))
        marks = self._marks(len(batches))
        trained: list[nn.Parameter] = subject.trainable
        if self.settings.train == "attention" or isinstance(task, Layerwise):
            trained = [p for view in subject.views for linear in view.projections for p in linear.parameters()]

        def on_step(report: StepReport) -> None:
            self.display.step(report)
            if report.step in marks:
                with self.stop.at_once(f"stopped after step {report.step} of {len(batches)}"):
                    self._record(stage, subject, offset + report.tokens, midway=True)
                self.display.start(f"healing: {stage}", len(batches))

        folder = self.job.work / stage.replace(" ", "-")
        try:
            progress = heal(task, batches, self.settings, trained, folder, Hooks(on_step, self.stop))
        except Interrupted as error:
            raise Interrupted(f"{error} of healing; the same command goes on from there") from None
        self.display.finish(f"{stage}: {progress.tokens:,} tokens in {progress.wall_s:,.0f} s")
        if not self.state.has(stage, offset + progress.tokens):
            self._record(stage, subject, offset + progress.tokens)

    def _marks(self, steps: int) -> set[int]:
        """The steps before the last after which quality is measured, so few that it takes about a tenth of the time.

        Measuring takes about a third of the time of training on as many tokens.
        """
        affordable = int(0.3 * steps * self.settings.tokens_per_step / self.settings.evaluation_tokens)
        count = max(1, min(MEASUREMENTS, affordable))
        return {round(steps * i / count) for i in range(1, count)}

    @torch.no_grad()
    def _samples(self, converted: Subject) -> tuple[Sample, ...]:
        """Greedy continuations of the beginnings of validation rows by both models; none for an encoder."""
        if not self.kind.predicts:
            return ()
        found = []
        tokens = min(SAMPLE_TOKENS, self.original.model.config.max_seq_len // 2)
        for batch in self.text.evaluation[:SAMPLES]:
            prompt = self.original.row_of(batch.input_ids[:1, :tokens])
            before, after = (subject.continued(prompt, tokens) for subject in (self.original, converted))
            texts = (self.side.decode(ids[0].tolist()) for ids in (prompt.input_ids, before, after))
            found.append(Sample(**dict(zip(("prompt", "original", "converted"), texts, strict=True))))
        return tuple(found)

    def _speed(self, converted: Subject) -> tuple[Speed, ...]:
        """Time prefill, and forward with backward, at each length, before and after in turns."""

        def timed(subject: Subject, what: str, row: Any) -> None:
            if what == "prefill":
                with torch.no_grad():
                    subject.prefill(row)
                return
            subject.loss(row).backward()
            subject.model.zero_grad()

        vocab_size, device = converted.model.config.vocab_size, converted.device
        contestants = {
            (what, n, name): partial(timed, subject, what, row)
            for n in self.job.speed_at
            for row in [converted.row_of(torch.arange(n, device=device)[None] % vocab_size)]
            for what in ("prefill", "forward and backward")
            for name, subject in (("before", self.original), ("after", converted))
        }
        self.display.start("timing before and after in turns", 4 * len(contestants))
        timings = take_turns(
            contestants,
            rounds=3,
            device=self.settings.device,
            on_turn=lambda: self.display.step(None),
            limit=TimeLimit(seconds=TIMING_SECONDS),
        )
        self.display.finish("timed")
        return tuple(
            Speed(what=what, n=n, before=timings[what, n, "before"].to_dict(), after=timing.to_dict())
            for (what, n, name), timing in timings.items()
            if name == "after"
        )


def _digest(tensors: Iterable[Tensor]) -> str:
    """Hex digest of the values of tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _peak_bytes() -> int | None:
    """The peak memory of this process so far; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
