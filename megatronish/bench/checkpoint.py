"""Seconds to save and load a training state: against torch.distributed.checkpoint, the same ranks, tensors and disk, interleaved.

Every rank holds its share of the state as matrices of 16 MiB and a norm weight beside each, in master weights and two moments.

    durable save   from tensors to files that fsync has returned for; ours with digests, manifest and rename
    stall          what a step waits for an asynchronous save, against a copy of the same tensors to memory that is there
    load           from files in the page cache to tensors; ours verifies every digest first

The peer is measured with its default, one writer thread a rank, and with four.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as peer

from megatronish import __version__
from megatronish.bench.workers import Workers, processor_name, scratch_folder
from megatronish.checkpoint import BackgroundSaver, FileStorage, Piece, SaveJob, newest_loadable, save_checkpoint, whole_box
from megatronish.comm import barrier, streams
from megatronish.comm.groups import world_group
from megatronish.parallel.launchers import free_port
from megatronish.parallel.rendezvous import Place, connect, disconnect

_ROWS, _COLUMNS = 4096, 1024
_STATES = ("master", "exp_avg", "exp_avg_sq")
OURS, PEER, PEER_THREADS = "megatronish", "torch DCP", "torch DCP, 4 writer threads"


@dataclass(frozen=True)
class CheckpointBench:
    """What is measured."""

    gib: float
    """Of all ranks' state together."""
    num_ranks: int
    rounds: int
    folder: Path
    """On the disk to measure; what is written there is removed."""

    @property
    def tensors_per_rank(self) -> int:
        """Matrices; rounded to whole groups of three states."""
        group = len(_STATES) * _ROWS * _COLUMNS * 4
        return max(1, round(self.gib * 2**30 / self.num_ranks / group)) * len(_STATES)


