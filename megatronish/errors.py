"""Exceptions whose text is for the user."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TypeVar

Found = TypeVar("Found")

BAD_INPUT, SAVED, FAULT, NO_PROGRESS, INTEGRITY, SUPERSEDED = 2, 75, 76, 77, 78, 79
"""Exit codes of `megatronish train`, explained in launch/README.md."""


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


class IntegrityError(UserError):
    """What is on disk is not what was written there. As a UserError, with exit code 78."""


class Fault(UserError):
    """What another start may cure: ranks that have not come, a disk that failed. As a UserError, with exit code 76."""


_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.ENOTCONN, errno.ECONNRESET}


def may_pass(error: OSError) -> bool:
    """Whether the same act may succeed a moment later, or on another node."""
    return error.errno in _PASSING


def disk_error(number: int | None) -> type[UserError]:
    """What a disk's error `number` is to the user: a Fault where it may pass, a UserError where somebody has to change something
    (it is full, read-only, not theirs)."""
    return Fault if number in _PASSING else UserError


class RunStopped(RuntimeError):
    """A run that must not go on, through no fault of input or code: its numbers are not finite. Its text is one line for the user.

    The command line prints it without a traceback and exits with code 77: another start would come to the same end. Every rank
    raises the same."""


class Superseded(RunStopped):
    """A later life of the run has begun: this one must write nothing any more. Exit code 79."""


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error whose text is all that a user needs; None for any other."""
    kinds = {
        IntegrityError: INTEGRITY,
        Fault: FAULT,
        UserError: BAD_INPUT,
        Superseded: SUPERSEDED,
        RunStopped: NO_PROGRESS,
    }
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), None)


def code_of_job(codes: Iterable[int]) -> int:
    """A job's exit code from its ranks' (below 0, or above 128: ended by a signal). A reason that one rank gives goes before what
    the others see of it."""
    found = set(codes) - {0}
    for reason in (BAD_INPUT, INTEGRITY, NO_PROGRESS, SUPERSEDED):
        if reason in found:
            return reason
    return 0 if not found else SAVED if found == {SAVED} else FAULT
