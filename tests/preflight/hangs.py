"""Real runs in which one rank does something wrong in step 3: what the tests of `why-hung` plant; their processes are ended."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatronish import train, trainer
from megatronish.after_step import AfterStep
from megatronish.comm import all_reduce, barrier
from megatronish.comm.exchange import PendingExchange
from megatronish.comm.groups import world_group
from megatronish.comm.history import current, phase
from megatronish.comm.local_ranks import RankPool
from megatronish.config_loader import load_config
from megatronish.data.gpt_dataset import GPTDataset
from megatronish.observe import post_mortem
from megatronish.observe.post_mortem import SIGNAL
from megatronish.optim.zero import ZeroAdamW
from megatronish.parallel.mesh import Mesh, build_mesh
from megatronish.parallel.rendezvous import Place
from megatronish.pipeline import runtime
from megatronish.preflight.dumps import Dump, NoDumps, collect
from megatronish.preflight.why_hung import Diagnosis, diagnose, report
from megatronish.run_folder import RunFolder
from megatronish.trainer import Trainer
from tests.small_run import wait_until

STEP = 3
Fault = Callable[[Mesh, int], None]
"""(mesh, the rank that is wrong): called on every rank."""


def now() -> bool:
    """Whether it is time."""
    return current().moment[:2] == ("train", STEP)


def on_one(mesh: Mesh, culprit: int) -> bool:
    """Whether this rank is the one, and it is time."""
    return mesh.rank == culprit and now()


def instead(owner: Any, name: str, when: Callable[[], bool], do: Callable[..., Any]) -> None:
    """From now on `owner.name` is `do` when it is time; `do` gets the original first."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: do(original, *args, **kwargs) if when() else original(*args, **kwargs))


