"""A result of the suite for people: a table a part, and lines that answer which kernel to use and how far it is from the limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from megatronish.bench import tables
from megatronish.bench.tables import Parts

Result = dict[str, Any]


def failure(part: Result) -> Parts:
    """What a part that failed, or was left out, says."""
    if "skipped" in part:
        return [f"skipped: {part['skipped']}"]
    return [f"failed after {part.get('part_seconds', 0.0):.0f} s: {part['error']}"] if "error" in part else []


def summary(result: Result) -> list[str]:
    """What to take from it, a line each."""
    parts, lines = result["parts"], ["== which kernel, and how far from the limit"]
    for name in ("kernels", "adamw", "unproven"):
        lines += _fastest_rows(parts.get(name, {}))
    for name, row in parts.get("training", {}).get("models", {}).items():
        if "error" in row:
            lines.append(f"training {name}: failed: {row['error']}")
            continue
        if row.get("shrunk"):
            lines.append(f"training {name}: {_shrunk(row)}")
            continue
        mfu = row["mfu"]["megatronish"]
        lines.append(
            f"training {name}: {row['tokens_per_second']['megatronish']:,.0f} tokens/s, {row['ratio']:.3g} x the Hugging Face "
            f"model's; {row['fraction_of_matrix_rate']['megatronish']:.3g} of the matrix rate"
            + ("" if mfu is None else f", MFU {mfu:.3g} of the published peak")
        )
    failed = [f"{name}: {part['error']}" for name, part in parts.items() if "error" in part]
    return lines + [f"failed: {line}" for line in failed]


def _shrunk(row: Result) -> str:
    """Of a model that a CPU has seconds for: that it runs."""
    rates = ", ".join(f"{name} {rate:,.4g} tokens/s" for name, rate in row["tokens_per_second"].items())
    return f"{rates}: it runs; the numbers say nothing of the model"


def _fastest_rows(part: Result) -> Iterator[str]:
    """Of each case of `bench kernels`: our fastest body, its share of the limit, and the fastest of the others."""
    cases: dict[tuple[str, str, str], list[Result]] = {}
    for row in part.get("rows", []):
        if row["milliseconds"] is not None and row["status"] == "ok":
            dims = " ".join(f"{name} {size}" for name, size in row["dims"].items())
            cases.setdefault((row["op"], row["pass"], dims), []).append(row)
    for (op, which, dims), rows in cases.items():
        ours, others = ([row for row in rows if (row["kind"] == "body") == of_ours] for of_ours in (True, False))
        others = [row for row in others if row["kind"] == "peer"]
        if not ours:
            continue
        best = min(ours, key=lambda row: row["milliseconds"])
        line = f"{op} {which} ({dims}): {best['implementation']}, {best['milliseconds']:.3g} ms, "
        line += f"{best['fraction_of_limit']:.3g} of the limit"
        if others:
            peer = min(others, key=lambda row: row["milliseconds"])
            line += f"; {peer['implementation']} takes {peer['milliseconds'] / best['milliseconds']:.3g} x as long"
        yield line


def limits(part: Result) -> Parts:
    """Of the part `limits`."""
    table = Table("limit", "measured", "published")
    for dtype, rate in part["matrix_tflops"].items():
        published = part["published_tflops"][dtype]
        table.add_row(f"matrix products, {dtype}", f"{rate:.4g} TFLOP/s", "-" if published is None else f"{published:g} TFLOP/s")
    copy, launch = part.get("copy_gigabytes_per_second"), part.get("launch_microseconds")
    if copy is not None:
        table.add_row(f"copy of {part['copy_bytes'] / 2**20:.0f} MiB, read and written", f"{copy:,.1f} GB/s", "-")
    if launch is not None:
        table.add_row("host: one small operation", f"{launch:.2f} us", "-")
    return [table]


def training(part: Result) -> Parts:
    """Of the part `training`: the table of `bench step` for each model."""
    parts: Parts = []
    for name, row in part["models"].items():
        said = f"failed: {row['error']}" if "error" in row else f"{row['parameters'] / 1e6:,.4g} M parameters"
        parts.append(f"{name}: {said}")
        if row.get("shrunk"):
            parts.append(_shrunk(row))
        elif "error" not in row:
            parts += [*tables.step(row), *row["kernels"]]
    return parts


def startup(part: Result) -> Parts:
    """Of the part `startup`."""
    table = Table("start of a process that calls every op once", "seconds", "slowest first call")
    for name, start in part["starts"].items():
        calls = start["first_call_seconds"]
        slowest = max(calls, key=lambda op: calls[op], default="")
        table.add_row(
            f"{name} cache, {part['body']}", f"{start['process_seconds']:.1f}", f"{slowest} {calls.get(slowest, 0):.2f} s"
        )
    build = part.get("native_build", {})
    seconds = f"{build['seconds']:.0f} s" if "seconds" in build else f"not measured: {build.get('reason', 'not reached')}"
    return [table, f"native build from nothing: {seconds}"]


def sanitizer(part: Result) -> Parts:
    """Of the part `sanitizer`."""
    rows = part["bodies"]
    right = sum(not row["wrong"] and not row["refused"] for row in rows)
    refused = sorted({f"{row['body']}: {row['refused']}" for row in rows if row["refused"]})
    lines: Parts = [f"{right} bodies equal the reference in float64 on their sample inputs, within roundings"]
    lines += [f"WRONG {row['op']} {row['body']} {row['dtype']}: {row['wrong']}" for row in rows if row["wrong"]]
    lines += [f"not run: {line}" for line in refused]
    return lines + [f"compute-sanitizer {name}: {row.get('error') or row['summary']}" for name, row in part["tools"].items()]
