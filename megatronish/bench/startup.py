"""From a process's start to its first step, phase by phase, on 1, 4 and 8 local ranks: `megatronish train` itself on a few samples.

What a rank does by itself (imports, reading, building) costs it the same at any width where it has a core of its own, so the CPU
seconds of one rank alone stand for it. What it does with others grows with their number. There the rank that waits least counts,
since the others' time has the wait for the slowest in it, and a line through the widths says how it goes on. Ranks that share cores
make that line too steep: the estimate is an upper bound.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatronish import __version__
from megatronish.bench.workers import processor_name
from megatronish.config import Config
from megatronish.data.indexed_writer import IndexedDatasetWriter, token_dtype
from megatronish.observe.start_clock import START_UP, Spent, read_phases

LAYOUTS = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 2, 2)}
"""Ranks -> tensor, pipeline, data."""
TOGETHER = ("rendezvous", "agreement", "groups")
"""Phases whose time grows with the number of ranks."""
WIDTH = 1024
"""Ranks of the estimate."""
_PATIENCE_SECONDS = 600.0


@dataclass(frozen=True)
class StartupBench:
    """What is measured."""

    config_path: str
    overrides: tuple[str, ...]
    config: Config
    rounds: int
    folder: Path


def measure(bench: StartupBench, on_run: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Medians over rounds, by number of ranks and phase; the widths take turns."""
    prefix = _write_samples(bench)
    runs: dict[int, list[list[dict[str, Spent]]]] = {size: [] for size in LAYOUTS}
    for number in range(bench.rounds):
        for size in LAYOUTS:
            runs[size].append(_start(bench, prefix, size, bench.folder / f"{size}-{number}"))
            on_run()
    rows = {size: {phase: _row(of_size, phase) for phase in of_size[0][0]} for size, of_size in runs.items()}
    return {
        "bench": "startup",
        "ranks": rows,
        "estimate": estimate(rows),
        "width": WIDTH,
        "device": processor_name(),
        "date": time.strftime("%Y-%m-%d"),
        "megatronish": __version__,
    }


def estimate(rows: dict[int, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Seconds until the first step at WIDTH ranks, each with a core of its own."""
    slopes, together = {}, 0.0
    for phase in TOGETHER:
        sizes = [size for size in rows if size > 1]
        slope, base = np.polyfit(sizes, [rows[size][phase]["least"] for size in sizes], 1)
        slopes[phase] = max(float(slope), 0.0)
        together += max(float(base), 0.0) + slopes[phase] * WIDTH
    alone = sum(row["cpu"] for phase, row in rows[1].items() if phase not in TOGETHER)
    return {"seconds": alone + together, "alone": alone, "together": together, "seconds_a_rank": slopes}


def _row(runs: list[list[dict[str, Spent]]], phase: str) -> dict[str, float]:
    """Of a phase: seconds of the rank that took most and least, and CPU seconds of the one that took most."""
    walls = [[rank[phase].wall for rank in run] for run in runs]
    return {
        "most": statistics.median(map(max, walls)),
        "least": statistics.median(map(min, walls)),
        "cpu": statistics.median(max(rank[phase].cpu for rank in run) for run in runs),
    }


def _start(bench: StartupBench, prefix: Path, size: int, folder: Path) -> list[dict[str, Spent]]:
    """Train one step; the phases of each rank."""
    tensor, pipeline, data = LAYOUTS[size]
    overrides = [
        *bench.overrides,
        f"run_root={folder}",
        f"parallel.tensor={tensor}",
        f"parallel.pipeline={pipeline}",
        f"parallel.data={data}",
        f"data.train={prefix}",
        "data.validation=null",
        "data.tokenizer=null",
        "train.steps=1",
        "optim.warmup_steps=0",
        "train.eval_interval=0",
        "observe.sample_interval=0",
        "observe.peak_tflops=1.0",
    ]
    command = [sys.executable, "-m", "megatronish", "train", bench.config_path, *overrides, "--nproc", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{json.dumps(command)} ended with exit code {done.returncode}:\n{done.stderr}")
    logs = sorted((folder / bench.config.name / "logs").glob("rank-*.log"))
    lines = [line for log in logs for line in log.read_text().splitlines() if START_UP in line]
    assert len(lines) == size, (logs, lines)
    return [read_phases(line.partition(START_UP)[2]) for line in lines]


def _write_samples(bench: StartupBench) -> Path:
    """A set that is enough for one step."""
    config, prefix = bench.config, bench.folder / "samples"
    dtype = token_dtype(config.model.vocab_size)
    with IndexedDatasetWriter(prefix, dtype=dtype) as writer:
        count = (config.data.sequence_length + 1) * (config.train.global_batch_size + 1)
        writer.add_tokens((np.arange(count) % config.model.vocab_size).astype(dtype))
        writer.end_document()
    return prefix
