"""Whole training steps: forward, loss, backward and AdamW; variants against each other and against peers."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from sqa import cost
from sqa.bench.peers import OURS, Entrant, Runner, build, compiled, line_up, measure, shapes
from sqa.bench.report import VARIANTS, BenchResult, Row
from sqa.config import ModelConfig
from sqa.errors import InputError
from sqa.measure.machine import find_device, find_dtype, matmul_peak
from sqa.measure.timing import Budget, at_least_one


def training_step(entrant: Entrant, module: nn.Module, dtype: torch.dtype, batch: Tensor) -> Callable[[], None]:
    """One step on input ids and labels (2, B, T); any dtype but fp32 runs under autocast. AdamW is fused for all."""
    input_ids, labels = batch
    optimizer = torch.optim.AdamW(entrant.module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = entrant.loss(module, input_ids, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run_step(
    *,
    preset: str = "published",
    variants: Sequence[str] = VARIANTS,
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

    With peers, our models take the shape that peers can have (no biases, a final norm), a peer that shares our
    function must compute the same logits and loss before it is timed, each is tried eager and compiled, and the
    better counts. `memory` measures the peak memory of a step too, each contestant in a process of its own.
    Raises ValueError for bad options.
    """
    at_least_one(variants=len(variants), dtypes=len(dtypes), batch_size=batch_size, length=length, rounds=rounds)
    if "fp16" in dtypes:
        raise InputError("benchmark: dtype fp16 needs loss scaling to train, which is not measured; give fp32 or bf16")
    where, left = find_device(device), Budget(seconds=budget)
    torch_dtypes = {name: find_dtype(name) for name in dtypes}
    configs = shapes(preset, variants, peers, length=length)
    first = configs[variants[0]]
    batch = torch.randint(first.vocab_size, (2, batch_size, length), device=where)
    rows: list[Row] = []
    for dtype, torch_dtype in torch_dtypes.items():
        peak = matmul_peak(torch_dtype, where)
        runners, absent = line_up(configs, peers, compile=compile, device=where)

        def work(runner: Runner, dtype: torch.dtype = torch_dtype) -> Callable[[], None]:
            return training_step(runner.entrant, runner.module, dtype, batch)

        best = measure(
            runners, absent, work, configs, kind="step", preset=preset, dtype=dtype, batch_size=batch_size, n=length,
            rounds=rounds, device=where, budget=left,
        )  # fmt: skip
        for row in best:
            if "seconds" in row:
                flops = cost.train_step_flops(configs[row["variant"]], length, batch_size)
                row["share_of_peak"] = flops / row["seconds"]["median"] / peak
        for row, rivals in _beside_peers([row for row in best if "seconds" in row]):
            row["ratio_to_peer"] = min(r["seconds"]["median"] for r in rivals) / row["seconds"]["median"]
        rows += best
        if memory:
            rows += _memory_rows(best, configs, device)
    notes = [f"{cost.parameters(first):,} parameters ({variants[0]})"]
    if peers:
        notes.append(
            "Shape without biases and with a final norm, as peers have it. same: our weights, equal logits and loss."
        )
        notes.append("vs peer: the fastest peer's time over ours. run: the faster of eager and compiled.")
    options = {"preset": preset, "rounds": rounds, "optimizer": "AdamW, fused", "compile": compile}
    return BenchResult.of(rows, device=device, settings=options, notes=notes)


def _beside_peers(rows: list[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Each row of ours, with those of peers of the same variant, where there are any."""
    for row in rows:
        rivals = [r for r in rows if r["variant"] == row["variant"] and r["implementation"] != OURS]
        if row["implementation"] == OURS and rivals:
            yield row, rivals


def _memory_rows(rows: list[Row], configs: Mapping[str, ModelConfig], device: str) -> list[Row]:
    """Peak memory of each contestant that was timed, and ours as a share of the most frugal peer's."""
    found: list[Row] = []
    for row in rows:
        if "seconds" not in row:
            continue
        # a compiled contestant runs twice: the first fills the compiler's cache on disk
        for _ in range(2 if row["setting"] == "compiled" else 1):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                config, threads = configs[row["variant"]], torch.get_num_threads()
                peak = process.submit(peak_memory, row, config, device, threads).result()
        if peak is not None:
            keep = ("preset", "implementation", "variant", "batch_size", "n", "dtype", "setting")
            found.append({"kind": "step memory", **{field: row[field] for field in keep}, "peak_bytes": peak})
    for row, rivals in _beside_peers(found):
        row["memory_to_peer"] = row["peak_bytes"] / min(r["peak_bytes"] for r in rivals)
    return found


def peak_memory(row: Row, config: ModelConfig, device: str, threads: int) -> int | None:
    """Bytes at the peak of steps 3 to 5 of the row's contestant, less what was held before the model was built.

    Resident memory on CPU (Linux only, None elsewhere), PyTorch's allocations on CUDA. For a process of its own.
    """
    torch.set_num_threads(threads)
    where, name = torch.device(device), row["implementation"]

    def steps(config: ModelConfig, n: int) -> Iterator[Callable[[], None]]:
        entrant = build(name, config)
        entrant.module.to(where)
        module = compiled(name, entrant.module) if row["setting"] == "compiled" else entrant.module
        batch = torch.randint(config.vocab_size, (2, row["batch_size"], n), device=where)
        yield from itertools.repeat(training_step(entrant, module, find_dtype(row["dtype"]), batch), 5)

    # what the libraries hold once everything was imported is not the model's
    for step in steps(config.replace(num_layers=1, vocab_size=8), 8):
        step()
    before = _resident("VmRSS")
    for turn, step in enumerate(steps(config, row["n"])):
        if turn == 2 and where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where)
        elif turn == 2 and before is not None:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM starts again from here
        step()
    if where.type == "cuda":
        return torch.cuda.max_memory_allocated(where)
    peak = _resident("VmHWM")
    return None if before is None or peak is None else peak - before


def _resident(field: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
