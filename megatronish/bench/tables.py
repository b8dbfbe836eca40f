"""Results of benches for people: what `megatronish bench` prints after a run, and `bench show` later."""

from __future__ import annotations

from typing import Any

from rich.table import Table

Parts = list[Table | str]
"""Printed one below the other."""


def startup(result: dict[str, Any]) -> Parts:
    """Seconds by phase and number of ranks."""
    rows = result["ranks"]
    title = f"seconds until the first step: the slowest rank (CPU), {result['device']}, {result['date']}"
    table = Table("phase", *(f"{size} ranks" if int(size) > 1 else "1 rank" for size in rows), "growth a rank", title=title)
    growth = result["estimate"]["seconds_a_rank"]
    for phase in next(iter(rows.values())):
        cells = (f"{of_size[phase]['most']:.2f} ({of_size[phase]['cpu']:.2f})" for of_size in rows.values())
        table.add_row(phase, *cells, f"{growth[phase] * 1000:.1f} ms" if phase in growth else "-")
    totals = (f"{sum(row['most'] for row in of_size.values()):.2f}" for of_size in rows.values())
    table.add_row("all", *totals, "")
    estimate = result["estimate"]
    return [
        table,
        f"{result['width']:,} ranks with a core each, at most: {estimate['alone']:.1f} s by themselves + "
        f"{estimate['together']:.1f} s together = {estimate['seconds']:.1f} s",
    ]


def pipeline(results: list[dict[str, Any]]) -> Parts:
    """Idle time by schedule."""
    first = results[0]
    title = f"{first['num_stages']} stages, {first['num_microbatches']} microbatches, {first['device']}, {first['date']}"
    table = Table("schedule", "idle, measured", "idle, formula", "measured / formula", "rounds", "step s", title=title)
    for row in results:
        name = row["schedule"] + (f", {row['num_chunks']} chunks" if row["num_chunks"] > 1 else "")
        spread = " ".join(f"{value:.2%}" for value in row["idle_of_all_rounds"])
        idle = (f"{row[key]:.2%}" for key in ("idle_measured", "idle_by_formula"))
        table.add_row(name, *idle, f"{row['ratio']:.3f}", spread, f"{row['step_seconds']:.2f}")
    return [table]


def checkpoint(result: dict[str, Any]) -> Parts:
    """Rates and ratios of saves and loads."""
    title = f"{result['gib']:.2f} GiB on {result['num_ranks']} processes, {result['device']}, {result['date']}"
    table = Table("variant", "median s", "GiB/s", "all s", title=title)
    for name, seconds in result["seconds"].items():
        spread = " ".join(f"{value:.2f}" for value in result["all_seconds"][name])
        table.add_row(name, f"{seconds:.3f}", f"{result['gib_per_second'][name]:.2f}", spread)
    ratios = [f"{name}: {ratio:.2f}" for name, ratio in result["ratios"].items()]
    end = f"medians of {result['rounds']} interleaved rounds; load average at the end {result['load_average']:.1f}"
    return [table, *ratios, end]


def step(result: dict[str, Any]) -> Parts:
    """Tokens a second of both; model FLOPs against the limits, where the result has them (since 2026-11-27)."""
    title = f"{result['dtype']}, {result['tokens_per_step']} tokens a step, {result['device']}, {result['date']}"
    table = Table("variant", title=title, title_justify="left")
    for column in ("tokens/s", "CPU s a step", "model TFLOP/s", "of matrix rate", "MFU", "peak GiB"):
        table.add_column(column, justify="right")
    for name, rate in result["tokens_per_second"].items():
        of = {key: result.get(key, {}).get(name) for key in ("model_tflops", "fraction_of_matrix_rate", "mfu", "peak_memory_bytes")}
        ours, peak = name == "megatronish", of.pop("peak_memory_bytes")
        threads = "" if ours or peak is not None else f", {result['peer_threads']} threads"
        table.add_row(
            f"{name}, {result['layout']}" if ours else name + threads,
            f"{rate:,.0f}",
            f"{result['cpu_seconds_per_step'][name]:.3g}",
            *("-" if value is None else f"{value:.3g}" for value in of.values()),
            "-" if peak is None else f"{peak / 2**30:.1f}",
        )
    phases = ", ".join(f"{phase} {seconds:.3g} s" for phase, seconds in result["phase_seconds"].items())
    limit = f"; matrix rate of this run {result['matrix_tflops']:.3g} TFLOP/s" if "matrix_tflops" in result else ""
    return [table, f"ratio {result['ratio']:.3f} (median of {result['rounds']} interleaved rounds){limit}", f"a step: {phases}"]


def history(result: dict[str, Any]) -> Parts:
    """The cost of a record and of a step's."""
    return [
        f"{result['microseconds_a_record']:.2f} us a record x {result['records_a_step']:.0f} records a step of "
        f"{result['cpu_seconds_a_step']:.2f} CPU s on each of {result['num_ranks']} ranks = {result['share_of_a_step']:.3%} "
        f"({result['device']})"
    ]


def preflight(result: dict[str, Any]) -> Parts:
    """Seconds of the rehearsal, and whether what it inferred is right."""
    lines: Parts = [
        f"{result['config']}, {result['layers']} layers, {result['ranks_run'] + result['ranks_inferred']:,} ranks: "
        f"{result['ranks_run']:,} run + {result['ranks_inferred']:,} inferred in {result['rehearse_seconds']:.1f} s, "
        f"{result['calls']:,} calls matched in {result['match_seconds']:.1f} s"
    ]
    if (full := result.get("in_full")) is not None:
        lines.append(
            f"in full: {full['ranks_run']:,} ranks, {full['passes_run']:,} microbatch passes in {full['rehearse_seconds']:.1f} s; "
            f"logs of all ranks {'equal' if full['equal'] else 'NOT EQUAL'}"
        )
    return lines
