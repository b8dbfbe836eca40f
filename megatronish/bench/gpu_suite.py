"""`python -m megatronish.bench.gpu_suite`: all that one GPU can be asked, in one command, within nine minutes.

    describe -> limits -> kernels -> training -> adamw -> startup -> sanitizer -> unproven -> table, and RESULTS/DEVICE-DATE.json
                (each part is a process of its own, with its share of the time that is left)

A part that crashes or hangs is recorded with its error and what it had done, and the rest goes on; the file is written after each
part. `--device cpu` runs the same code at small sizes, and writes to the current folder. `megatronish bench show FILE` prints a
result. Exit code 1: a part failed; 2: there is no such device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatronish.errors import BAD_INPUT, UserError
from megatronish.json_file import writable, write_json

RESULTS = Path(__file__).parent / "results"
_DESCRIBE_SECONDS = 60.0


@dataclass(frozen=True)
class Part:
    """One part of the suite."""

    target: str
    """module:function, which suite_part.py calls."""
    weight: float
    """Its share of the time, against those that are still to come."""


PARTS: dict[str, Part] = {
    "limits": Part("megatronish.bench.suite_parts:limits", 30),
    "kernels": Part("megatronish.bench.suite_parts:kernels", 130),
    "training": Part("megatronish.bench.suite_parts:training", 280),
    "adamw": Part("megatronish.bench.suite_parts:adamw", 40),
    "startup": Part("megatronish.bench.suite_parts:startup", 50),
    "sanitizer": Part("megatronish.bench.suite_parts:sanitizer", 50),
    "unproven": Part("megatronish.bench.suite_parts:unproven", 20),
}
"""In this order: what a first look needs comes first."""


@dataclass(frozen=True)
class Suite:
    """What is run."""

    parts: Mapping[str, Part]
    device_kind: str
    """cuda, cpu, or auto: the GPU where there is one."""
    seconds: float
    file: Path | None
    """None: DEVICE-DATE.json, of a GPU in RESULTS, else in the current folder."""


def run_suite(suite: Suite, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Run all parts; the file, and what is in it. UserError, before anything is measured, where there is no such device."""
    begun = time.monotonic()
    said = run_part("megatronish.bench.suite_parts:describe", suite.device_kind, _DESCRIBE_SECONDS, tell)
    if "error" in said:
        raise UserError(said["error"])
    kind = said.pop("device_kind")
    result: dict[str, Any] = {"suite": "gpu", **said, "device_kind": kind, "date": time.strftime("%Y-%m-%d"), "parts": {}}
    slug = re.sub(r"[^a-z0-9]+", "-", said["device"].lower()).strip("-")
    file = suite.file or writable((RESULTS if kind == "cuda" else Path()) / f"{slug}-{result['date']}.json")
    tell(f"{said['device']}: {', '.join(suite.parts)}; {suite.seconds / 60:.3g} minutes at most; numbers go to {file}")
    waiting = dict(suite.parts)
    for name, part in suite.parts.items():
        left = suite.seconds - (time.monotonic() - begun)
        share = left * part.weight / sum(other.weight for other in waiting.values())
        del waiting[name]
        tell(f"{name}: begins, {share:.0f} s at most")
        started = time.monotonic()
        found = run_part(part.target, kind, share, lambda line, name=name: tell(f"{name}: {line}"))  # type: ignore[misc]
        result["parts"][name] = {"bench": name, **found, "part_seconds": time.monotonic() - started}
        done = f"skipped: {found['skipped']}" if "skipped" in found else f"done in {time.monotonic() - started:.0f} s"
        tell(f"{name}: " + (f"failed: {found['error']}" if "error" in found else done))
        result["suite_seconds"] = time.monotonic() - begun
        write_json(file, result)
    return file, result


def run_part(target: str, device_kind: str, seconds: float, tell: Callable[[str], None]) -> dict[str, Any]:
    """Run one part in a process, and what it starts in that one's session; its result as far as it came, with `error` if it failed,
    or was not done after `seconds`."""
    with tempfile.TemporaryDirectory(prefix="megatronish-suite-") as folder:
        out, errors = Path(folder) / "out.json", Path(folder) / "stderr"
        command = [sys.executable, "-m", "megatronish.bench.suite_part", target, device_kind, str(out), f"{seconds:.1f}"]
        environment = {**os.environ, "TMPDIR": folder}
        if device_kind == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with open(errors, "wb") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, env=environment, start_new_session=True, text=True
            )
        assert process.stdout is not None
        reader = threading.Thread(target=_pass_on, args=(process.stdout, tell), daemon=True)
        reader.start()
        error = ""
        try:
            if code := process.wait(max(1.0, seconds)):
                error = _last_line(errors) or (f"ended with exit code {code}" if code > 0 else f"ended by signal {-code}")
        except subprocess.TimeoutExpired:
            error = f"not done after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whatever it has left behind too
            process.wait()
            reader.join(5)
        found: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
        return {**found, "error": error} if error else found


def _pass_on(lines: IO[str], tell: Callable[[str], None]) -> None:
    for line in lines:
        if line.strip():
            tell(line.rstrip())


def _last_line(file: Path) -> str:
    """Of a traceback: the exception."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def suite_of(arguments: Sequence[str]) -> Suite:
    """From the command line. UserError for a part that there is not, or a file that cannot be written."""
    parser = argparse.ArgumentParser(prog="python -m megatronish.bench.gpu_suite", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"), help="cpu: at small sizes")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything [default: 9]")
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"[default: DEVICE-DATE.json, of a GPU in {RESULTS}]")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.parts.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        raise UserError(f"--parts {unknown[0]}: no such part; there are {', '.join(PARTS)}")
    if not 0 < options.minutes <= 24 * 60:
        raise UserError(f"--minutes {options.minutes:g}: must be above 0, and at most a day")
    file = None if options.json is None else writable(options.json)
    return Suite({name: part for name, part in PARTS.items() if name in names}, options.device, options.minutes * 60, file)


def main(arguments: Sequence[str]) -> int:
    """Run it and print the tables; the exit code."""
    begun = time.monotonic()

    def tell(line: str) -> None:
        print(f"[{time.monotonic() - begun:4.0f} s] {line}", file=sys.stderr, flush=True)

    file, result = run_suite(suite_of(arguments), tell)
    # Rich and the tables are not loaded in the meantime: this process leaves the machine alone.
    from rich.console import Console

    from megatronish.bench.show import show

    console = Console(width=132)
    for shown in show(file):
        console.print(shown, highlight=False, markup=False)
    print(f"wrote {file}; `megatronish bench show {file}` prints it")
    return 1 if any("error" in part for part in result["parts"].values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        sys.exit(130)
