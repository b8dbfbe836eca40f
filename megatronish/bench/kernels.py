"""`megatronish bench kernels`: every body of every op, and every peer that is installed, against float64, the clock and the limit.

A contender first does the case, or a smaller one of the same kind where float64 would not fit, and is compared with the reference
by the rule that dispatch.py admits by; one that is off is shown as WRONG and not timed. The others take turns, in every round each
as often as its length allows; so do a matrix product and a copy, which are the limits. All numbers are medians over rounds.

    result  bench, device, device_kind, threads, dtype, shapes, rounds, load, date, versions, limits, rows,
            missing (what did not run, and why), left_out (cases, for lack of time), wrong (bodies), asked (contenders that run only
            where --impl names them)
    row     op, dims, pass, implementation, kind (body, peer, limit), status (ok, WRONG, refused, failed), reason, error,
            milliseconds, tflops, gigabytes_per_second, fraction_of_limit, bound, times_torch, extra_bytes
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatronish import __version__
from megatronish.bench import kernel_peers
from megatronish.bench.kernel_case import Case, run_case
from megatronish.bench.kernel_ops import OPS
from megatronish.bench.kernel_peers import Contender
from megatronish.bench.kernel_plots import plot
from megatronish.bench.kernel_shapes import DIMENSIONS, default_shapes, describe, shapes_of
from megatronish.bench.kernel_table import render, summary
from megatronish.bench.limits import Limits
from megatronish.bench.workers import processor_name
from megatronish.comm import stopwatch, streams
from megatronish.errors import UserError
from megatronish.kernels.registry import only_by_name
from megatronish.observe.flops import num_cores
from megatronish.packages import find_package

__all__ = ["DTYPES", "KernelsBench", "measure", "plot", "render", "summary"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PACKAGES = {"flash_attn": "flash-attn", "liger_kernel": "liger-kernel", "megatron": "megatron-core"}


@dataclass(frozen=True)
class KernelsBench:
    """What is measured. Empty `ops` or `impls`: all, but for those that take minutes on this device (kernel_peers.ASKED_ON_...)."""

    ops: Sequence[str] = ()
    impls: Sequence[str] = ()
    shapes: str = ""
    """A preset or a file; by default the preset of the device."""
    dtype: str = ""
    """Of DTYPES; by default bf16 on a GPU and fp32 on CPU, where few processors can do 16 bits."""
    rounds: int = 7
    device: torch.device | None = None
    """By default the GPU where there is one."""
    tutorial: Path | None = None
    """Triton's 06-fused-attention.py."""


def measure(
    bench: KernelsBench,
    on_case: Callable[[str, int, int], object] = lambda name, done, total: None,
    *,
    seconds: float | None = None,
    on_result: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:
    """Run the bench. `on_case`: (the case that begins, cases done, of how many); `on_result`: what is known after each. After
    `seconds` no case is begun; the result says which were left out. UserError before anything runs where an op, an
    implementation, shapes or the dtype make no sense."""
    started = time.monotonic()
    device = bench.device or streams.choose_device(0, 1)
    cases, asked = _cases(bench, device)
    dtype = cases[0].dtype
    limits = Limits(dtype, device)
    watch = stopwatch.Stopwatch(device)
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    load = os.getloadavg()[0]

    def found() -> dict[str, Any]:
        fixed = {"dtype": _name_of(dtype), "shapes": bench.shapes or default_shapes(device), "rounds": bench.rounds, "load": load}
        return {**_device(device), **fixed, "limits": limits.summary(), **_of_rows(rows), "left_out": left_out, "asked": asked}

    for number, case in enumerate(cases):
        name = f"{case.op.name} {describe(case.dims)}"
        if seconds is not None and time.monotonic() - started > seconds:
            left_out.append(name)
            continue
        on_case(name, number, len(cases))
        rows += run_case(case, rounds=bench.rounds, limits=limits, watch=watch)
        stopwatch.free_cached_memory(device)
        on_result(found())
    on_case("", len(cases), len(cases))
    return found()


def _device(device: torch.device) -> dict[str, Any]:
    on_cpu = device.type == "cpu"
    return {
        "bench": "kernels",
        "device": processor_name() if on_cpu else streams.device_name(device),
        "device_kind": device.type,
        "threads": torch.get_num_threads() if on_cpu else None,
        "cores": num_cores() if on_cpu else None,
        "date": time.strftime("%Y-%m-%d"),
        "versions": _versions(),
    }


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, of in DTYPES.items() if of == dtype)


