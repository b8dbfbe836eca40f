"""The command: fold, check, show a table; exit code 1 names the first wrong parameter and what the fault needs."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatronish.comm import streams
from megatronish.comm.local_ranks import RankPool
from megatronish.config import Config
from megatronish.config_loader import load_config
from megatronish.deepspeed_settings import require_native
from megatronish.json_file import writable, write_json
from megatronish.verify.check import Check, Verdict, verify
from megatronish.verify.fold import fold
from megatronish.verify.layout_run import world_size_of
from megatronish.verify.narrow import AXES

PRELOAD = ("megatronish.verify.preload",)


def main(config_path: str, overrides: list[str], world_size: int | None, max_ranks: int, json_file: str | None) -> int:
    """Verify a config; the exit code. UserError for a config that is wrong in itself."""
    json_path = None if json_file is None else writable(Path(json_file))
    config = load_config(config_path, overrides, world_size=world_size)
    require_native(config, "verify")
    folded = fold(config, max_ranks=max_ranks, world_size=world_size)
    # The model is small: more threads only wait for each other, ten times as long as they compute on a busy machine.
    streams.set_numerics(cpu_threads=1, deterministic=False)
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=160)
    console.print(describe(config, folded), soft_wrap=True)
    with RankPool(preload=PRELOAD) as pool, console.status("starting ranks") as status:
        verdict = verify(folded, pool, tell=status.update if console.is_terminal else console.print)
    console.print(table(verdict.checks))
    console.print(conclusion(verdict), soft_wrap=True, markup=False)
    if json_path is not None:
        write_json(json_path, as_json(verdict))
    return 0 if verdict.ok else 1


def describe(config: Config, folded: Config) -> str:
    """What is run in place of what."""
    full, small, model = config.parallel, folded.parallel, folded.model
    microbatches = folded.num_microbatches(world_size_of(folded))
    return (
        f"{config.name}: tensor {full.tensor} x pipeline {full.pipeline} x data {full.data or 'any'}, folded to "
        f"{small.tensor} x {small.pipeline} x {small.data} on {world_size_of(folded)} local processes; a {model.architecture} of "
        f"{model.num_layers} layers and {model.num_heads} heads; {microbatches} microbatches, {small.schedule}, "
        f"ZeRO {small.zero_stage}"
    )


def table(checks: list[Check]) -> Table:
    """A row for each kind of thing that was compared."""
    shown = Table("what", "compared", "largest error", "allowed", "of", "")
    for check in checks:
        assert check.worst is not None
        verdict = "[green]ok[/green]" if check.first_wrong is None else "[bold red]WRONG[/bold red]"
        error, allowed = f"{check.worst.error:.1e}", f"{check.tolerance:.0e}"
        shown.add_row(check.name, str(check.compared), error, allowed, check.worst.what, verdict)
    return shown


def conclusion(verdict: Verdict) -> str:
    """One line when all is well; else what is wrong first, and what the fault needs."""
    if verdict.ok:
        return "the layout computes what one process computes"
    lines = []
    if verdict.first_wrong is not None:
        lines.append(f"first wrong: {verdict.first_wrong.what}, off by {verdict.first_wrong.error:.1e}")
    if verdict.crash is not None:
        lines.append(verdict.crash.rstrip())
    lines.append(likely(verdict))
    return "\n".join(lines)


def likely(verdict: Verdict) -> str:
    """The likely axis, and the settings that the fault was not seen without."""
    axes = [key for key, _ in verdict.left if key.removeprefix("parallel.") in AXES]
    settings = ", ".join(f"{key}={_yaml(value)}" for key, value in verdict.left)
    if not axes:
        where = "not the layout: one process of the trainer differs from plain PyTorch too"
        return f"likely: {where}" + (f", with {settings}" if settings else "")
    return f"likely axis: {' with '.join(axes)}; the fault needs {settings}, and goes away without any one of them"


def _yaml(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def _check_as_json(check: Check) -> dict[str, object]:
    return {name: value for name, value in asdict(replace(check, made_by=None)).items() if name != "made_by"}


def as_json(verdict: Verdict) -> dict[str, object]:
    """The same for other programs."""
    return {
        "ok": verdict.ok,
        "folded": verdict.folded.model_dump(mode="json"),
        "checks": [_check_as_json(check) for check in verdict.checks],
        "crash": verdict.crash,
        "needs": dict(verdict.left),
    }
