"""Collectives and exchanges of the trainer's own communicators, axis by axis, in algorithm and bus bandwidth.

Bandwidths are those of NVIDIA's nccl-tests (doc/PERFORMANCE.md there). Algorithm: bytes of the message over seconds. Bus: what a
ring sends over each link, which compares with the hardware's rate: x 2 (n - 1) / n for all-reduce, x (n - 1) / n for the other two,
x 1 for send and receive. The message is what is reduced, the whole that is gathered, the whole that is scattered, or what one
rank sends: places 0 and 1 of a group, 2 and 3, ..., exchange one message each way, as neighbouring stages do.

All groups of an axis run at the same time, as in training, and the slowest rank of the job counts.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from megatronish import __version__
from megatronish.bench.tables import Parts
from megatronish.bench.workers import processor_name
from megatronish.comm import all_reduce, barrier, streams
from megatronish.comm.collectives import start_all_gather_into, start_all_reduce, start_reduce_scatter_into
from megatronish.comm.exchange import Parcel, start_exchange
from megatronish.comm.groups import Group
from megatronish.comm.host import read_scalar, read_values
from megatronish.parallel.mesh import Mesh

Operation = Literal["all-reduce", "reduce-scatter", "all-gather", "send/receive"]
OPERATIONS: tuple[Operation, ...] = ("all-reduce", "reduce-scatter", "all-gather", "send/receive")
AXES = ("tp", "pp", "dp", "world")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BYTES_A_MEASUREMENT = 1 << 24
_MOST_CALLS = {"cuda": 20, "cpu": 8}
"""Of one measurement, back to back: nccl-tests makes 20."""


@dataclass(frozen=True)
class CollectivesBench:
    """What is measured; equal on every rank."""

    sizes: tuple[int, ...]
    """Bytes of a message, before they are rounded to whole elements of every rank."""
    dtypes: tuple[str, ...]
    rounds: int
    seconds: float
    """No round begins after this time, but for the first."""


@dataclass(frozen=True)
class Case:
    """One operation on one size."""

    axis: str
    operation: Operation
    dtype: str
    num_elements: int
    """Of the message: a multiple of the group's size."""

    @property
    def num_bytes(self) -> int:
        """Of the message."""
        return self.num_elements * DTYPES[self.dtype].itemsize


def bus_factor(operation: Operation, size: int) -> float:
    """Bus over algorithm bandwidth in a group of `size` ranks."""
    return {"all-reduce": 2 * (size - 1) / size, "send/receive": 1.0}.get(operation, (size - 1) / size)


def axes_of(mesh: Mesh) -> list[str]:
    """Axes of more than one rank; `world` only where no axis is the whole job."""
    return [a for a in AXES if mesh.size(a) > 1 and (a != "world" or mesh.size("world") not in map(mesh.size, AXES[:-1]))]


