"""The result of `bench kernels` for people: a table, what is missing, and which bodies to take."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from megatronish.bench.kernel_shapes import describe
from megatronish.config_kernels import KernelsConfig

Row = dict[str, Any]


def groups(result: dict[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    """(op, dims, pass) in words, and its rows."""
    for (op, dims, which), rows in groupby(result["rows"], key=lambda row: (row["op"], describe(row["dims"]), row["pass"])):
        yield f"{op} {which}, {dims}", list(rows)


def render(result: dict[str, Any]) -> Table:
    """For people: of each op and size the fastest first."""
    limits = result["limits"]
    rates = ", ".join(
        f"{name} {limits[key]:#,.3g} {unit}"
        for name, key, unit in (
            ("matrix products", "matrix_tflops", "TFLOP/s"),
            ("copy", "copy_gigabytes_per_second", "GB/s"),
        )
        if limits[key] is not None
    )
    title = (
        f"{result['device']}, {result['dtype']}, shapes {result['shapes']}, {result['date']}; limits: {rates}; "
        f"medians of {result['rounds']} interleaved rounds; error in units of what is allowed"
    )
    table = Table("implementation", title=title, title_justify="left", caption=_caption(result), caption_justify="left")
    for column in ("ms", "TFLOP/s", "GB/s", "of limit", "torch / it", "extra MiB", "error"):
        table.add_column(column, justify="right")
    for name, rows in groups(result):
        shown = [row for row in rows if row["milliseconds"] is not None or row["status"] == "WRONG"]
        if not shown:
            continue
        bound = shown[0]["bound"]
        table.add_section()
        table.add_row(Text.assemble((name, "bold"), f" ({bound} bound)" if bound else ""))
        for row in sorted(shown, key=lambda row: row["milliseconds"] or float("inf")):
            table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    error = "-" if row["error"] is None else f"{row['error']:.2g}"
    if row["status"] == "WRONG":
        return [f"  {row['implementation']}", "WRONG", *["-"] * 5, error if row["error"] is not None else row["reason"]]
    extra, torch = row["extra_bytes"], row["times_torch"]
    return [
        f"  {row['implementation']}" + (" (limit)" if row["kind"] == "limit" else ""),
        f"{row['milliseconds']:.3f}",
        f"{row['tflops']:.3g}",
        significant(row["gigabytes_per_second"]),
        significant(row["fraction_of_limit"]),
        "-" if torch is None else significant(torch),
        "n/a" if extra is None else f"{extra / 2**20:,.0f}",
        error,
    ]


def significant(value: float) -> str:
    """Three digits, and all of what is above 999."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def is_busy(load: float, cores: int | None) -> bool:
    """Whether others use the machine: a load average of more than half its cores. Results before 2026-11-27 have no `cores`."""
    return cores is not None and load > cores / 2


def _caption(result: dict[str, Any]) -> str:
    """What is not in the table, and why."""
    lines = []
    if result["device_kind"] == "cpu":
        if is_busy(result["load"], result.get("cores")):
            lines.append(f"the machine is busy (load {result['load']:.1f} on {result['cores']} cores): these numbers mean little")
        lines.append(
            f"on CPU nothing empties the caches: what fits into them may be above the rate of a copy; load {result['load']:.1f}"
        )
    for item in result["missing"]:
        lines.append(f"not run: {item['implementation']}: {item['reason']} ({', '.join(item['ops'])})")
    if result["asked"]:
        lines.append(f"not run unless --impl names them: {', '.join(result['asked'])}")
    if result["left_out"]:
        lines.append(f"out of time, left out: {'; '.join(result['left_out'])}")
    return "\n".join(lines).replace("[", "\\[")


def fastest(result: dict[str, Any]) -> dict[str, str]:
    """By op, our body with the least time over all its sizes and passes, of those that did them all."""
    found = {}
    for op, rows in groupby(result["rows"], key=lambda row: row["op"]):
        totals: dict[str, float] = {}
        done: dict[str, int] = {}
        all_rows = [row for row in rows if row["kind"] == "body"]
        for row in all_rows:
            if row["milliseconds"] is not None:
                totals[row["implementation"]] = totals.get(row["implementation"], 0.0) + row["milliseconds"]
                done[row["implementation"]] = done.get(row["implementation"], 0) + 1
        most = max(done.values(), default=0)
        whole = {name: total for name, total in totals.items() if done[name] == most}
        if whole:
            found[op] = min(whole, key=lambda name: whole[name])
    return found


def faster_peers(result: dict[str, Any]) -> dict[str, tuple[str, float]]:
    """By op, where one is faster than `fastest` over all that both did: (the peer with the largest factor, the factor)."""
    found = {}
    for op, body in fastest(result).items():
        times: dict[str, dict[str, float]] = {}
        for row in result["rows"]:
            if row["op"] == op and row["milliseconds"] is not None and (row["kind"] == "peer" or row["implementation"] == body):
                times.setdefault(row["implementation"], {})[f"{row['pass']} {row.get('dims')}"] = row["milliseconds"]
        ours = times.pop(body)
        factors = {
            name: sum(ours[case] for case in done if case in ours) / sum(ms for case, ms in done.items() if case in ours)
            for name, done in times.items()
            if done.keys() & ours.keys()
        }
        if factors and max(factors.values()) > 1:
            found[op] = max(factors.items(), key=lambda item: item[1])
    return found


def summary(result: dict[str, Any]) -> list[str]:
    """Lines that answer which kernel to use; and what was wrong."""
    found, peers = fastest(result), faster_peers(result)
    lines = ["fastest of ours: " + ", ".join(f"{op} {name}" for op, name in found.items())] if found else []
    if peers:
        lines[0] += "; a peer is faster in: " + ", ".join(
            f"{op} ({name}, {significant(factor)} x)" for op, (name, factor) in peers.items()
        )
    keys = KernelsConfig.model_fields
    chosen = {_key(op): name for op, name in reversed(found.items()) if _key(op) in keys}
    if chosen and result["device_kind"] == "cuda":
        settings = " ".join(f"kernels.{key}={name}" for key, name in sorted(chosen.items()))
        lines.append(f"`auto`, the default, measures each run's own sizes; to force these: {settings}")
    return lines + [f"WRONG: {name}" for name in result["wrong"]]


def _key(op: str) -> str:
    """The key of a config's `kernels`."""
    return (
        op.partition("_")[0]
        if op.startswith(("attention", "adamw"))
        else {
            "optimizer_step": "adamw",
            "linear_cross_entropy": "cross_entropy",
        }.get(op, op)
    )
