"""Exceptions whose text is for the user."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. Its text is one line or several problems, one a line: what was given, what was needed, which key to change.

    The command line prints it without a traceback and exits with code 2."""