def plan(bench: CollectivesBench, mesh: Mesh) -> list[Case]:
    """All cases, in the order in which every rank runs them."""
    return [
        Case(axis, operation, dtype, max(1, size // (DTYPES[dtype].itemsize * mesh.size(axis))) * mesh.size(axis))
        for axis in axes_of(mesh)
        for dtype in bench.dtypes
        for size in bench.sizes
        for operation in OPERATIONS
    ]


class Work:
    """A case with memory on this rank: `run` starts the operation and waits for it; its input is `given`, its result `result`."""

    def __init__(self, case: Case, mesh: Mesh) -> None:
        self.case, self.mesh, self.group = case, mesh, mesh.groups[case.axis]
        dtype, whole, part = DTYPES[case.dtype], case.num_elements, case.num_elements // self.group.size
        lengths = {"reduce-scatter": (whole, part), "all-gather": (part, whole), "send/receive": (whole, whole)}
        given, result = lengths.get(case.operation, (whole, 0))
        self.given = torch.zeros(given, dtype=dtype, device=mesh.device)
        self.result = torch.zeros(result, dtype=dtype, device=mesh.device) if result else self.given
        neighbour = self.group.index ^ 1
        self.neighbour = neighbour if neighbour < self.group.size else None
        """Place of the rank that messages are exchanged with; None for the last of an odd number."""

    def run(self) -> None:
        """Collective over the group. On GPU the host does not wait."""
        group, name = self.group, "bench"
        if self.case.operation == "all-reduce":
            start_all_reduce(self.given, group, what=name).wait()
        elif self.case.operation == "reduce-scatter":
            start_reduce_scatter_into(self.result, self.given, group, what=name).wait()
        elif self.case.operation == "all-gather":
            start_all_gather_into(self.result, self.given, group, what=name).wait()
        elif self.neighbour is not None:
            sends, receives = [Parcel(self.given, 0, name)], [Parcel(self.result, 0, name)]
            exchange = start_exchange(
                sends=sends, receives=receives, peer_index=self.neighbour, group=group, device_kind=self.mesh.device_kind
            )
            exchange.wait_received()
            exchange.wait_sent()

    def is_right(self) -> Tensor:
        """Run once on known numbers; whether this rank's result is the expected one, as a boolean on the device.

        Sums are of two ranks' numbers for each element, other ranks in turn, and of zeros: whole numbers that any dtype adds
        without rounding, in any order, for any number of ranks."""
        n, place, whole = self.group.size, self.group.index, self.case.num_elements
        number = torch.arange(whole, device=self.mesh.device)
        numbers = number // n % 7 + 1
        if self.case.operation in ("all-reduce", "reduce-scatter"):
            mine = (number % n == place) | ((number + 1) % n == place)
            self.given.copy_(numbers * mine)
            expected = numbers * 2
            if self.case.operation == "reduce-scatter":
                expected = expected.view(n, -1)[place]
        elif self.case.operation == "all-gather":
            expected = (3 * number + 17 * (number // (whole // n))) % 251
            self.given.copy_(expected.view(n, -1)[place])
        else:
            self.given.copy_((3 * number + 17 * place) % 251)
            expected = torch.zeros_like(number) if self.neighbour is None else (3 * number + 17 * self.neighbour) % 251
        self.run()
        right = (self.result == expected).all()
        self.given.zero_()  # sums of sums would grow
        return right

    @property
    def num_calls(self) -> int:
        """Back to back in one measurement."""
        most = _MOST_CALLS[self.mesh.device_kind]
        return max(1, min(most, _BYTES_A_MEASUREMENT * most // 8 // self.case.num_bytes))

    def seconds(self) -> float:
        """Of one call, as this rank sees it. Collective over the job; waits for the device."""
        barrier(self.mesh.groups["world"], what="bench")
        begun = streams.wall_time(self.mesh.device)
        for _ in range(self.num_calls):
            self.run()
        return (streams.wall_time(self.mesh.device) - begun) / self.num_calls


def wrong_results(cases: Sequence[Case], mesh: Mesh) -> list[str]:
    """What comes out wrong, and on which rank (the highest, where several); the same on every rank. Collective over the job."""
    wrong = torch.zeros(len(cases), dtype=torch.float32, device=mesh.device)
    for number, case in enumerate(cases):
        wrong[number] = torch.where(Work(case, mesh).is_right(), 0.0, float(mesh.rank + 1))
    ranks = read_values(all_reduce(wrong, mesh.groups["world"], "max", what="wrong results"), [0.0] * len(cases))
    return [
        f"{case.operation} of {readable(case.num_bytes)} of {case.dtype} over {case.axis} gives wrong numbers on rank "
        f"{rank - 1:.0f}"
        for case, rank in zip(cases, ranks, strict=True)
        if rank
    ]


def measure(bench: CollectivesBench, mesh: Mesh, on_round: Callable[[int], object] = lambda number: None) -> dict[str, Any]:
    """Check every case, then time them in interleaved rounds; the same result on every rank. Collective over the job.

    Where a result is wrong nothing is timed: `wrong` says what."""
    cases, world = plan(bench, mesh), mesh.groups["world"]
    wrong = wrong_results(cases, mesh)
    rounds: list[list[float]] = []
    begun = time.perf_counter()
    while not wrong and len(rounds) < bench.rounds:
        own = [Work(case, mesh).seconds() for case in cases]
        slowest = all_reduce(torch.tensor(own, dtype=torch.float64, device=mesh.device), world, "max", what="slowest rank")
        rounds.append(read_values(slowest, own))
        on_round(len(rounds))
        # One rank's clock is not another's: all go on, or none.
        late = torch.tensor(float(time.perf_counter() - begun > bench.seconds), device=mesh.device)
        if read_scalar(all_reduce(late, world, "max", what="end of the time"), 0.0):
            break
    rows = [] if wrong else [_row(case, mesh, list(seconds)) for case, *seconds in zip(cases, *rounds, strict=True)]
    shape = mesh.shape
    return {
        "bench": "collectives",
        "num_ranks": world.size,
        "layout": f"pp{shape.pp} dp{shape.dp} tp{shape.tp}",
        "backend": streams.backend_of(mesh.device_kind),
        "rounds": len(rounds),
        "wrong": wrong,
        "rows": rows,
        "versions": {
            "megatronish": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "nccl": streams.nccl_version(mesh.device),
        },
        "device": streams.device_name(mesh.device) if mesh.device_kind == "cuda" else processor_name(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _row(case: Case, mesh: Mesh, seconds: list[float]) -> dict[str, Any]:
    group: Group = mesh.groups[case.axis]
    median = statistics.median(seconds)
    rate = case.num_bytes / median / 1e9
    return {
        "axis": case.axis,
        "operation": case.operation,
        "dtype": case.dtype,
        "bytes": case.num_bytes,
        "group_size": group.size,
        "num_groups": mesh.groups["world"].size // group.size,
        "microseconds": median * 1e6,
        "all_microseconds": [s * 1e6 for s in seconds],
        "algorithm_gigabytes_per_second": rate,
        "bus_gigabytes_per_second": rate * bus_factor(case.operation, group.size),
    }


_RATES = ("algorithm_gigabytes_per_second", "bus_gigabytes_per_second")


def readable(num_bytes: int) -> str:
    """Such as 4 KiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes} B"


def _by_axis(result: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for axis in dict.fromkeys(row["axis"] for row in result["rows"]):
        yield axis, [row for row in result["rows"] if row["axis"] == axis]


def _name_of(rows: list[dict[str, Any]]) -> str:
    one = rows[0]
    count = "1 group" if one["num_groups"] == 1 else f"{one['num_groups']} groups at once, each"
    return f"{one['axis']}: {count} of {one['group_size']} ranks"


def _cell(microseconds: str, algorithm: str, bus: str) -> str:
    return f"{microseconds:>7}|{algorithm:>8}|{bus:>8}"


def render(result: dict[str, Any]) -> Parts:
    """For people: a table an axis."""
    lines: Parts = [
        f"{result['num_ranks']} ranks ({result['layout']}) over {result['backend']}, {result['device']}, {result['date']}: us, "
        f"and GB/s of algorithm and bus; medians of {result['rounds']} interleaved rounds, the slowest rank counts"
    ]
    lines += [f"wrong: {text}" for text in result["wrong"]]
    for _, rows in _by_axis(result):
        table = Table("dtype", "message", title=_name_of(rows), title_justify="left", padding=0)
        for operation in OPERATIONS:
            table.add_column(f"{operation}\n{_cell('us', 'alg', 'bus')}", justify="right")
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for row in rows:
            # Elements are rounded to the group's size: rows of one size stand together.
            rates = (f"{row[key]:,.0f}" if row[key] >= 100 else f"{row[key]:#.3g}" for key in _RATES)
            of_size = cells.setdefault((row["dtype"], readable(row["bytes"])), {})
            of_size[row["operation"]] = _cell(f"{row['microseconds']:,.0f}", *rates)
        for (dtype, size), of_size in cells.items():
            table.add_row(dtype, size, *(of_size.get(operation, "-") for operation in OPERATIONS))
        lines.append(table)
    return lines


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """collectives.svg and collectives.png in `folder`: bus bandwidth over the size of the message, a panel an axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(_by_axis(result))
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (_, rows) in zip(all_axes, panels, strict=True):
        for color, operation in zip(("tab:blue", "tab:orange", "tab:green", "tab:red"), OPERATIONS, strict=True):
            for dtype, style in (("float32", "-"), ("bfloat16", "--")):
                line = [row for row in rows if (row["operation"], row["dtype"]) == (operation, dtype)]
                if line:
                    x, y = [row["bytes"] for row in line], [row["bus_gigabytes_per_second"] for row in line]
                    axes.loglog(x, y, style, color=color, marker=".", label=f"{operation}, {dtype}")
        axes.set_title(_name_of(rows), fontsize="medium")
        axes.set_xlabel("bytes of the message")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("bus bandwidth (GB/s)")
    all_axes[0].legend(fontsize="small")
    figure.suptitle(f"{result['num_ranks']} ranks over {result['backend']}, {result['device']}, {result['date']}")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "collectives.svg", folder / "collectives.png"]
    for file in files:
        figure.savefig(file)
    return files
