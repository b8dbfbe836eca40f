"""Shared by all tests: the checkout's root, and settings that make a run repeatable on a busy machine."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.ranks import start_fork_server

# Triton kernels run in its interpreter where there is no GPU. Triton asks for it once, when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# No deadline: the machine may be shared. Derandomized: the same examples every time.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# Threads that share a core with others wait for each other: the plain model of the parity check took 0.45 s of CPU on two threads
# of a busy machine, 0.045 on one.
torch.set_num_threads(1)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A worker of `make test` will need the fork server: it loads while tests are collected."""
    if hasattr(session.config, "workerinput"):
        start_fork_server()


LONGEST_FIRST = (
    "launch/test_real_launchers.py",
    "verify/test_verify.py",
    "preflight/test_rehearse.py",
    "parallel/test_parity.py",
    "parallel/test_drift.py",
    "preflight/test_no_false_alarm.py",
    "interop/test_export_import.py",
    "test_resume.py",
    "test_not_finite.py",
    "test_train.py",
    "models/test_llama_truth.py",
    "test_wrong_environment.py",
)
"""Files are handed out one by one: a long one that comes last keeps one worker busy while the others have nothing to do."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """LONGEST_FIRST, then all others as they come."""
    here = Path(__file__).resolve().parent
    place = {here / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """What was imported stays; looking through it took 0.2 s of each of Python's own collections."""
    gc.freeze()


TABLE = "table for the reader"
"""The name of a property (record_property) whose text is printed at the end, from whichever worker it comes."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables of tests, which a worker's own output would not show."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    tables = [text for report in reports for name, text in getattr(report, "user_properties", []) if name == TABLE]
    for text in tables:
        terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent
