"""The one pool of real processes that all tests share: `ranks(4).run(function, ...)` runs it on ranks 0..3 of gloo groups."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

from megatronish.comm.local_ranks import RankError, RankPool

__all__ = ["MAX_RANKS", "RankError", "Ranks", "ranks", "shut_down", "start_fork_server"]

MAX_RANKS = 8
PRELOAD = (
    "megatronish.verify.preload",
    "megatronish.preflight.preload",
    "megatronish.train",
    "pytest",
    "transformers",
    "tests.preload",
)
"""What processes of any test need."""
_pool = RankPool(preload=PRELOAD)


def start_fork_server() -> None:
    """There is one for all that a process forks, by whichever pool: what it has loaded is decided when it starts."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", *PRELOAD])
    forkserver.ensure_running()


class Ranks:
    """`count` processes, each one rank of a world of that size."""

    def __init__(self, count: int) -> None:
        assert 1 <= count <= MAX_RANKS
        self.count = count

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`RankPool.run` on this many ranks."""
        return _pool.run(self.count, function, *args, **kwargs)


def ranks(count: int) -> Ranks:
    """See Ranks."""
    return Ranks(count)


def shut_down() -> None:
    """End all processes of the pool."""
    _pool.close()