def state_shapes(bench: CheckpointBench, rank: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a rank."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number in range(bench.tensors_per_rank // len(_STATES)):
        for state in _STATES:
            shapes[f"{state}/rank{rank}.layers.{number}.weight"] = (_ROWS, _COLUMNS)
            shapes[f"{state}/rank{rank}.layers.{number}.norm"] = (_COLUMNS,)
    return shapes


class _Rank:
    """One rank's tensors, and the acts that are timed. Each returns the seconds it took."""

    def __init__(self, bench: CheckpointBench, rank: int, root: Path) -> None:
        self.bench, self.root = bench, root
        self.world = world_group(device_kind="cpu")
        generator = torch.Generator().manual_seed(rank)
        self.tensors = {name: torch.randn(s, generator=generator) for name, s in state_shapes(bench, rank).items()}
        self.out = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
        self.background = BackgroundSaver()
        self.step = 0

    def _pieces(self, rank: int) -> list[Piece]:
        return [Piece(name, whole_box(shape)) for name, shape in state_shapes(self.bench, rank).items()]

    def _job(self, folder: str) -> SaveJob:
        self.step += 1
        ranks = range(self.bench.num_ranks)
        shapes = {name: (shape, "float32") for rank in ranks for name, shape in state_shapes(self.bench, rank).items()}
        local = [(piece, self.tensors[piece.tensor]) for piece in self._pieces(self.world.index)]
        return SaveJob(self.root / folder, self.step, local, self._pieces, shapes, {}, self.world, 1, FileStorage())

    def _timed(self, act: Callable[[], object]) -> float:
        if self.world.index == 0:
            os.sync()
        barrier(self.world)
        started = time.perf_counter()
        act()
        barrier(self.world)
        return time.perf_counter() - started

    def _remove(self, folder: str) -> None:
        if self.world.index == 0:
            shutil.rmtree(self.root / folder, ignore_errors=True)
        barrier(self.world)

    def save(self) -> float:
        """A durable save of ours."""
        self._remove("ours")
        job = self._job("ours")
        return self._timed(lambda: save_checkpoint(job))

    def save_peer(self, threads: int) -> float:
        """The peer's; its writer calls fsync for each file by default."""
        self._remove("peer")
        writer = peer.FileSystemWriter(self.root / "peer", thread_count=threads, sync_files=True)
        return self._timed(lambda: peer.save(self.tensors, storage_writer=writer))

    def stall(self) -> float:
        """An asynchronous save: its start alone. It is then waited for."""
        self._remove("beside")
        job = self._job("beside")
        seconds = self._timed(lambda: self.background.start(job))
        self.background.finish()
        return seconds

    def copy(self) -> float:
        """The limit of a stall."""

        def act() -> None:
            for name, tensor in self.tensors.items():
                self.out[name].copy_(tensor)

        return self._timed(act)

    def load(self) -> float:
        """Ours: the newest checkpoint that verifies."""

        def act() -> None:
            checkpoint = newest_loadable(self.root / "ours", world=self.world, log=print)
            assert checkpoint is not None
            for name, tensor in self.out.items():
                checkpoint.read(name, whole_box(tuple(tensor.shape)), tensor)
            checkpoint.close()

        return self._loaded(act)

    def load_peer(self) -> float:
        """The peer's, into tensors that are there."""
        return self._loaded(lambda: peer.load(self.out, storage_reader=peer.FileSystemReader(self.root / "peer")))

    def _loaded(self, act: Callable[[], object]) -> float:
        for tensor in self.out.values():
            tensor.zero_()
        seconds = self._timed(act)
        wrong = [name for name, tensor in self.tensors.items() if not torch.equal(self.out[name], tensor)]
        assert not wrong, f"{wrong[0]} was loaded with other values"
        return seconds

    def acts(self) -> dict[str, Callable[[], float]]:
        """By the names of the table."""
        return {
            f"save: {OURS}": self.save,
            f"save: {PEER}": lambda: self.save_peer(1),
            f"save: {PEER_THREADS}": lambda: self.save_peer(4),
            f"stall: {OURS}": self.stall,
            "stall: memcpy": self.copy,
            f"load: {OURS}": self.load,
            f"load: {PEER}": self.load_peer,
        }


SAVES = (f"save: {OURS}", f"save: {PEER}", f"save: {PEER_THREADS}", f"stall: {OURS}", "stall: memcpy")
LOADS = (f"load: {OURS}", f"load: {PEER}")


def _serve(commands: Connection, bench: CheckpointBench, rank: int, port: int, root: str) -> None:
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    streams.set_numerics(cpu_threads=1, deterministic=False)
    connect(Place("bench", rank, rank, bench.num_ranks, bench.num_ranks, master=("127.0.0.1", port)))
    acts = _Rank(bench, rank, Path(root)).acts()
    commands.send(None)
    while command := commands.recv():
        commands.send(acts[command]())
    disconnect()


def measure(bench: CheckpointBench, on_round: Callable[[int], None] = lambda number: None) -> dict[str, Any]:
    """Run the bench. Seconds of a round are the slowest rank's; the table holds medians over rounds, and ratios of medians."""
    seconds: dict[str, list[float]] = {name: [] for name in (*SAVES, *LOADS)}
    with scratch_folder(bench.folder, "--folder") as root:
        _interleave(bench, str(root), seconds, on_round)
    return _summary(bench, seconds)


def _interleave(bench: CheckpointBench, root: str, seconds: dict[str, list[float]], on_round: Callable[[int], None]) -> None:
    workers, port = Workers("checkpoint bench"), free_port()
    try:
        for rank in range(bench.num_ranks):
            workers.start(_serve, bench, rank, port, root)
        workers.answers()
        for names in (SAVES, LOADS):  # loads come when all files are there, and are in the page cache after the first
            for number in range(bench.rounds + 1):
                for name in names if number % 2 else reversed(names):
                    taken = max(workers.run(name))
                    if number > 0:
                        seconds[name].append(taken)
                if number > 0:
                    on_round(number)
    finally:
        workers.stop()


def _summary(bench: CheckpointBench, seconds: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    num_bytes = sum(4 * math.prod(shape) for rank in range(bench.num_ranks) for shape in state_shapes(bench, rank).values())
    return {
        "bench": "checkpoint",
        "gib": num_bytes / 2**30,
        "num_ranks": bench.num_ranks,
        "rounds": bench.rounds,
        "seconds": medians,
        "all_seconds": seconds,
        "gib_per_second": {name: num_bytes / 2**30 / median for name, median in medians.items()},
        "ratios": {
            "save, times as fast as the peer": medians[f"save: {PEER}"] / medians[f"save: {OURS}"],
            "save, times as fast as the peer with 4 threads": medians[f"save: {PEER_THREADS}"] / medians[f"save: {OURS}"],
            "stall, times a memcpy": medians[f"stall: {OURS}"] / medians["stall: memcpy"],
            "load, times as fast as the peer": medians[f"load: {PEER}"] / medians[f"load: {OURS}"],
        },
        "load_average": os.getloadavg()[0],
        "versions": {"megatronish": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": processor_name(),
        "date": time.strftime("%Y-%m-%d"),
    }
