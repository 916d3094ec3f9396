"""Benchmark of whole training steps (forward, loss, backward, AdamW) of variants and peers."""

import itertools
import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sqa import cost
from sqa.bench.lineup import Models, Runner, Task, beside_peers, compiled, line_up, measure
from sqa.bench.measurement import Measurement, with_shares
from sqa.bench.peers import OURS, Entrant, build, check_peers, ours
from sqa.bench.report import BenchResult
from sqa.config import ModelConfig
from sqa.dtypes import find_dtype
from sqa.errors import InputError, first_line
from sqa.measure.machine import find_device
from sqa.measure.peak import measure_peak
from sqa.measure.timing import TimeLimit
from sqa.model import Transformer
from sqa.records import at_least_one

logger = logging.getLogger(__name__)


def training_step(entrant: Entrant, module: nn.Module, dtype: torch.dtype, batch: Tensor) -> Callable[[], None]:
    """One step on input ids and labels (2, B, T); any dtype but fp32 runs under autocast. AdamW is fused for all."""
    input_ids, labels = batch
    optimizer = torch.optim.AdamW(entrant.module.parameters(), lr=1e-4, fused=True)
    compute_loss = entrant.loss
    assert compute_loss is not None  # check_peers

    def step() -> None:
        with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = compute_loss(module, input_ids, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run_step(
    models: Models,
    *,
    peers: Sequence[str] = (),
    dtypes: Sequence[str] = ("bf16", "fp32"),
    batch_size: int = 4,
    length: int = 1024,
    compile: bool = True,
    memory: bool = False,
    rounds: int = 10,
    device: str = "cpu",
    budget: float | None = None,
) -> BenchResult:
    """Time training steps; all contestants of one dtype (fp32, bf16 autocast) take turns.

    With peers, the models of a preset take the shape that peers can have (no biases, a final norm). A peer that has our
    weights must compute the same logits and loss before it is timed; each is tried eager and compiled, and the better
    counts. `memory` measures the peak memory of a step too, each contestant in a process of its own. `budget` is in
    seconds. Raises InputError for bad options.
    """
    at_least_one("benchmark", dtypes=len(dtypes), batch_size=batch_size, length=length, rounds=rounds)
    check_peers(peers, training=True)
    if "fp16" in dtypes:
        raise InputError("benchmark: dtype fp16 needs loss scaling to train, which is not measured; give fp32 or bf16")
    where, limit = find_device(device), TimeLimit(seconds=budget)
    torch_dtypes = {name: find_dtype(name) for name in dtypes}
    models = models.fitted(length, peers)
    configs = models.configs
    variant, first = next(iter(configs.items()))
    batch = torch.randint(models.vocab_size, (2, batch_size, length), device=where)
    rows: list[Measurement] = []
    notes = [f"{cost.parameters(first):,} parameters ({variant})"]
    for dtype, torch_dtype in torch_dtypes.items():
        peak = measure_peak(torch_dtype, where)
        notes.append(f"{dtype}: {peak}")
        lineup = line_up(models, peers, compile=compile, device=where)
        task = Task(kind="step", preset=models.name, dtype=dtype, batch_size=batch_size, n=length, device=where)

        def work(runner: Runner, dtype: torch.dtype = torch_dtype) -> Callable[[], None]:
            return training_step(runner.entrant, runner.module, dtype, batch)

        best = measure(lineup, task, work, configs, rounds=rounds, limit=limit)
        rows += (with_shares(m, cost.train_step_flops(configs[m.variant], length, batch_size), peak) for m in best)
        if memory:
            rows += _memory(best, task, configs)
    if peers:
        if not models.sources:
            notes.append("Shape without biases and with a final norm, as peers have it.")
        notes.append("same: our weights, equal logits and loss. vs peer: the fastest peer's time over ours.")
        notes.append("run: the faster of eager and compiled.")
    options = {"preset": models.name, "rounds": rounds, "optimizer": "AdamW, fused", "compile": compile}
    return BenchResult.of(rows, device=device, settings=options, notes=notes)


def _memory(timed: Sequence[Measurement], task: Task, configs: Mapping[str, ModelConfig]) -> list[Measurement]:
    """The peak memory of each contestant that was timed; ours also as a share of the lowest of its peers."""
    found: list[Measurement] = []
    for m in timed:
        if m.seconds is None:
            continue
        name, config = m.implementation or OURS, configs[m.variant]
        known = replace(task.measurement(name, m.variant, config), kind="step memory", setting=m.setting)
        logger.info("measuring the memory of %s (by %s)", m.variant, name)
        # a compiled contestant runs twice: the first fills the compiler's cache on disk
        for _ in range(2 if m.setting == "compiled" else 1):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                measuring = process.submit(peak_memory, task, name, m.setting, config, torch.get_num_threads())
                error = measuring.exception()
        if isinstance(error, RuntimeError):  # out of memory, or killed for it
            found.append(replace(known, note=f"cannot run: {first_line(error)}"))
        elif (peak := measuring.result()) is not None:
            found.append(replace(known, peak_bytes=peak))
    return beside_peers(found)


def peak_memory(task: Task, name: str, setting: str | None, config: ModelConfig, threads: int) -> int | None:
    """Bytes at the peak of steps 3 to 5 of the contestant `name`, minus those held before the model was built.

    Resident memory on CPU (Linux only, else None), PyTorch's allocations on CUDA. Run it in a process of its own.
    """
    torch.set_num_threads(threads)
    device = task.device

    def steps(config: ModelConfig, n: int) -> Iterator[Callable[[], None]]:
        model = Transformer(config)
        entrant = ours(model) if name == OURS else build(name, model)["eager"]
        del model
        entrant.module.to(device)
        module = compiled(name, entrant.module) if setting == "compiled" else entrant.module
        batch = torch.randint(config.vocab_size, (2, task.batch_size, n), device=device)
        yield from itertools.repeat(training_step(entrant, module, find_dtype(task.dtype), batch), 5)

    # a small model first: memory that libraries hold after their first use does not count
    for step in steps(config.replace(num_layers=1, attention=config.layers[0], vocab_size=8), 8):
        step()
    del step  # it holds the small model
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else _resident("VmRSS")
    for turn, step in enumerate(steps(config, task.n)):
        if turn == 2 and on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        elif turn == 2 and before is not None:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts again from here
        step()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else _resident("VmHWM")
    return None if before is None or peak is None else peak - before


def _resident(field: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes; None without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
