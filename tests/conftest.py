"""Shared by all tests: the checkout's root, and settings that make a run repeatable on a busy machine."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from hypothesis import settings

from tests.ranks import start_fork_server

# No deadline: the machine may be shared. Derandomized: the same examples every time.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_sessionstart(session: pytest.Session) -> None:
    """A worker of `make test` will need the fork server: it loads while tests are collected."""
    if hasattr(session.config, "workerinput"):
        start_fork_server()


def pytest_collection_finish() -> None:
    """What was imported stays; looking through it took 0.2 s of each of Python's own collections."""
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent
