"""`megatronish status RUN`: what a run's folder and Slurm say, in a few lines."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatronish import failures
from megatronish.checkpoint.load import find_checkpoints
from megatronish.checkpoint.manifest import step_of
from megatronish.config_loader import load_config
from megatronish.errors import UserError
from megatronish.run_folder import RunFolder
from megatronish.submit import submitted_job

_TAIL_BYTES = 1 << 16


def main(run: Path) -> int:
    """Print it. UserError if there is no run."""
    folder = RunFolder(run)
    if not folder.config_file.is_file() and not (run / "submit").is_dir():
        raise UserError(f"{run} is not the folder of a run: there is no {folder.config_file}; give RUN_ROOT/NAME of a run")
    for name, fact in facts(folder):
        print(f"{name + ':':<13} {fact}")
    return 0


def facts(folder: RunFolder) -> Iterator[tuple[str, str]]:
    """(what, how it stands)."""
    if (job := last_job(folder.path)) is not None:
        yield "job", describe_job(job[0], needed=job[1])
    total = f" of {load_config(folder.config_file).num_steps:,}" if folder.config_file.is_file() else ""
    row = last_row(folder.path / "metrics.jsonl")
    if row is None:
        yield "step", f"none yet{total}"
    else:
        yield "step", f"{row['step']:,}{total}, {ago(folder.path / 'metrics.jsonl')}"
        yield "loss", f"{row['loss']:.4f}"
        yield "tokens/s", f"{row['tokens_per_second']:,.0f}"
    if (failure := failures.latest(folder.path)) is not None:
        yield "last failure", f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(failure.time))} {failure.describe(folder.path)}"
    newest = find_checkpoints(folder.checkpoints)[:1]
    yield "checkpoint", f"step {step_of(newest[0].name):,}, {ago(newest[0])}" if newest else "none yet"


def last_job(run: Path) -> tuple[str, int | None] | None:
    """Number of the Slurm job that was submitted or began last, and how many nodes its ranks take, if `megatronish submit` said."""
    jobs: list[tuple[float, str, int | None]] = []
    if (submitted := submitted_job(run)) is not None:
        jobs.append((submitted.when, submitted.number, submitted.nodes))
    # Each job of slurm/pretrain.sbatch keeps count of its lives there.
    for path in (run / "lives").glob("*"):
        if path.name.isdecimal() and path.name not in {job for _, job, _ in jobs}:
            jobs.append((path.stat().st_mtime, path.name, None))
    return max(jobs, key=lambda job: job[0])[1:] if jobs else None


def describe_job(job: str, *, needed: int | None) -> str:
    """State, time, nodes and restarts, as scontrol says. `needed`: nodes that the ranks take; the others are spare."""
    try:
        done = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return f"{job}; Slurm does not answer on this machine"
    # Of the number of a job array it shows every element.
    own = [line for line in done.stdout.splitlines() if line.startswith(f"JobId={job} ")]
    said = dict(re.findall(r"(\S+?)=(\S*)", own[0] if own else ""))
    if done.returncode != 0 or "JobState" not in said:
        return f"{job}; Slurm does not know it any more"
    reason = f" ({said['Reason']})" if said.get("Reason", "None") != "None" else ""
    nodes = said.get("NumNodes", "").partition("-")[0]
    spares = int(nodes) - needed if needed is not None and nodes.isdecimal() else 0
    return (
        f"{job} {said['JobState']}{reason}, {said.get('RunTime')} of {said.get('TimeLimit')}, restarts {said.get('Restarts')}, "
        f"nodes {said.get('NodeList')}{f', {spares} of them spare' if spares > 0 else ''}"
    )


def last_row(path: Path) -> dict[str, Any] | None:
    """The last row of a step; a line that is being written is passed over."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"step", "loss", "tokens_per_second"} <= row.keys():
            return row
    return None


def ago(path: Path) -> str:
    """How long since it was written."""
    then = datetime.datetime.fromtimestamp(path.stat().st_mtime)
    return f"{str(datetime.datetime.now() - then).partition('.')[0]} ago"
