"""Shared by all tests: the checkout's root, and settings that make a run repeatable on a busy machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: the machine may be shared. Derandomized: the same examples every time.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent
