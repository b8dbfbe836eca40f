"""`--nproc N`: start N processes of the same command on this machine, through torch's elastic launcher."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import uuid
from pathlib import Path

from megatronish import failures
from megatronish.end_signals import EndSignals, send_to_children
from megatronish.errors import FAULT, UserError, code_of_job
from megatronish.parallel.launchers import LOCAL_RUN
from megatronish.parallel.rendezvous import Place

_PR_SET_PDEATHSIG = 1
_STOPPED = {-signal.SIGTERM, 128 + signal.SIGTERM}


def run_local(arguments: list[str], nproc: int, *, run_folder: Path | None = None, signals: EndSignals | None = None) -> int:
    """Run `python -m megatronish ARGUMENTS` in `nproc` processes that know each other; the exit code: 0, 130 after Ctrl-C, or what
    `code_of_job` makes of the ranks'.

    When one ends badly the others are stopped, and the first failure in `run_folder` is said last. Output goes to this process's.
    SIGUSR1 and SIGTERM are `signals`' where it is given."""
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
        run_id=f"{LOCAL_RUN}{os.getpid()}-{uuid.uuid4().hex[:8]}",
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
            if failure.exitcode < 0 and failure.exitcode not in _STOPPED:
                hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
                text = f"was ended by {signal.Signals(-failure.exitcode).name}{hint}"
                print(f"rank {rank} of {nproc} {text}", file=sys.stderr)
                if run_folder is not None and run_folder.is_dir():  # it could not leave its reason itself
                    launch = f"{config.run_id}/0"
                    gone = failures.now(rank, nproc, launch, where="here", error=text, code=FAULT, lost_peer=False)
                    failures.leave(run_folder, gone)
        codes = [failure.exitcode for failure in error.failures.values()]
        if signals is not None and signals.told() and set(codes) <= _STOPPED:
            return 128 + signal.SIGTERM  # before there was anything to save
        if run_folder is not None:
            found = failures.of_launch(failures.folder_of(run_folder, f"{config.run_id}/0"))
            codes += [failure.code for failure in found]
            if found:
                print(f"first failure: {found[0].describe(run_folder)}", file=sys.stderr)
        return code_of_job(codes)
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
            send_to_children(signal.SIGUSR2)

    threading.Thread(target=pass_on, name="pass on requests", daemon=True).start()


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
    if not place.run_id.startswith(LOCAL_RUN) or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(place.run_id.split("-")[1]):  # it went before that call
        sys.exit(1)
