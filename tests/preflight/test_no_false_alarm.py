"""Layouts that real ranks run are sound in preflight too, for both kinds of device: it raises no false alarm."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import pytest
import torch

from megatronish.preflight.check import check
from megatronish.preflight.classes import Plan
from megatronish.preflight.rehearse_job import PRELOAD, rehearse_job
from tests.parallel.parity import Case
from tests.parallel.points import all_cases, case_of, pairwise_points
from tests.preflight.faults import DEVICE_KINDS, with_evaluation

SPREAD = 30
"""Every such case of the whole matrix: prime to the lengths of its axes but 2, 3 and 5, so that all values occur."""


def alarms(case: Case, device_kind: str) -> list[str]:
    """What preflight has against a case, as the command rehearses it."""
    plan = Plan(with_evaluation(case), case.world_size, device_kind, "two of each phase", False)
    verdict = check(rehearse_job(plan, processes=0).job, device_kind)
    assert verdict.ok == (not verdict.findings) and (verdict.num_calls > 0 or case.world_size == 1)
    return [f"{case} on {device_kind}: {finding}" for finding in verdict.findings]


def alarms_of_all(cases: Sequence[Case]) -> list[str]:
    """`alarms` of many cases, on all cores."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    jobs = list(product(cases, DEVICE_KINDS))
    # One thread: the fork server has loaded torch, and a forked OpenMP pool would hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = pool.map(alarms, *zip(*jobs, strict=True), chunksize=4)
        return [alarm for of_case in found for alarm in of_case]


@pytest.mark.slow
def test_no_layout_of_the_pairwise_cover_raises_an_alarm() -> None:
    assert alarms_of_all([case_of(point) for point in pairwise_points()]) == []


@pytest.mark.slow
def test_no_layout_of_a_spread_of_the_matrix_raises_an_alarm() -> None:
    assert alarms_of_all(all_cases()[::SPREAD]) == []


@pytest.mark.parity_all
@pytest.mark.timeout(3600)
def test_no_layout_of_the_matrix_raises_an_alarm() -> None:
    assert alarms_of_all(all_cases()) == []
