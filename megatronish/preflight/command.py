"""`megatronish preflight CONFIG`: rehearse every rank, match what they communicate, and say whether the job would hang."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatronish.config import Config
from megatronish.config_loader import load_config, to_yaml
from megatronish.constraints import warnings
from megatronish.deepspeed_settings import require_native
from megatronish.errors import UserError
from megatronish.json_file import writable, write_json
from megatronish.preflight.certificate import FILE_NAME, Certificate, hash_of_code, issue, write_certificate
from megatronish.preflight.check import Verdict, check
from megatronish.preflight.classes import PartOfJob, Plan, RankFailed
from megatronish.preflight.rehearse import shortened
from megatronish.preflight.rehearse_job import RehearsedJob, rehearse_job
from megatronish.preflight.report import LIMITS, ReportFacts, write_report
from megatronish.preflight.trace import write_trace
from megatronish.run_folder import RunFolder

NUM_STEPS = 2
FINDINGS_SHOWN = 5
REPORT = "report.html"


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    nodes: int | None = None
    gpus_per_node: int = 8
    world: int | None = None
    device_kind: Literal["cuda", "cpu"] = "cuda"
    every_rank: bool = False
    every_microbatch: bool = False
    out: Path | None = None
    trace: Path | None = None
    json_file: Path | None = None
    processes: int | None = None


@dataclass(frozen=True)
class Preflight:
    """What came of it."""

    config: Config
    plan: Plan
    rehearsed: RehearsedJob
    verdict: Verdict
    certificate: Certificate | None
    """None with findings."""
    warnings: tuple[str, ...]
    seconds: float


def main(config_path: str, overrides: list[str], options: Options) -> int:
    """Rehearse, report; 0 if the job is sound, 1 if not. UserError for a config that is wrong in itself."""
    world_size = find_world_size(options)
    config = load_config(config_path, overrides, world_size=world_size)
    require_native(config, "preflight")
    world_size = world_size or config.parallel.tensor * config.parallel.pipeline * (config.parallel.data or 1)
    out = options.out or RunFolder.of(config).path / "preflight"
    for path in (options.json_file, options.trace):
        if path is not None:
            writable(path)
    for name in (FILE_NAME, REPORT):  # what an earlier rehearsal said does not hold for this one
        (out / name).unlink(missing_ok=True)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=160)
    try:
        result = run(config, world_size, options, console)
    except RankFailed as failure:
        console.print(str(failure), soft_wrap=True, markup=False)
        if options.json_file is not None:
            write_json(options.json_file, {"ok": False, "failed": str(failure)})
        return 1
    write_files(result, out, options)
    console.print(summary(result, out), soft_wrap=True, markup=False)
    return 0 if result.verdict.ok else 1


def find_world_size(options: Options) -> int | None:
    """The number of ranks that --world, or --nodes and --gpus-per-node, say; None if neither is given: then the config must."""
    if options.nodes is None:
        return options.world
    ranks = options.nodes * options.gpus_per_node
    if options.world is not None and options.world != ranks:
        raise UserError(f"--world {options.world}, but --nodes {options.nodes} x --gpus-per-node {options.gpus_per_node} = {ranks}")
    return ranks


def run(config: Config, world_size: int, options: Options, console: Console) -> Preflight:
    """All of it but the files."""
    started, code = time.perf_counter(), hash_of_code()
    plan = Plan(
        shortened(config, world_size, num_steps=NUM_STEPS),
        world_size,
        options.device_kind,
        "all" if options.every_microbatch else "two of each phase",
        options.every_rank,
    )
    # Where there is no terminal, nothing else moves.
    console.print(f"rehearsing {world_size:,} ranks of {config.name}", soft_wrap=True)
    with _progress(console, world_size) as tell:
        rehearsed = rehearse_job(plan, processes=options.processes, progress=tell)
    with console.status("matching all communication"):
        verdict = check(rehearsed.job, options.device_kind)
    certificate = None
    if verdict.ok:
        certificate = issue(
            config,
            rehearsed,
            code=code,
            device_kind=options.device_kind,
            rules={str(rule): passes for rule, passes in verdict.passes.items()},
        )
    notes = (*warnings(config, world_size), *_notes(config))
    return Preflight(config, plan, rehearsed, verdict, certificate, notes, time.perf_counter() - started)


def _notes(config: Config) -> Iterator[str]:
    """What of this config is rehearsed otherwise than it runs."""
    if config.train.batch_ramp is not None:
        yield f"train.batch_ramp: rehearsed at its last size, train.global_batch_size={config.train.global_batch_size}, alone"
    if config.train.patience is not None:
        yield "train.patience: the run is rehearsed as if held-out loss kept falling"
    if config.checkpoint.asynchronous:
        yield "checkpoint.asynchronous: the save is rehearsed as if its files were written at once"


@contextmanager
def _progress(console: Console, world_size: int) -> Iterator[Any]:
    columns = (
        TextColumn("rehearsing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ranks, {task.fields[ran]} of them run"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task, ran = progress.add_task("", total=world_size, ran=0), 0

        def tell(part: PartOfJob) -> None:
            nonlocal ran
            ran += len(part.ran)
            progress.update(task, advance=len(part.log_of), ran=ran)

        yield tell


def summary(result: Preflight, out: Path) -> str:
    """What a user reads first."""
    job, verdict, rehearsed = result.rehearsed.job, result.verdict, result.rehearsed
    shape, microbatches = job.shape, result.config.num_microbatches(job.num_ranks)
    lines = [
        f"{result.config.name}: {job.num_ranks:,} ranks = pipeline {shape.pp} x data {shape.dp} x tensor {shape.tp}, "
        f"{microbatches} microbatches, {NUM_STEPS} steps, in {result.seconds:.1f} s",
        f"ranks: {len(rehearsed.ran):,} run + {rehearsed.num_inferred:,} inferred = {job.num_ranks:,}; microbatch passes of ranks "
        f"that ran: {rehearsed.num_actions_run:,} run + {rehearsed.num_actions_inferred:,} inferred",
        *(f"warning: {line}" for line in result.warnings),
    ]
    if verdict.ok:
        assert result.certificate is not None
        lines += [
            f"sound: {verdict.num_calls:,} calls match ({verdict.num_collectives:,} collectives and {verdict.num_messages:,} "
            f"messages in {verdict.num_groups:,} groups), and the job ends {rules_in_words(result)}",
            f"certificate: config {result.certificate.config}, code {result.certificate.code}, torch {result.certificate.torch}, "
            f"logs {result.certificate.logs}",
        ]
    else:
        count = len(verdict.findings)
        lines.append(f"NOT SOUND: {count} problem{'s' if count > 1 else ''}, first divergent first")
        lines += [f"{number}. {finding}" for number, finding in enumerate(verdict.findings[:FINDINGS_SHOWN], 1)]
        if count > FINDINGS_SHOWN:
            lines.append(f"and {count - FINDINGS_SHOWN} more in the report")
    lines += [f"limits: {' '.join(limits_of(result)[:NUM_LIMITS_SHOWN])}", f"report: {out / REPORT}"]
    return "\n".join(lines)


def limits_of(result: Preflight) -> list[str]:
    """What this rehearsal cannot say."""
    inferred = []
    if result.rehearsed.num_inferred:
        inferred.append(
            "ranks that were inferred would have answered every question to their coordinates as one that ran; what a coordinate "
            "decides as data (an offset, an index) was run on first, inner and last ranks only (--all-ranks runs all)"
        )
    if result.rehearsed.num_actions_inferred:
        inferred.append(
            "microbatches that were inferred are taken to do what two others of their phase of the schedule did "
            "(--all-microbatches runs all)"
        )
    said = [f"Inferred: {'; '.join(inferred)}."] if inferred else []
    return [*LIMITS[:2], *said, "The run is rehearsed from its first step: reading a checkpoint is not.", *LIMITS[2:]]


NUM_LIMITS_SHOWN = 4
"""In the terminal; the page has all."""


def rules_in_words(result: Preflight) -> str:
    """Under which rules the job ends."""
    names = {
        "one at a time": "with one call at a time on each rank",
        "nccl": "under NCCL's rule (rendezvous, in-order streams)",
        "gloo": "under gloo's",
    }
    return ", ".join(names[str(rule)] for rule, passes in result.verdict.passes.items() if passes)


def write_files(result: Preflight, out: Path, options: Options) -> None:
    """The page, the certificate, and what else was asked for. UserError if they cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_report(out / REPORT, facts_of(result, options))
        if result.certificate is not None:
            write_certificate(out, result.certificate)
        if options.trace is not None:
            write_trace(options.trace, result.rehearsed.job)
        if options.json_file is not None:
            write_json(options.json_file, as_json(result))
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; change --out, or run_root") from error


