"""Pictures of a result of `bench kernels`: shares of the limit, the roofline, and speed over sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatronish.bench.kernel_shapes import describe
from megatronish.bench.kernel_table import Row, groups

_COLORS = {
    "triton": "tab:blue",
    "cuda": "tab:green",
    "native": "limegreen",
    "torch": "tab:orange",
    "reference": "lightgray",
    "torch-eager": "tab:gray",
    "torch-compile": "tab:red",
    "sdpa-flash": "tab:purple",
    "sdpa-cudnn": "tab:brown",
    "flash-attn": "tab:pink",
    "liger": "tab:cyan",
    "transformer-engine": "tab:olive",
    "megatron-core": "black",
}

_WIDEST = 1.5
"""The largest share that is drawn; beyond it the bar carries its value."""


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """kernels-limit, kernels-roofline and, where an op has several sizes, kernels-sizes, each as .svg and .png in `folder`; what
    was not timed is not there. Needs matplotlib."""
    rows = [row for row in result["rows"] if row["milliseconds"] is not None and row["kind"] != "limit"]
    if not rows:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    files = _save(_shares(result), folder / "kernels-limit") + _save(_roofline(result, rows), folder / "kernels-roofline")
    if series := _series(rows):
        files += _save(_sizes(result, series), folder / "kernels-sizes")
    return files


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, stem: Path) -> list[Path]:
    files = [stem.with_suffix(suffix) for suffix in (".svg", ".png")]
    for file in files:
        figure.savefig(file)
    return files


def _title(result: dict[str, Any]) -> str:
    return f"{result['device']}, {result['dtype']}, {result['date']}"


def _shares(result: dict[str, Any]) -> Any:
    """A bar for each implementation of each case: its share of the limit."""
    bars: list[tuple[str, Row | None]] = []
    for name, rows in groups(result):
        timed = sorted((r for r in rows if r["milliseconds"] is not None and r["kind"] != "limit"), key=lambda r: r["milliseconds"])
        if timed:
            bars += [(name, None), *((f"{row['implementation']}  {row['milliseconds']:.3g} ms", row) for row in timed)]
    figure = _figure(10, 1.2 + 0.19 * len(bars))
    axes = figure.add_subplot()
    for place, (name, row) in enumerate(bars):
        if row is None:
            axes.text(0.0, place, f" {name}", va="center", fontsize=8, fontweight="bold")
        else:
            axes.barh(place, row["fraction_of_limit"], color=_COLORS.get(row["implementation"], "silver"))
            if row["fraction_of_limit"] > _WIDEST:
                axes.text(_WIDEST, place, f"{row['fraction_of_limit']:.3g} ", va="center", ha="right", fontsize=7)
    axes.set_yticks([place for place, (_, row) in enumerate(bars) if row], [name for name, row in bars if row], fontsize=7)
    axes.axvline(1.0, color="black", linestyle="--")
    axes.set_xlim(0, _WIDEST)  # what is in a cache may be far beyond
    axes.set_ylim(len(bars), -1)
    axes.set_xlabel("share of the limit: the time that copy bandwidth or matrix rate allows / its time")
    axes.set_title(_title(result))
    return figure


def _roofline(result: dict[str, Any], rows: list[Row]) -> Any:
    limits = result["limits"]
    matrix, copy = limits["matrix_tflops"], limits["copy_gigabytes_per_second"] / 1e3
    figure = _figure(10, 6.5)
    axes = figure.add_subplot()
    intensities = [row["flops"] / row["bytes"] for row in rows]
    ends = [min(intensities) / 2, max(*intensities, 2 * matrix / copy) * 2]
    steps = [ends[0] * (ends[1] / ends[0]) ** (i / 100) for i in range(101)]
    axes.plot(steps, [min(matrix, x * copy) for x in steps], color="black", label="limit: copy, matrix products")
    for name in dict.fromkeys(row["implementation"] for row in rows):
        mine = [row for row in rows if row["implementation"] == name]
        x = [row["flops"] / row["bytes"] for row in mine]
        axes.scatter(x, [row["tflops"] for row in mine], s=22, label=name, color=_COLORS.get(name, "silver"), zorder=3)
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["op"], row["pass"])
        if key not in best or row["tflops"] > best[key]["tflops"]:
            best[key] = row
    for (op, which), row in best.items():
        where = (row["flops"] / row["bytes"], row["tflops"])
        axes.annotate(f"{op} {which}", where, fontsize=6, rotation=30, xytext=(2, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte that must move")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(_title(result))
    axes.legend(fontsize=7, loc="lower right")
    return figure


def _series(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """By op and pass, where there are several sizes."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["op"], row["pass"]), []).append(row)
    return {key: of for key, of in found.items() if len({describe(row["dims"]) for row in of}) > 1}


def _sizes(result: dict[str, Any], series: dict[tuple[str, str], list[Row]]) -> Any:
    """A panel for each op and pass: speed over what its sizes differ in."""
    columns = 3
    lines = -(-len(series) // columns)
    figure = _figure(5 * columns, 3.2 * lines)
    for place, ((op, which), rows) in enumerate(series.items()):
        axes = figure.add_subplot(lines, columns, place + 1)
        by_compute = rows[-1]["bound"] == "compute"
        unit, key = ("TFLOP/s", "tflops") if by_compute else ("GB/s", "gigabytes_per_second")
        axis = _differing(rows)
        for name in dict.fromkeys(row["implementation"] for row in rows):
            points = sorted((row["dims"][axis], row[key]) for row in rows if row["implementation"] == name)
            axes.plot(*zip(*points, strict=True), marker="o", label=name, color=_COLORS.get(name))
        limit = result["limits"]["matrix_tflops" if by_compute else "copy_gigabytes_per_second"]
        axes.axhline(limit, color="black", linestyle="--", label="limit")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0)
        axes.set_title(f"{op} {which}", fontsize=9)
        axes.set_xlabel(axis)
        axes.set_ylabel(unit)
        axes.legend(fontsize=6)
    figure.suptitle(_title(result))
    return figure


def _differing(rows: list[Row]) -> str:
    """The first dimension that is not the same everywhere."""
    dims: list[dict[str, int]] = [row["dims"] for row in rows]
    return next(name for name in dims[0] if len({d[name] for d in dims}) > 1)
