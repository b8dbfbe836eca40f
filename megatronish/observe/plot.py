"""The curve of a run as a picture, from its metrics."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatronish.errors import UserError
from megatronish.observe.metrics import FILE_NAME, read_metrics

Points = tuple[list[int], list[float]]


def plot_loss(run_dir: Path, out: Path) -> None:
    """Write a PNG: training loss, raw and smoothed, held-out loss, and tokens/s below. Raises UserError without losses."""
    # Without pyplot: it keeps figures and the choice of a window system in globals.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(run_dir)
    training, held_out, speed = (points(rows, key) for key in ("loss", "eval_loss", "tokens_per_second"))
    if not training[0] and not held_out[0]:
        raise UserError(f"{run_dir / FILE_NAME}: no losses to plot; train with this run folder first")
    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot(*training, color="tab:blue", linewidth=0.7, alpha=0.4, label="training")
    upper.plot(training[0], smooth(training[1]), color="tab:blue", linewidth=1.8, label="training, smoothed")
    upper.plot(*held_out, color="tab:red", marker="o", linewidth=1.2, label="held-out")
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(run_dir.resolve().name)
    upper.legend()
    lower.plot(*speed, color="tab:green", linewidth=1.0)
    lower.set_ylabel("speed (tokens/s)")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("optimizer step")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    FigureCanvasAgg(figure).print_png(str(temporary))
    os.replace(temporary, out)


def points(rows: Sequence[dict[str, Any]], key: str) -> Points:
    """(steps, values) of the rows that have a finite `key`."""
    found = [(row["step"], float(row[key])) for row in rows if math.isfinite(row.get(key, math.nan))]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a thirtieth of the curve, corrected for its start (Kingma and Ba 2015, section 3): it begins at
    the first value, not near 0."""
    decay = 1.0 - 1.0 / max(1.0, len(values) / 30)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        result.append(mean / weight)
    return result
