"""Exceptions whose text is for the user."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. Its text is one line or several problems, one a line: what was given, what was needed, which key to change.

    The command line prints it without a traceback and exits with code 2."""


class RunStopped(RuntimeError):
    """A run that must not go on, through no fault of input or code: its numbers are not finite. Its text is one line for the user.

    The command line prints it without a traceback and exits with code 1. Every rank raises the same."""


def exit_code_of(error: BaseException) -> int | None:
    """The exit code of an error whose text is all that a user needs; None for any other."""
    if isinstance(error, UserError):
        return 2
    return 1 if isinstance(error, RunStopped) else None
