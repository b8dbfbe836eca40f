"""How long a rehearsal takes, and whether what it infers is what running it all gives.

`megatronish bench preflight CONFIG`: the job as `megatronish preflight` rehearses it, then every rank and every microbatch of it;
the logs of all ranks must be equal, event by event.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from megatronish.config import Config
from megatronish.preflight.certificate import hash_of_logs
from megatronish.preflight.check import check
from megatronish.preflight.classes import PartOfJob, Plan
from megatronish.preflight.rehearse import shortened
from megatronish.preflight.rehearse_job import RehearsedJob, rehearse_job

NUM_STEPS = 2
Tell = Callable[[PartOfJob], None]


def measure(config: Config, world_size: int, *, in_full: bool, tell: Tell | None = None) -> dict[str, Any]:
    """Seconds of the usual rehearsal; with in_full, of one that infers nothing too, and whether the logs are equal."""
    usual, seconds = _rehearse(config, world_size, in_full=False, tell=tell)
    started = time.perf_counter()
    verdict = check(usual.job, "cuda")
    result: dict[str, Any] = {
        "bench": "preflight",
        "config": config.name,
        "layers": config.model.num_layers,
        "world_size": world_size,
        "sound": verdict.ok,
        "calls": verdict.num_calls,
        "ranks_run": len(usual.ran),
        "ranks_inferred": usual.num_inferred,
        "passes_run": usual.num_actions_run,
        "passes_inferred": usual.num_actions_inferred,
        "rehearse_seconds": seconds,
        "match_seconds": time.perf_counter() - started,
        "logs": hash_of_logs(usual.job),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_cpus": os.cpu_count(),
    }
    if in_full:
        full, full_seconds = _rehearse(config, world_size, in_full=True, tell=tell)
        result["in_full"] = {
            "ranks_run": len(full.ran),
            "passes_run": full.num_actions_run,
            "rehearse_seconds": full_seconds,
            "logs": (logs := hash_of_logs(full.job)),
            "equal": logs == result["logs"],
        }
    return result


def _rehearse(config: Config, world_size: int, *, in_full: bool, tell: Tell | None) -> tuple[RehearsedJob, float]:
    short = shortened(config, world_size, num_steps=NUM_STEPS)
    plan = Plan(short, world_size, "cuda", "all" if in_full else "two of each phase", every_rank=in_full)
    started = time.perf_counter()
    return rehearse_job(plan, progress=tell), time.perf_counter() - started
