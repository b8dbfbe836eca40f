"""The one pool of real processes that all tests share: `ranks(4).run(function, ...)` runs it on ranks 0..3 of gloo groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatronish.comm.local_ranks import RankError, RankPool

__all__ = ["MAX_RANKS", "RankError", "Ranks", "ranks", "shut_down"]

MAX_RANKS = 8
_pool = RankPool(preload=("megatronish.verify.preload",))


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