def facts_of(result: Preflight, options: Options) -> ReportFacts:
    """What the page says."""
    config, rehearsed, verdict = result.config, result.rehearsed, result.verdict
    model, parallel, shape = config.model, config.parallel, rehearsed.job.shape
    num_ranks = shape.num_ranks
    gpus_per_node = min(options.gpus_per_node, num_ranks)
    proved = []
    if verdict.ok:
        proved = [
            f"{verdict.num_collectives:,} collectives in {verdict.num_groups:,} groups: same order, operation, dtype and count on "
            "every member",
            f"{verdict.num_messages:,} messages: each exchange meets its partner's mirror image, nothing is left over",
            f"the job ends {rules_in_words(result)}; {verdict.num_simulated:,} ranks stood for all",
        ]
    certificate = {} if result.certificate is None else _in_words(result.certificate)
    return ReportFacts(
        name=config.name,
        job=rehearsed.job,
        num_nodes=-(-num_ranks // gpus_per_node),
        gpus_per_node=gpus_per_node,
        device_kind=options.device_kind,
        problems=verdict.findings,
        certificate=certificate,
        proved=proved,
        summary={
            "model": f"{model.architecture}, {model.num_layers} layers, hidden {model.hidden_size:,}",
            "layout": f"pipeline {shape.pp} ({parallel.schedule}) x data {shape.dp} x tensor {shape.tp}"
            + (", sequence parallel" if parallel.sequence else ""),
            "ZeRO": str(parallel.zero_stage),
            "global batch": f"{config.train.global_batch_size:,} samples of {config.data.sequence_length:,} tokens",
            "microbatches": f"{config.num_microbatches(num_ranks):,} of {config.train.micro_batch_size}",
        },
        config_text=to_yaml(config),
        num_actions_run=rehearsed.num_actions_run,
        num_actions_inferred=rehearsed.num_actions_inferred,
        seconds=result.seconds,
        warnings=result.warnings,
        limits=limits_of(result),
    )


def _in_words(certificate: Certificate) -> dict[str, str]:
    values = {**asdict(certificate), "rules": ", ".join(certificate.rules)}
    return {name.replace("_", " "): str(value) for name, value in values.items()}


def as_json(result: Preflight) -> dict[str, Any]:
    """The same for other programs."""
    rehearsed, verdict = result.rehearsed, result.verdict
    return {
        "ok": verdict.ok,
        "world_size": rehearsed.job.num_ranks,
        "ranks_run": len(rehearsed.ran),
        "ranks_inferred": rehearsed.num_inferred,
        "microbatch_passes_run": rehearsed.num_actions_run,
        "microbatch_passes_inferred": rehearsed.num_actions_inferred,
        "seconds": result.seconds,
        "calls": verdict.num_calls,
        "collectives": verdict.num_collectives,
        "messages": verdict.num_messages,
        "groups": verdict.num_groups,
        "findings": [{"kind": f.kind, "text": str(f), "culprits": list(f.culprits)} for f in verdict.findings],
        "warnings": list(result.warnings),
        "certificate": None if result.certificate is None else asdict(result.certificate),
    }
