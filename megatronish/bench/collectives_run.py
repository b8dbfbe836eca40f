"""`megatronish bench collectives`: the layout, and the processes: started here with --nproc, or a rank of any launcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatronish.assemble import mesh_shape
from megatronish.bench.collectives import DTYPES, CollectivesBench, measure, plot, render
from megatronish.bench.progress import tell_line, wrote
from megatronish.comm import streams
from megatronish.comm.groups import world_group
from megatronish.config_loader import load_config
from megatronish.errors import UserError
from megatronish.json_file import writable, write_json
from megatronish.local_launch import end_with_launcher, must_launch, run_local
from megatronish.parallel.mesh import MeshShape, build_mesh
from megatronish.parallel.rendezvous import Place, connect, disconnect, find_place
from megatronish.rank_failure import RankGuard
from megatronish.startup import require_agreement, version_facts

_KEYS = ("parallel.tensor", "parallel.pipeline", "parallel.data")
_LARGEST = {"cuda": 256 << 20, "cpu": 4 << 20}
_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Options:
    """Of the command line; sizes in bytes."""

    layout: tuple[str, ...]
    """A config file, if any, then KEY=VALUE."""
    smallest: int
    largest: int | None
    factor: int
    dtypes: tuple[str, ...]
    rounds: int
    seconds: float
    json_file: Path | None
    plots: Path | None

    def arguments(self) -> list[str]:
        """The command line of a rank."""
        given = ["--min-kib", str(self.smallest / 1024), "--factor", str(self.factor), "--rounds", str(self.rounds)]
        given += ["--seconds", str(self.seconds), *(word for dtype in self.dtypes for word in ("--dtype", dtype))]
        given += [] if self.largest is None else ["--max-kib", str(self.largest / 1024)]
        given += [] if self.json_file is None else ["--json", str(self.json_file)]
        given += [] if self.plots is None else ["--plot", str(self.plots)]
        return ["bench", "collectives", *self.layout, *given]


def main(options: Options, nproc: int | None) -> int:
    """Measure, in this process as one of many, or in `nproc` new ones; the exit code: 1 where results are wrong. UserError for bad
    input, before anything is started."""
    place = find_place()
    if must_launch(place, nproc):
        prepare(options, nproc or 1)
        return run_local(options.arguments(), nproc or 1)
    end_with_launcher(place)
    with RankGuard(place):
        return _measure_as_rank(options, place)


def _measure_as_rank(options: Options, place: Place) -> int:
    shape = prepare(options, place.world_size)
    # Threads of a rank copy and add: what is left to each of those that share a host.
    streams.set_numerics(cpu_threads=max(1, (os.cpu_count() or 1) // place.local_world_size), deterministic=False)
    device = connect(place, collective_seconds=_TIMEOUT_SECONDS)
    facts = {key: repr(value) for key, value in vars(options).items() if key not in ("json_file", "plots")}
    require_agreement(facts | version_facts(), world=world_group(device_kind=device.type), device=device)
    mesh = build_mesh(shape, place.rank, device=device, timeout_seconds=_TIMEOUT_SECONDS)
    sizes = sizes_between(options.smallest, options.largest or _LARGEST[device.type], options.factor)

    def on_round(done: int) -> None:
        if mesh.rank == 0:
            tell_line("round", done - 1, options.rounds)

    result = measure(CollectivesBench(sizes, options.dtypes, options.rounds, options.seconds), mesh, on_round)
    if mesh.rank == 0:
        report({**result, "launcher": place.launcher}, options)
    disconnect()
    return 1 if result["wrong"] else 0


def report(result: dict[str, Any], options: Options) -> None:
    """Print the tables, and write what the options ask for."""
    console = Console(width=132)
    for part in render(result):
        console.print(part, highlight=False)
    pictures = plot(result, options.plots) if options.plots is not None and result["rows"] else []
    if options.json_file is not None:
        write_json(options.json_file, result)
    for line in wrote(options.json_file, pictures):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def prepare(options: Options, world_size: int) -> MeshShape:
    """The layout on `world_size` ranks. UserError for whatever is wrong with the options."""
    if world_size == 1:
        raise UserError(
            "one process has nobody to talk to: give --nproc 2 or more, or start it under torchrun, srun, mpirun or deepspeed"
        )
    if unknown := [dtype for dtype in options.dtypes if dtype not in DTYPES]:
        raise UserError(f"--dtype {unknown[0]}: must be {' or '.join(DTYPES)}")
    if options.largest is not None and options.largest < options.smallest:
        raise UserError(
            f"--max-kib {options.largest / 1024:g} is below --min-kib {options.smallest / 1024:g}: nothing is between them"
        )
    if options.json_file is not None:
        writable(options.json_file)
    return layout_of(options.layout, world_size)


def layout_of(words: Sequence[str], world_size: int) -> MeshShape:
    """`words`: a config file whose layout is taken, if the first has no `=`, then KEY=VALUE; without a file only sizes of axes."""
    if words and "=" not in words[0]:
        return mesh_shape(load_config(words[0], words[1:], world_size=world_size), world_size)
    sizes: dict[str, int] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key not in _KEYS:
            raise UserError(f"{word}: without a config file only {', '.join(_KEYS)} can be set; name the file before it")
        if not value.isdecimal() or int(value) < 1:
            raise UserError(f"{word}: must be a whole number of at least 1")
        sizes[key] = int(value)
    tensor, pipeline = sizes.get(_KEYS[0], 1), sizes.get(_KEYS[1], 1)
    data = sizes.get(_KEYS[2], max(1, world_size // (tensor * pipeline)))
    if tensor * pipeline * data != world_size:
        raise UserError(
            f"parallel.tensor={tensor} x parallel.pipeline={pipeline} x parallel.data={data} = {tensor * pipeline * data} ranks, "
            f"but {world_size} processes run: change these keys, or start another number of processes"
        )
    return MeshShape(pp=pipeline, dp=data, tp=tensor)


def sizes_between(smallest: int, largest: int, factor: int) -> tuple[int, ...]:
    """Bytes: smallest, x factor, ..., up to the largest."""
    sizes = [smallest]
    while sizes[-1] * factor <= largest:
        sizes.append(sizes[-1] * factor)
    return tuple(sizes)
