"""`megatronish why-hung` names the right rank in real hangs of real processes on gloo."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from megatronish.observe.post_mortem import SIGNAL, PostMortem, Who, dump_path, stacks_path
from megatronish.preflight.dumps import Dump, NoDumps, collect
from tests.preflight import hangs
from tests.preflight.hangs import STEP, Fault, HungRun
from tests.small_run import kill_group, losses, megatronish, start, wait_until, write_run

DATA_3 = ("parallel.data=3", "train.global_batch_size=12")
GRID = ("parallel.tensor=2", "parallel.data=2")
PIPELINE = ("parallel.pipeline=2", "parallel.data=1")
PIPELINE_2 = ("parallel.pipeline=2", "parallel.data=2")


class Case(NamedTuple):
    fault: Fault
    overrides: tuple[str, ...]
    num_ranks: int
    culprit: int
    says: tuple[str, ...]
    """Parts of what is printed."""
    is_silent: bool = False
    """The culprit writes nothing."""


CASES = [
    Case(hangs.killed, DATA_3, 3, 1, ("is gone", "killed from outside"), is_silent=True),
    Case(hangs.stopped, DATA_3, 3, 1, ("is stopped", "kill -CONT", "number of targets"), is_silent=True),
    Case(hangs.failed, DATA_3, 3, 2, ("ValueError: no such head", "tests/preflight/hangs.py")),
    Case(hangs.stuck_in_the_loader, DATA_3, 3, 1, ("megatronish/data/loader.py", "number of targets", "train step 4")),
    Case(hangs.stuck_in_a_loop, DATA_3, 3, 2, ("megatronish/trainer.py", "train step 3", "hangs.py")),
    Case(hangs.holds_the_lock, DATA_3, 3, 0, ("C code does not give back Python's lock", "hangs.py"), is_silent=True),
    Case(hangs.never_builds, DATA_3, 3, 2, ("in open on", "hangs.py")),
    Case(hangs.skips_a_collective, DATA_3, 3, 2, ("number of targets at megatronish/trainer.py",)),
    Case(hangs.calls_one_twice, DATA_3, 3, 1, ("train_step", "count_targets")),
    Case(hangs.wrong_count, DATA_3, 3, 1, ("100,000 x float32", "number of targets")),
    Case(hangs.rank_dependent_norm, DATA_3, 3, 0, ("skips all_reduce", "loss and gradient norm", "join_scalars")),
    Case(hangs.evaluates_alone, (*DATA_3, "train.eval_interval=1000"), 3, 1, ("held-out loss", "evaluate step 3")),
    Case(
        hangs.inverts_two_groups,
        GRID,
        4,
        3,
        ("barrier on dp", "barrier on world", "where rank 0 [pp0 dp0 tp0] and ranks 1 and 2 do"),
    ),
    Case(hangs.wrong_group, GRID, 4, 2, ("loss and gradient norm", "on dp")),
    Case(hangs.misses_a_receive, PIPELINE_2, 4, 3, ("receive of",)),
    Case(
        hangs.one_microbatch_fewer,
        PIPELINE,
        2,
        1,
        ("gradient 2 of part 1", "where it did receive", "activation 3 of part 0 a step before"),
    ),
]


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("hangs"), observe={"hang_seconds": 1.0})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fault.__name__)
def test_why_hung_names_the_rank(case: Case, config_path: Path) -> None:
    silent = {case.culprit} if case.is_silent else set()

    def hangs_there(dump: Dump) -> bool:
        has_come = case.fault is hangs.never_builds or dump.moment.step >= STEP
        return dump.reason == "crash" or (dump.reason == "timeout" and has_come)

    overrides = (f"name={case.fault.__name__}", *case.overrides)
    with HungRun(config_path, *overrides, num_ranks=case.num_ranks, fault=case.fault, culprit=case.culprit) as run:
        run.wait(silent, hangs=hangs_there)
        if case.fault is hangs.holds_the_lock:
            file = stacks_path(run.folder.path, case.culprit)
            wait_until(lambda: file.stat().st_size > 0, seconds=20.0, what="faulthandler's stacks")
        run.ask(silent)
        found, text = run.diagnose()
    print(text)
    assert found.culprits == (case.culprit,), text
    assert all(part in text for part in case.says), text


def test_a_run_that_goes_on_is_not_called_hung(config_path: Path, tmp_path: Path) -> None:
    arguments = ("parallel.data=2", "name=slow", "train.steps=100000", "checkpoint.interval=null", "observe.hang_seconds=300.0")
    run = config_path.parent / "runs" / "slow"
    launcher = start("train", str(config_path), *arguments, "--nproc", "2", stderr=tmp_path / "stderr")
    try:
        wait_until((run / "logs").exists, seconds=60.0, what="the run's folder")
        launcher.send_signal(SIGNAL)  # before any rank listens: no harm
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3, seconds=120.0, what="step 4")
        launcher.send_signal(SIGNAL)
        paths = [dump_path(run, rank) for rank in range(2)]
        wait_until(lambda: all(path.exists() for path in paths), seconds=30.0, what="the dumps", often=0.1)
        steps = len(losses(run))
        wait_until(lambda: len(losses(run)) > steps + 3, seconds=60.0, what="more steps")
        found = megatronish("why-hung", str(run))
        assert found.returncode == 1 and "no rank hangs" in found.stdout and "2 of 2 ranks wrote" in found.stdout, found
    finally:
        kill_group(launcher)


def test_why_hung_without_dumps_says_how_to_get_them(tmp_path: Path) -> None:
    missing = megatronish("why-hung", str(tmp_path / "nothing"))
    assert missing.returncode == 2 and "there is no such folder" in missing.stderr
    without = megatronish("why-hung", str(tmp_path))
    assert without.returncode == 2 and "kill -USR2" in without.stderr and "scancel --signal=USR2" in without.stderr
    (tmp_path / "post_mortem").mkdir()
    dump_path(tmp_path, 0).write_text('{"rank": 0}')
    broken = megatronish("why-hung", str(tmp_path))
    assert broken.returncode == 2 and "is not a dump" in broken.stderr


def test_a_dump_taken_back_while_dumps_are_read_is_one_less(tmp_path: Path) -> None:
    shape = {"pp": 1, "dp": 2, "cp": 1, "ep": 1, "tp": 1}
    for rank in range(2):
        who = Who(rank, 2, shape, f"pp0 dp{rank} tp0", "tests/0")
        with pytest.raises(RuntimeError), PostMortem(tmp_path, who, hang_seconds=0):
            raise RuntimeError
    dump_path(tmp_path, 0).unlink()
    dump_path(tmp_path, 0).symlink_to("taken back")  # the folder lists it, and there is nothing to open
    assert set(collect(tmp_path).dumps) == {1}
    dump_path(tmp_path, 1).unlink()
    with pytest.raises(NoDumps):
        collect(tmp_path)