def _of_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = [row for row in rows if row["status"] == "WRONG" and row["kind"] == "body"]
    return {
        "rows": rows,
        "missing": _missing(rows),
        "wrong": [f"{row['op']} {row['pass']}: {row['implementation']}" for row in wrong],
    }


def require_named(impls: Sequence[str], result: dict[str, Any]) -> None:
    """UserError where one that --impl names ran in no case."""
    for name in impls:
        mine = [row for row in result["rows"] if row["implementation"] == name]
        if mine and all(row["status"] in ("refused", "failed") for row in mine):
            raise UserError(f"--impl {name}: cannot run here: {mine[0]['reason']}; leave it out")


def _cases(bench: KernelsBench, device: torch.device) -> tuple[list[Case], list[str]]:
    """(the cases, the contenders that run only where --impl names them)."""
    name = bench.dtype or ("bf16" if device.type == "cuda" else "fp32")
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: use one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    if unknown := [name for name in bench.ops if name not in OPS]:
        raise UserError(f"--op {unknown[0]}: no such op; ops are {', '.join(OPS)}")
    shapes = shapes_of(bench.shapes or default_shapes(device))
    if bare := [name for name in bench.ops if name not in shapes]:
        raise UserError(f"--op {bare[0]}: {bench.shapes} has no sizes of it; add {bare[0]}: {{{', '.join(DIMENSIONS[bare[0]])}}}")
    contenders = {name: op.contenders() for name, op in OPS.items() if name in shapes and name in (bench.ops or OPS)}
    if bench.tutorial is not None and "attention" in contenders:
        contenders["attention"].append(kernel_peers.tutorial(bench.tutorial))
    known = list(dict.fromkeys(c.name for of_op in contenders.values() for c in of_op))
    if strange := [name for name in bench.impls if name not in known]:
        raise UserError(f"--impl {strange[0]}: these ops have no such implementation; they have {', '.join(known)}")
    asked = [] if bench.impls else list(kernel_peers.ASKED_ON_CPU if device.type == "cpu" else kernel_peers.ASKED_ON_GPU)
    if not bench.impls:
        asked += only_by_name(choice for op in contenders for choice in OPS[op].choices)

    def runs(contender: Contender) -> bool:
        return contender.is_limit or (contender.name in bench.impls if bench.impls else contender.name not in asked)

    cases = [
        Case(OPS[name], dims, dtype, device, tuple(c for c in of_op if runs(c)))
        for name, of_op in contenders.items()
        for dims in shapes[name]
    ]
    cases = [case for case in cases if any(not c.is_limit for c in case.contenders)]
    return cases, [name for name in asked if name in known]


def _missing(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of what did not run: implementation, reason, and the ops that it stands for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["status"] in ("refused", "failed"):
            ops = found.setdefault((row["implementation"], row["reason"]), [])
            if row["op"] not in ops:
                ops.append(row["op"])
    return [{"implementation": name, "reason": reason, "ops": ops} for (name, reason), ops in found.items()]


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str | None:
        if find_package(package) is None and package != "megatron":  # which is a namespace
            return None
        try:
            return version(_PACKAGES.get(package, package))
        except PackageNotFoundError:
            return None

    return {
        "megatronish": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cuda": stopwatch.toolkit_version(),
        **{_PACKAGES.get(package, package): of(package) for package in kernel_peers.PACKAGES},
    }
