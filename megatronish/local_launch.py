"""`--nproc N`: start N processes of the same command on this machine, through torch's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid


def run_local(arguments: list[str], nproc: int) -> int:
    """Run `python -m megatronish ARGUMENTS` in `nproc` processes that know each other; the exit code of the first that failed, or 0.

    When one ends badly the others are stopped. Output goes to this process's."""
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
        run_id=uuid.uuid4().hex[:8],
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "megatronish", *arguments)
    except ChildFailedError as error:
        first = min(error.failures.values(), key=lambda failure: failure.timestamp)
        return first.exitcode if first.exitcode > 0 else 1
    return 0
