"""Results of pure functions, kept while a process builds many ranks of one job one after the other: a rehearsal. Off otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

_results: dict[Any, Any] | None = None
F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def remembering() -> Iterator[None]:
    """Functions marked with `remembered` are called once for equal arguments meanwhile."""
    global _results
    before, _results = _results, {}
    try:
        yield
    finally:
        _results = before


def remember_from_now_on() -> None:
    """As `remembering`, until the process ends."""
    global _results
    _results = {}


def remembered(function: F) -> F:
    """Mark a function whose result depends on its (hashable) arguments alone, and is never changed by who gets it."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if _results is None:
            return function(*arguments)
        # A number that remembers what it was asked (preflight/coordinates.py) must not get the answer of another rank's.
        assert not any(isinstance(a, int) and type(a) not in (int, bool) for a in arguments), arguments
        key = (function, arguments)
        if key not in _results:
            _results[key] = function(*arguments)
        return _results[key]

    return call  # type: ignore[return-value]
