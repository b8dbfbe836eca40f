"""Every planted fault is found, named first, and with the rank that is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest.mock import patch

import pytest
import torch

from megatronish.preflight.check import Verdict, check
from megatronish.preflight.classes import Plan, RankFailed
from megatronish.preflight.rehearse import Microbatches
from megatronish.preflight.rehearse_job import PRELOAD, rehearse_job
from tests.preflight import pipeline_faults  # noqa: F401 - it fills the table, too
from tests.preflight.collective_faults import DATA, one_replica_cuts_other_buckets
from tests.preflight.faults import FAULTS, planted, with_evaluation

RUNS = [(name, "cuda") for name in FAULTS] + [(name, "cpu") for name, fault in FAULTS.items() if fault.also_on_cpu is not None]
VerdictOf = Callable[[str, str], Verdict]


def rehearse_with(name: str, device_kind: str, *, microbatches: Microbatches | None = None) -> Verdict:
    """The verdict on a job with a fault."""
    fault = FAULTS[name]
    plan = Plan(with_evaluation(fault.case), fault.case.world_size, device_kind, microbatches or fault.microbatches, False)
    with planted(fault):
        return check(rehearse_job(plan, processes=0).job, device_kind)


@pytest.fixture(scope="module")
def verdict_of(request: pytest.FixtureRequest) -> Iterator[VerdictOf]:
    """`rehearse_with`; all that the tests of this module will ask for is under way on all cores."""
    parameters = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    wanted = [(chosen["name"], chosen["device_kind"]) for chosen in parameters]
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    # One thread: the fork server has loaded torch, and a forked OpenMP pool would hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {run: pool.submit(rehearse_with, *run) for run in wanted}
        yield lambda name, device_kind: futures[name, device_kind].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("name", "device_kind"), RUNS)
def test_a_planted_fault_is_found_first_with_its_rank(name: str, device_kind: str, verdict_of: VerdictOf) -> None:
    fault, verdict = FAULTS[name], verdict_of(name, device_kind)
    if device_kind == "cpu" and not fault.also_on_cpu:
        assert verdict.ok, str(verdict.findings[0])
        return
    assert not verdict.ok, "not found"
    first = verdict.findings[0]
    assert first.culprits == fault.culprits, str(first)
    if device_kind == "cuda":
        assert [words for words in fault.says if words not in str(first)] == [], str(first)
        assert first.kind == fault.kind, str(first)


def test_a_fault_inside_a_middle_microbatch_is_not_seen_where_that_is_inferred() -> None:
    """A limit, which README.md names: it is found with all microbatches."""
    assert rehearse_with("one_rank_has_one_more_call_in_a_middle_microbatch", "cuda", microbatches="two of each phase").ok


def test_a_rank_whose_own_code_fails_is_named() -> None:
    plan = Plan(with_evaluation(DATA), DATA.world_size, "cuda", "two of each phase", False)
    with patch.object(*one_replica_cuts_other_buckets()), pytest.raises(RankFailed, match=r"^rank 5 \[pp0 dp5 tp0\] fails"):
        rehearse_job(plan, processes=0)


def test_the_table_has_as_many_rows_as_promised() -> None:
    assert len(FAULTS) >= 28
