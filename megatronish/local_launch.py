"""`--nproc N`: start N processes of the same command on this machine, through torch's elastic launcher."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import uuid
from pathlib import Path

from megatronish.errors import UserError
from megatronish.parallel.rendezvous import Place

_RUN_ID = "local-"
_PR_SET_PDEATHSIG = 1


def run_local(arguments: list[str], nproc: int) -> int:
    """Run `python -m megatronish ARGUMENTS` in `nproc` processes that know each other; the exit code: 0, 2 for bad input, 130 after
    Ctrl-C, 1 for any other failure.

    When one ends badly the others are stopped. Output goes to this process's."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its report of a failed child repeats, over a screen, what the child has printed itself.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # torchrun warns about this variable when it is not set; train.cpu_threads decides in any case.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"{_RUN_ID}{os.getpid()}-{uuid.uuid4().hex[:8]}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    pass_on_requests()
    if nproc > 1:
        print(f"starting {nproc} local processes", file=sys.stderr)
    try:
        elastic_launch(config, sys.executable)("-m", "megatronish", *arguments)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
                print(f"rank {rank} of {nproc} was ended by {signal.Signals(-failure.exitcode).name}{hint}", file=sys.stderr)
        codes = [failure.exitcode for failure in error.failures.values()]
        # Bad input is the reason where one rank reports it and others only see it go.
        return 2 if 2 in codes else 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def pass_on_requests() -> None:
    """In the launcher: SIGUSR2, which asks a rank what it is doing (`observe/post_mortem.py`), goes on to all ranks. Processes
    started from here hold it back until they listen: by default it would end them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})

    def pass_on() -> None:
        while True:
            signal.sigwait({signal.SIGUSR2})
            for pid in children_of(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGUSR2)

    threading.Thread(target=pass_on, name="pass on requests", daemon=True).start()


def children_of(pid: int) -> list[int]:
    """Processes that `pid` has started; none where there is no /proc."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(file.parent.name))
    return found


def must_launch(place: Place, nproc: int | None) -> bool:
    """Whether `--nproc` asks for new processes; not in a rank. UserError where a launcher has started another number of them."""
    if nproc is None or place.world_size == nproc:
        return False
    # A step of one task, such as the shell of `srun --pty bash`, is one process like any other.
    if place.world_size > 1:
        raise UserError(
            f"--nproc {nproc}, but the environment says WORLD_SIZE={place.world_size}: the launcher starts the processes, "
            "leave --nproc out"
        )
    return True


def end_with_launcher(place: Place) -> None:
    """In a rank that `run_local` started: ask Linux to kill it when the launcher is gone, however it went. Ranks have sessions of
    their own, so a launcher killed by SIGKILL would leave them running."""
    if not place.run_id.startswith(_RUN_ID) or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(place.run_id.split("-")[1]):  # it went before that call
        sys.exit(1)
