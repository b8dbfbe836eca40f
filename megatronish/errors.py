"""Exceptions whose text is for the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


class UserError(ValueError):
    """Bad input. Its text is one line or several problems, one a line: what was given, what was needed, which key to change.

    The command line prints it without a traceback and exits with code 2."""


class Problems:
    """What is wrong with several things that do not depend on each other: all of it is said at once, each line under its key."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def attempt(self, key: str, act: Callable[[], Found]) -> Found | None:
        """What `act` gives; None if it raised a UserError, which is kept."""
        try:
            return act()
        except UserError as error:
            self._lines += [line if key in line else f"{key}: {line}" for line in str(error).splitlines()]
            return None

    def raise_all(self) -> None:
        """UserError, a line a problem, unless there are none."""
        if self._lines:
            raise UserError("\n".join(self._lines))


class RunStopped(RuntimeError):
    """A run that must not go on, through no fault of input or code: its numbers are not finite. Its text is one line for the user.

    The command line prints it without a traceback and exits with code 1. Every rank raises the same."""


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error whose text is all that a user needs; None for any other."""
    if isinstance(error, UserError):
        return 2
    return 1 if isinstance(error, RunStopped) else None
