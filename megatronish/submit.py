"""`megatronish submit CONFIG --nodes N`: what can be known before is checked, then launch/slurm/pretrain.sbatch is queued with its
values filled in, to run from a copy of the code in the run folder."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import megatronish
from megatronish.config import Config
from megatronish.config_loader import load_config, to_yaml
from megatronish.constraints import warnings
from megatronish.deepspeed_settings import check_engine
from megatronish.errors import UserError
from megatronish.json_file import write_json
from megatronish.preflight.certificate import find_certificate
from megatronish.run_folder import COMMIT_FILE, RunFolder, commit_of_code

JOB_FILE = "job.json"
"""In RUN/submit: the job's number, for `megatronish status`."""
_MARK = "# `megatronish submit` puts its own values here.\n"


@dataclass(frozen=True)
class Request:
    """What the command line says."""

    nodes: int
    gpus_per_node: int = 8
    cpus_per_gpu: int = 8
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    exclude: str | None = None
    spares: int = 0
    """More nodes, which the ranks leave free until one is lost."""
    options: tuple[str, ...] = ()
    device_kind: Literal["cuda", "cpu"] = "cuda"
    preflight: bool = True
    dry_run: bool = False

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def directives(self, name: str, log: Path) -> dict[str, str | None]:
        """Options of sbatch; None: without a value."""
        found: dict[str, str | None] = {
            "job-name": name,
            "nodes": str(self.nodes + self.spares),
            "ntasks-per-node": str(self.gpus_per_node),
            "gpus-per-node": str(self.gpus_per_node if self.device_kind == "cuda" else 0),
            "cpus-per-task": str(self.cpus_per_gpu),
            "time": self.time,
            "output": str(log),
        }
        if self.spares:  # the allocation outlives a node
            found["no-kill"] = None
        found |= {key: value for key in ("partition", "account", "exclude") if (value := getattr(self, key)) is not None}
        for option in self.options:
            key, equals, value = option.removeprefix("--").partition("=")
            if not option.startswith("--") or not re.fullmatch(r"[a-z][a-z-]*", key) or "\n" in value:
                raise UserError(f"--sbatch {option}: must be a long option of sbatch such as --reservation=NAME")
            found[key] = value if equals else None
        if (seconds := seconds_of(self.time)) is not None and seconds < 4 * SIGNAL_SECONDS:
            found.setdefault("signal", f"B:USR1@{max(60, seconds // 4)}")
        return found


SIGNAL_SECONDS = 600
"""So long before its time limit the template lets a job be told."""


def seconds_of(limit: str) -> int | None:
    """A time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None for one that has no number, such as UNLIMITED."""
    days, dash, rest = limit.rpartition("-")
    numbers = rest.split(":")
    if len(numbers) > 3 or not all(number.isdecimal() for number in [*numbers, *([days] if dash else [])]):
        return None
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(unit * int(number) for unit, number in zip(units, numbers, strict=False))


def main(config_path: str, overrides: list[str], request: Request) -> int:
    """Check, rehearse, copy, queue; the exit code. UserError for what is wrong with the config, the options, or with Slurm."""
    template = find_template()
    config = load_config(config_path, overrides, world_size=request.world_size)
    folder = RunFolder.of(config)
    check_engine(config, request.world_size)
    folder.check_belongs_to(config)
    for line in warnings(config, request.world_size):
        print(f"warning: {line}", file=sys.stderr)
    for missing in config.data.missing_files():
        print(f"warning: {missing} is not on this machine; every node of the job must see it", file=sys.stderr)
    wanted = request.preflight and config.parallel.zero_engine == "native"
    if request.preflight and not wanted:
        print("preflight: skipped, since it does not know what DeepSpeed's engine communicates", file=sys.stderr)
    if wanted and not certified(config, folder, request) and not rehearse(config_path, overrides, request):
        return 1
    stamp = time.strftime("%Y%m%d-%H%M%S")
    home = folder.path.absolute() / "submit" / stamp
    variables = {"PYTHON": sys.executable, "MEGATRONISH_HOME": str(Path.cwd()), "MEGATRONISH_CODE": str(home / "code")}
    if request.spares:
        variables["SPARES"] = str(request.spares)
    directives = request.directives(config.name, folder.path.absolute() / "logs" / "job-%j.log")
    script = render(template, directives, variables, [str(home / "config.yaml")])
    if request.dry_run:
        print(script, end="")
        return test_only(script)
    require_no_job(folder.path)
    folder.prepare(config)
    copy_code(home / "code")
    (home / "config.yaml").write_text(to_yaml(config))
    (home / "pretrain.sbatch").write_text(script)
    job = queue(home / "pretrain.sbatch")
    write_json(home.parent / JOB_FILE, {"job": job, "submitted": stamp, "nodes": request.nodes, "world_size": request.world_size})
    log = directives["output"]
    spares = f" and {request.spares} spare" if request.spares else ""
    print(f"job {job}: {config.name}, {request.world_size:,} ranks on {request.nodes} nodes{spares}, code and config in {home}")
    print(f"watch: squeue -j {job}; megatronish status {folder.path}; tail -F {str(log).replace('%j', job)}")
    return 0


