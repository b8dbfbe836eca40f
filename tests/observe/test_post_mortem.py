"""What a rank writes when it is asked, when it hangs and when it fails; real hangs are in tests/preflight/test_why_hung.py."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from megatronish.comm.history import Call, History, recording
from megatronish.errors import UserError
from megatronish.observe.post_mortem import FOLDER, SIGNAL, PostMortem, Who, dump_path
from tests.small_run import wait_until

WHO = Who(3, 8, {"pp": 2, "dp": 2, "cp": 1, "ep": 1, "tp": 2}, "pp0 dp1 tp1", "tests/0")
CALL = Call("all_reduce", "tp", 8, "float32", "sum", what="layers.1.mlp.down")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


def read(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(dump_path(run_dir, 3).read_text())
    return values


def test_a_signal_is_answered_while_the_main_thread_is_in_c_code(run_dir: Path) -> None:
    c_code = ctypes.CDLL(None)
    with recording(History()) as history, PostMortem(run_dir, WHO, hang_seconds=0):
        history.groups["tp"] = (2, 3)
        history.begin_wait("tp", history.call(CALL))
        threading.Timer(0.2, os.kill, (os.getpid(), SIGNAL)).start()
        # A handler in Python would run after this. A wait in C++ goes on after a signal; so does this one.
        stop = threading.Event()
        threading.Timer(1.5, stop.set).start()
        while not stop.is_set() and not dump_path(run_dir, 3).exists():
            c_code.usleep(900_000)
        wait_until(dump_path(run_dir, 3).exists, seconds=10, what="the dump")
    values = read(run_dir)
    assert (values["reason"], values["rank"], values["pid"], values["groups"]) == ("signal", 3, os.getpid(), {"tp": [2, 3]})
    assert values["events"][0][:4] == ["Call", "all_reduce", "tp", 8] and values["events"][1][:3] == ["Wait", "tp", 1]
    assert [row[1:] for row in values["entries"]] == [[0, 0, 0], [0, 1, -1]] and values["waiting"] == 1
    assert values["counts"] == [["tp", None, "", 1]]
    assert "test_post_mortem.py" in values["stacks"][0]["frames"][-1]


def test_a_hang_is_written_once_and_taken_back_when_the_rank_goes_on(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("megatronish")
    log.addHandler(caplog.handler)
    try:
        with recording(History()) as history, PostMortem(run_dir, WHO, hang_seconds=0.3):
            history.begin_wait("tp", history.call(CALL))
            wait_until(dump_path(run_dir, 3).exists, seconds=10, what="the dump")
            wait_until(lambda: bool(caplog.records), seconds=10, what="the line")
            assert read(run_dir)["reason"] == "timeout"
            history.end_wait()

            def goes_on() -> bool:
                history.call(CALL)
                return not dump_path(run_dir, 3).exists()

            wait_until(goes_on, seconds=10, what="the end of the dump", often=0.05)
    finally:
        log.removeHandler(caplog.handler)
    (line,) = {record.getMessage() for record in caplog.records}
    assert line.startswith(
        "rank 3 [pp0 dp1 tp1] has been waiting 0 s in all_reduce (sum) of 8 x float32 on tp, layers.1.mlp.down at "
    )
    assert line.endswith(f"wrote {dump_path(run_dir, 3)}; megatronish why-hung {run_dir} says who is missing")


def test_a_failure_is_written_with_its_own_stack(run_dir: Path) -> None:
    with pytest.raises(KeyError), PostMortem(run_dir, WHO, hang_seconds=0):
        _fail()
    values = read(run_dir)
    assert values["reason"] == "crash" and values["error"] == "KeyError: 'no such head'"
    assert values["stacks"][0]["frames"][-1].endswith(" _fail")


def _fail() -> None:
    raise KeyError("no such head")


@pytest.mark.parametrize("error", [None, UserError("bad input")])
def test_a_run_that_ends_as_it_should_writes_no_dump(error: UserError | None, run_dir: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with PostMortem(run_dir, WHO, hang_seconds=0):
            if error:
                raise error
    except UserError:
        pass
    assert not dump_path(run_dir, 3).exists()
    assert error or not (run_dir / FOLDER).exists()
    assert signal.getsignal(signal.SIGINT) is before
    os.kill(os.getpid(), SIGNAL)  # a late one does no harm