def killed(mesh: Mesh, culprit: int) -> None:
    instead(Trainer, "count_targets", lambda: on_one(mesh, culprit), lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def stopped(mesh: Mesh, culprit: int) -> None:
    instead(Trainer, "count_targets", lambda: on_one(mesh, culprit), lambda *_: os.kill(os.getpid(), signal.SIGSTOP))


def failed(mesh: Mesh, culprit: int) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no such head")

    instead(Trainer, "count_targets", lambda: on_one(mesh, culprit), fail)


def stuck_in_the_loader(mesh: Mesh, culprit: int) -> None:
    """Its dataset does not answer any more; the thread that reads is one step ahead."""
    instead(GPTDataset, "tokens", lambda: on_one(mesh, culprit), lambda *_: time.sleep(600))


def stuck_in_a_loop(mesh: Mesh, culprit: int) -> None:
    def loop(*_: Any, **__: Any) -> None:
        while True:
            sum(range(1000))

    instead(ZeroAdamW, "step", lambda: on_one(mesh, culprit), loop)


def holds_the_lock(mesh: Mesh, culprit: int) -> None:
    """C code that sleeps and does not give back the interpreter's lock."""
    instead(ZeroAdamW, "step", lambda: on_one(mesh, culprit), lambda *_, **__: ctypes.PyDLL(None).sleep(600))


def skips_a_collective(mesh: Mesh, culprit: int) -> None:
    instead(Trainer, "count_targets", lambda: on_one(mesh, culprit), lambda *_: torch.tensor(100.0))


def calls_one_twice(mesh: Mesh, culprit: int) -> None:
    def twice(count: Any, *args: Any) -> Any:
        count(*args)
        return count(*args)

    instead(Trainer, "count_targets", lambda: on_one(mesh, culprit), twice)


def inverts_two_groups(mesh: Mesh, culprit: int) -> None:
    def both(finish: Any, *args: Any) -> None:
        finish(*args)
        axes = ["world", "dp"]
        for axis in axes[::-1] if mesh.rank == culprit else axes:
            barrier(mesh.groups[axis], what="two groups")

    instead(trainer.GradBuffer, "finish", now, both)


def wrong_group(mesh: Mesh, culprit: int) -> None:
    def join(reduce: Any, x: Any, group: Any, *args: Any, **kwargs: Any) -> Any:
        is_norm = kwargs.get("what") == "loss and gradient norm"
        return reduce(x, mesh.groups["dp"] if is_norm else group, *args, **kwargs)

    instead(trainer, "all_reduce", lambda: on_one(mesh, culprit), join)


def rank_dependent_norm(mesh: Mesh, culprit: int) -> None:
    instead(Trainer, "join_scalars", lambda: on_one(mesh, culprit), lambda _, self, loss: (loss, torch.tensor(1.0)))


def evaluates_alone(mesh: Mesh, culprit: int) -> None:
    def follow(call: Any, self: AfterStep, result: Any) -> Any:
        if result.step == STEP and mesh.rank == culprit:
            with phase("evaluate", STEP):
                self.evaluate(STEP)
        return call(self, result)

    instead(AfterStep, "__call__", lambda: True, follow)


def misses_a_receive(mesh: Mesh, culprit: int) -> None:
    def exchange(start: Any, *, receives: Any, **kwargs: Any) -> PendingExchange:
        return start(receives=receives[1:], **kwargs)  # type: ignore[no-any-return]

    instead(runtime, "start_exchange", lambda: on_one(mesh, culprit), exchange)


def one_microbatch_fewer(mesh: Mesh, culprit: int) -> None:
    def accumulate(original: Any, self: Trainer, batch: Any, num_targets: Any) -> Any:
        cut = batch.microbatches(batch.tokens_SB.shape[1] - self.config.train.micro_batch_size)[0]
        return original(self, cut, num_targets)

    instead(Trainer, "accumulate_gradients", lambda: on_one(mesh, culprit), accumulate)


def wrong_count(mesh: Mesh, culprit: int) -> None:
    def count(_: Any, self: Trainer, batch: Any) -> Any:
        return all_reduce(torch.ones(100_000), self.mesh.groups["dp"], what="number of targets")[0]

    instead(Trainer, "count_targets", lambda: on_one(mesh, culprit), count)


def never_builds(mesh: Mesh, culprit: int) -> None:
    """Not in step 3: it never comes to the first call of the build."""


def run_rank(rank: int, world_size: int, config_path: str, overrides: list[str], fault: Fault, culprit: int) -> None:
    """What `train.main` does in a rank, with a fault."""
    if fault is holds_the_lock:
        post_mortem.LOCKED_SECONDS = 2.0
    config = load_config(config_path, overrides, world_size=world_size)
    folder = RunFolder.of(config)
    place = Place("tests", rank, rank, world_size, world_size, run_id="tests")
    datasets = train.open_datasets(config)
    device = torch.device("cpu")
    with train.listening_post(config, folder, place):
        world = world_group(device_kind="cpu")
        train.require_agreement(train.run_facts(config, datasets), world=world, device=device)
        if fault is never_builds and rank == culprit:
            time.sleep(600)
        mesh = build_mesh(train.mesh_shape(config, world_size), rank, device=device)
        fault(mesh, culprit)
        train.train_in_folder(config, mesh, datasets, place)


class HungRun:
    """A run with a fault, on processes of its own; as a context manager it ends them."""

    def __init__(self, config_path: Path, *overrides: str, num_ranks: int, fault: Fault, culprit: int) -> None:
        self.num_ranks = num_ranks
        config = load_config(config_path, list(overrides), world_size=num_ranks)
        self.folder = RunFolder.of(config)
        self.folder.prepare(config)
        self._pool = RankPool(preload=("megatronish.verify.preload", "sympy"))
        self._arguments = (str(config_path), list(overrides), fault, culprit)

    def __enter__(self) -> HungRun:
        # As `RankPool.run`, which would end all ranks as soon as one fails.
        self._pool._grow(self.num_ranks)
        store = str(self.folder.path / "store")
        for rank, (_, connection) in enumerate(self._pool._workers):
            connection.send((run_rank, rank, self.num_ranks, store, False, (self.num_ranks, *self._arguments), {}))
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def dumps(self) -> dict[int, Dump]:
        """What is there so far."""
        try:
            return collect(self.folder.path).dumps
        except NoDumps:
            return {}

    def wait(self, silent: set[int], *, hangs: Callable[[Dump], bool], seconds: float = 60.0) -> None:
        """Until every rank but the silent ones has hung for observe.hang_seconds, or failed, or gloo has ended its process: it does
        where sizes disagree."""

        def all_hang() -> bool:
            try:
                evidence = collect(self.folder.path)
            except NoDumps:
                return False
            dumps = evidence.dumps
            gone = {rank for rank in range(self.num_ranks) if rank not in dumps and evidence.state_of(rank) == "gone"}
            return all(rank in dumps and hangs(dumps[rank]) for rank in set(range(self.num_ranks)) - silent - gone)

        wait_until(all_hang, seconds=seconds, what="a dump of every rank that hangs", often=0.2)

    def ask(self, silent: set[int]) -> None:
        """SIGUSR2 to all, and their answers, but of the silent ones and of those that have ended."""
        asked = {rank for rank, dump in self.dumps().items() if dump.reason != "crash"} - silent
        for rank, process in collect(self.folder.path).processes.items():
            if rank in asked:
                os.kill(process["pid"], SIGNAL)
        wait_until(
            lambda: all(self.dumps()[rank].reason == "signal" for rank in asked), seconds=20.0, what="the answers", often=0.1
        )

    def diagnose(self) -> tuple[Diagnosis, str]:
        """What `why-hung` finds, and what it prints."""
        evidence = collect(self.folder.path)
        found = diagnose(evidence)
        return found, "\n".join(report(evidence, found))