@dataclass(frozen=True)
class SubmittedJob:
    """A job that `submit` has put in the queue."""

    number: str
    nodes: int | None
    """That its ranks take."""
    when: float
    """Seconds since 1970."""


def submitted_job(run: Path) -> SubmittedJob | None:
    """The last one of a run, or None."""
    file = run / "submit" / JOB_FILE
    try:
        said = json.loads(file.read_text())
        return SubmittedJob(str(said["job"]), said.get("nodes"), file.stat().st_mtime)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def require_no_job(run: Path) -> None:
    """UserError if the job that was last submitted for this run is not over."""
    if (job := submitted_job(run)) is None:
        return
    with contextlib.suppress(OSError):
        done = subprocess.run(["squeue", "-h", "-j", job.number, "-o", "%T"], capture_output=True, text=True, check=False)
        if state := done.stdout.strip():
            raise UserError(
                f"job {job.number} of this run is {state}: a run has one job at a time; scancel {job.number}, or give another name="
            )


def certified(config: Config, folder: RunFolder, request: Request) -> bool:
    """Whether this job, with this code, was rehearsed before and found sound."""
    kind = request.device_kind
    certificate = find_certificate(folder.path / "preflight", config, world_size=request.world_size, device_kind=kind)
    if certificate is None:
        return False
    print(f"preflight: has a certificate of {certificate.date} for this config and this code", file=sys.stderr)
    return True


def rehearse(config_path: str, overrides: Sequence[str], request: Request) -> bool:
    """Run the preflight; whether the job is sound."""
    from megatronish.preflight import command

    options = command.Options(nodes=request.nodes, gpus_per_node=request.gpus_per_node, device_kind=request.device_kind)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the script, with --dry-run
        return command.main(config_path, list(overrides), options) == 0


def find_template() -> str:
    """launch/slurm/pretrain.sbatch of the checkout that this code is of."""
    path = checkout() / "launch/slurm/pretrain.sbatch"
    try:
        return path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): submit from a checkout, installed with pip install -e .") from None


def checkout() -> Path:
    """The folder that holds the package."""
    return Path(megatronish.__file__).resolve().parents[1]


def render(template: str, directives: Mapping[str, str | None], variables: Mapping[str, str], arguments: Sequence[str]) -> str:
    """The template with its `#SBATCH` lines replaced or added to, with variables set, and `arguments` where it is given none."""
    head, mark, body = template.partition(_MARK)
    assert mark, "the template has no place for values"
    left, lines = dict(directives), []
    for line in head.splitlines():
        match = re.match(r"#SBATCH --([a-z-]+)", line)
        if match and match[1] in left:
            line = _directive(match[1], left.pop(match[1]))
        lines.append(line)
    last = max(place for place, line in enumerate(lines) if line.startswith("#SBATCH "))
    lines[last + 1 : last + 1] = [_directive(*item) for item in left.items()]
    values = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    values.append(f"[ $# -ge 1 ] || set -- {shlex.join(arguments)}")
    return "\n".join([*lines, *values, body])


def _directive(key: str, value: str | None) -> str:
    return f"#SBATCH --{key}" if value is None else f"#SBATCH --{key}={shlex.quote(value)}"


def copy_code(target: Path) -> None:
    """The package, native parts too, launch/, and which commit it is."""
    root, commit = checkout(), commit_of_code()
    for name in ("megatronish", "launch"):
        shutil.copytree(root / name, target / name)  # with what Python has compiled: not every rank must do that again
    if commit is not None:
        (target / COMMIT_FILE).write_text(f"{commit}\n")


def test_only(script: str) -> int:
    """Ask the controller whether the job could run, and when; the exit code."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch") as file:
        file.write(script)
        file.flush()
        done = _sbatch("--test-only", file.name)
    print(done.stderr.strip(), file=sys.stderr)
    return 1 if done.returncode else 0


def queue(script: Path) -> str:
    """Submit; the job's number."""
    done = _sbatch("--parsable", str(script))
    if done.returncode != 0:
        raise UserError(f"sbatch refuses {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def _sbatch(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["sbatch", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("there is no sbatch on this machine: run this on a login node of the cluster") from None
