"""AdamW on CPU against torch and DeepSpeed's CPUAdam, and the whole optimizer step against theirs, in one interleaved run.

Every variant first makes three steps from one state and is compared with float64. Then they take turns; a turn begins with fresh
gradients, which are not timed. The limit is a copy on the same threads, 8 bytes an element; it fetches the lines that it writes as
well, an update in place does not, so that may come out above it. What a variant must move (GB/s) is counted for our way of
doing it, so a chain of passes shows as a low rate.

    adamw         update of float32 weights and moments, 28 bytes a parameter
    whole step    norm, clip, AdamW, copy to bfloat16, zero the gradients
                  ours: `square_sum`, then `adamw_` with all of the rest in the same pass
                  DeepSpeed: torch's norm, product with the clip factor, CPUAdam, copy, zero
                  torch: clip_grad_norm_, fused AdamW, copy, zero_grad
"""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from megatronish import __version__, native
from megatronish.bench.workers import processor_name
from megatronish.deepspeed_nvme import add_scripts_to_path
from megatronish.errors import UserError
from megatronish.kernels.adamw import AdamWNumbers, adamw_, join_master, reference
from megatronish.kernels.square_sum import square_sum
from megatronish.optim.grad_norm import clip_factor
from megatronish.packages import find_package

NUMBERS = AdamWNumbers(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
CLIP_NORM = 1.0
CHECKED = 100_003
"""Elements that each variant is checked on: vectors, and a rest."""


@dataclass(frozen=True)
class AdamWBench:
    """What is measured."""

    parameters: int
    rounds: int
    threads: int


@dataclass(frozen=True)
class Variant:
    """One way to update `weights` by `gradients`."""

    group: str
    name: str
    weights: Tensor
    gradients: Tensor
    step: Callable[[], Any]
    bytes_needed: int
    """A parameter: what a single pass reads and writes."""
    remainders: Tensor | None = None
    """What bfloat16 `weights` leave of the masters."""

    def values(self) -> Tensor:
        """The weights as the update knows them, in float64."""
        return (self.weights if self.remainders is None else join_master(self.weights, self.remainders)).double()


def ours(weights: Tensor, gradients: Tensor, *, kind: str) -> Callable[[], None]:
    """A step of ours: `plain`, `low` (with a bfloat16 copy), or `whole`."""
    moments = [torch.zeros_like(weights) for _ in range(2)]
    low = torch.empty_like(weights, dtype=torch.bfloat16) if kind != "plain" else None
    steps, one = (torch.full((), value, device=weights.device) for value in (0.0, 1.0))

    def step() -> None:
        steps.add_(1)
        factor = one
        if kind == "whole":
            factor = clip_factor(square_sum([gradients]).sqrt(), CLIP_NORM).float()
        scalars = torch.stack((factor, steps))
        adamw_(weights, gradients, *moments, scalars=scalars, low=low, numbers=NUMBERS, zero_grad=kind == "whole")

    return step


def ours_in_halves(parameters: Tensor, remainders: Tensor, gradients: Tensor) -> Callable[[], None]:
    """The same on bfloat16 parameters and moments."""
    moments = [torch.zeros_like(parameters) for _ in range(2)]
    steps, one = (torch.full((), value, device=parameters.device) for value in (0.0, 1.0))

    def step() -> None:
        steps.add_(1)
        scalars = torch.stack((one, steps))
        adamw_(remainders, gradients, *moments, scalars=scalars, low=parameters, numbers=NUMBERS)

    return step


def peer(make: Callable[[list[nn.Parameter]], Any], weights: Tensor, gradients: Tensor, *, whole: str = "") -> Callable[[], None]:
    """An optimizer of torch's kind; `whole`: with the rest of a step, as `torch` or `deepspeed` does it."""
    parameter = nn.Parameter(weights)
    parameter.data = weights  # the same memory
    parameter.grad = gradients
    optimizer = make([parameter])
    low = torch.empty_like(weights, dtype=torch.bfloat16) if whole else None

    @torch.no_grad()
    def step() -> None:
        if whole == "torch":
            nn.utils.clip_grad_norm_([parameter], CLIP_NORM)
        elif whole == "deepspeed":
            gradients.mul_(clip_factor(torch.linalg.vector_norm(gradients), CLIP_NORM))
        optimizer.step()
        if low is not None:
            low.copy_(weights)
            optimizer.zero_grad(set_to_none=False)

    return step


def torch_adamw(**how: bool) -> Callable[[list[nn.Parameter]], Any]:
    """torch's, with its choice of bodies."""
    n = NUMBERS
    return lambda given: torch.optim.AdamW(given, lr=n.lr, betas=(n.beta1, n.beta2), eps=n.eps, weight_decay=n.weight_decay, **how)


_BYTES_A_PARAMETER = 130
"""Of all variants together, and what torch makes in passing."""


def require_memory(parameters: int) -> None:
    """UserError where the machine has less free memory than the variants need together."""
    needed, free = parameters * _BYTES_A_PARAMETER / 1e9, free_bytes() / 1e9
    if needed > free:
        raise UserError(
            f"--parameters {parameters}: all variants need {needed:.3g} GB together and {free:.3g} GB are free; "
            f"give at most {max(0, int(free * 1e9 / _BYTES_A_PARAMETER) // 1_000_000)}000000"
        )


def free_bytes() -> int:
    """What Linux would give to a process without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def must_compile_deepspeed() -> bool:
    """Whether `deepspeed_adam` will compile it: it is installed, and was not compiled yet."""
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    return find_package("deepspeed") is not None and not any(folder.rglob("cpu_adam*.so"))


def deepspeed_adam() -> tuple[Callable[[list[nn.Parameter]], Any] | None, str]:
    """(its CPUAdam, "") or (None, why not). Compiles it where that was not done yet: a minute or two."""
    if find_package("deepspeed") is None:
        return None, "the package deepspeed is not installed"
    os.environ["DS_ACCELERATOR"] = "cpu"
    add_scripts_to_path()
    n = NUMBERS
    try:
        with redirect_stdout(StringIO()):
            kind = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam
            kind([nn.Parameter(torch.zeros(16))])
    except Exception as error:  # whatever its build raises
        return None, f"deepspeed's CPUAdam does not build: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    betas = (n.beta1, n.beta2)
    return lambda given: kind(given, lr=n.lr, betas=betas, eps=n.eps, weight_decay=n.weight_decay, adamw_mode=True), ""


def variants(size: int) -> tuple[list[Variant], dict[str, str]]:
    """All that are installed, each with its own state, and why the others are not there. Gradients are shared."""
    gradients = torch.zeros(size)
    rows: list[Variant] = []

    def add(group: str, name: str, make: Callable[[Tensor], Callable[[], None]], needed: int) -> None:
        weights = torch.ones(size)
        rows.append(Variant(group, name, weights, gradients, make(weights), needed))

    deepspeed, reason = deepspeed_adam()
    add("adamw", "megatronish", lambda w: ours(w, gradients, kind="plain"), 28)
    add("adamw", "torch fused", lambda w: peer(torch_adamw(fused=True), w, gradients), 28)
    add("adamw", "torch foreach", lambda w: peer(torch_adamw(foreach=True), w, gradients), 28)
    if deepspeed is not None:
        add("adamw", "DeepSpeed CPUAdam", lambda w: peer(deepspeed, w, gradients), 28)
    add("adamw", "megatronish, bfloat16 copy", lambda w: ours(w, gradients, kind="low"), 30)
    halves, remainders = torch.ones(size, dtype=torch.bfloat16), torch.zeros(size, dtype=torch.int16)
    step = ours_in_halves(halves, remainders, gradients)
    rows.append(Variant("adamw", "megatronish, 16-bit state", halves, gradients, step, 20, remainders))
    add("whole step", "megatronish", lambda w: ours(w, gradients, kind="whole"), 38)
    if deepspeed is not None:
        add("whole step", "DeepSpeed", lambda w: peer(deepspeed, w, gradients, whole="deepspeed"), 38)
    add("whole step", "torch", lambda w: peer(torch_adamw(fused=True), w, gradients, whole="torch"), 38)
    return rows, {} if deepspeed is not None else {"DeepSpeed": reason}


def error_of(row: Variant) -> float:
    """The largest error of a weight after three steps from a fixed state against float64, as a share of the largest way a weight
    went. Overwrites the variant's weights and gradients."""
    size, device = row.gradients.numel(), row.gradients.device
    generator = torch.Generator(device).manual_seed(0)
    row.weights.copy_(torch.randn(size, generator=generator, device=device))
    steps = [torch.randn(size, generator=generator, device=device) * 0.01 for _ in range(3)]
    begun = row.values()
    exact, moments = begun.clone(), [torch.zeros_like(begun) for _ in range(2)]
    for number, gradient in enumerate(steps, start=1):
        row.gradients.copy_(gradient)
        row.step()
        factor = torch.ones_like(begun[0])
        if row.group == "whole step":
            factor = clip_factor(gradient.double().norm(), CLIP_NORM)
        scalars = torch.stack((factor, torch.full_like(factor, number)))
        reference(exact, gradient.double(), moments[0], moments[1], scalars, None, NUMBERS)
    return float((row.values() - exact).abs().max() / (exact - begun).abs().max())


def errors() -> dict[str, float]:
    """`error_of` every variant."""
    return {f"{row.group}: {row.name}": error_of(row) for row in variants(CHECKED)[0]}


def allowed_error(name: str) -> float:
    """Three steps of 1e-3 on weights of up to 4: three roundings of a weight of that size to float32 (2^-24 x 4), of 3e-3 that it
    went, and some twenty of the step itself; of bfloat16 moments two a step (2^-8). torch's norm of float32 numbers is off by 1e-5
    at this size, and so is what it clips."""
    if "16-bit" in name:
        return 3 * 2 * 2.0**-8
    return 3 * 2.0**-24 * 4 / 3e-3 + 20 * 2.0**-24 + 1e-4


def measure(bench: AdamWBench, on_round: Callable[[int], object] = lambda number: None) -> dict[str, Any]:
    """Run the bench on CPU; times are medians over rounds, ratios the median of each round's ratio. UserError where a variant is
    wrong."""
    before = torch.get_num_threads()
    torch.set_num_threads(bench.threads)
    try:
        checked = errors()
        if wrong := [name for name, error in checked.items() if not error <= allowed_error(name)]:
            raise UserError(f"{wrong[0]} is off by {checked[wrong[0]]:.1e} against float64: nothing is measured")
        rows, missing = variants(bench.parameters)
        source = torch.randn(bench.parameters, generator=torch.Generator().manual_seed(1)) * 0.01
        target, gradients = torch.empty_like(source), rows[0].gradients
        seconds: dict[str, list[float]] = {f"{row.group}: {row.name}": [] for row in rows}
        copies = []
        for number in range(bench.rounds + 1):  # the first fills caches and is dropped
            started = time.perf_counter()
            target.copy_(source)
            copies.append(time.perf_counter() - started)
            first = number % len(rows)  # nobody always comes after the same one
            for row in rows[first:] + rows[:first]:
                gradients.copy_(source)
                started = time.perf_counter()
                row.step()
                seconds[f"{row.group}: {row.name}"].append(time.perf_counter() - started)
            if number:
                on_round(number - 1)
    finally:
        torch.set_num_threads(before)
    return _summary(bench, rows, {name: times[1:] for name, times in seconds.items()}, copies[1:], checked, missing)


def _summary(
    bench: AdamWBench,
    rows: list[Variant],
    seconds: dict[str, list[float]],
    copies: list[float],
    checked: dict[str, float],
    missing: dict[str, str],
) -> dict[str, Any]:
    copy_rate = 8 * bench.parameters / statistics.median(copies) / 1e9
    table = []
    for row in rows:
        name = f"{row.group}: {row.name}"
        times, ours = seconds[name], seconds[f"{row.group}: megatronish"]
        rate = row.bytes_needed * bench.parameters / statistics.median(times) / 1e9
        table.append(
            {
                "group": row.group,
                "name": row.name,
                "milliseconds": statistics.median(times) * 1e3,
                "all_milliseconds": [t * 1e3 for t in times],
                "parameters_per_second": bench.parameters / statistics.median(times),
                "bytes_needed": row.bytes_needed,
                "gigabytes_per_second": rate,
                "fraction_of_copy": rate / copy_rate,
                "ours_is_faster_by": statistics.median(a / b for a, b in zip(times, ours, strict=True)),
                "error": checked[name],
            }
        )
    return {
        "bench": "adamw",
        "parameters": bench.parameters,
        "rounds": bench.rounds,
        "threads": bench.threads,
        "native": native.cpu is not None,
        "copy_gigabytes_per_second": copy_rate,
        "variants": table,
        "missing": missing,
        "load": os.getloadavg()[0],
        "versions": {
            "megatronish": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "deepspeed": _version("deepspeed"),
        },
        "device": processor_name(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(name: str) -> str | None:
    return None if find_package(name) is None else importlib.import_module("importlib.metadata").version(name)


def render(result: dict[str, Any]) -> Table:
    """For people."""
    title = (
        f"AdamW, {result['parameters'] / 1e6:,.0f} M parameters, {result['threads']} threads of {result['device']}; copy "
        f"{result['copy_gigabytes_per_second']:.1f} GB/s; medians of {result['rounds']} interleaved rounds"
    )
    table = Table("", "variant", title=title, title_justify="left")
    for column in ("ms", "G parameters/s", "GB/s needed", "of copy", "its time / ours", "error"):
        table.add_column(column, justify="right")
    for row in result["variants"]:
        table.add_row(
            row["group"],
            row["name"],
            f"{row['milliseconds']:.1f}",
            f"{row['parameters_per_second'] / 1e9:.2f}",
            f"{row['gigabytes_per_second']:.1f}",
            f"{row['fraction_of_copy']:.2f}",
            f"{row['ours_is_faster_by']:.2f}",
            f"{row['error']:.0e}",
        )
    for name, reason in result["missing"].items():
        table.add_row("", name, "-", "-", "-", "-", "-", reason)
    return table


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """adamw.svg and adamw.png in `folder`: rates against a copy. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(reversed(result["variants"]))
    figure = Figure(figsize=(9, 0.5 * len(rows) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ["tab:blue" if row["name"].startswith("megatronish") else "tab:gray" for row in rows]
    bars = axes.barh(
        [f"{row['group']}: {row['name']}" for row in rows], [row["gigabytes_per_second"] for row in rows], color=colors
    )
    axes.bar_label(bars, [f"{row['milliseconds']:.0f} ms" for row in rows], padding=3)
    axes.axvline(result["copy_gigabytes_per_second"], color="black", linestyle="--", label="copy")
    axes.set_xlabel("GB/s of what one pass must move")
    axes.set_title(f"AdamW of {result['parameters'] / 1e6:,.0f} M parameters, {result['threads']} threads, {result['device']}")
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "adamw.svg", folder / "adamw.png"]
    for file in files:
        figure.savefig(file)
    return files
