"""Layouts that real ranks run are sound in preflight too, for both kinds of device: it raises no false alarm."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, product

import pytest
import torch

from megatronish.preflight.check import check
from megatronish.preflight.classes import Plan
from megatronish.preflight.rehearse_job import PRELOAD, rehearse_job
from tests.parallel.parity import Case
from tests.parallel.points import all_cases, case_of, pairwise_points
from tests.preflight.faults import DEVICE_KINDS, with_evaluation

SPREAD = 61
"""Every such case of the whole matrix: prime, so that it is no multiple of the period of any axis."""


def alarms(case: Case, device_kind: str) -> list[str]:
    """What preflight has against a case, as the command rehearses it."""
    plan = Plan(with_evaluation(case), case.world_size, device_kind, "two of each phase", False)
    verdict = check(rehearse_job(plan, processes=0).job, device_kind)
    assert verdict.ok == (not verdict.findings) and (verdict.num_calls > 0 or case.world_size == 1)
    return [f"{case} on {device_kind}: {finding}" for finding in verdict.findings]


def alarms_of_all(jobs: Sequence[tuple[Case, str]]) -> list[str]:
    """`alarms` of many cases, each on a kind of device; on all cores."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    # One thread: the fork server has loaded torch, and a forked OpenMP pool would hang.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = pool.map(alarms, *zip(*jobs, strict=True), chunksize=4)
        return [alarm for of_case in found for alarm in of_case]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on two idle cores
def test_no_layout_of_a_pairwise_cover_or_a_spread_of_the_matrix_raises_an_alarm() -> None:
    cover = product(map(case_of, pairwise_points()), DEVICE_KINDS)
    spread = zip(all_cases()[::SPREAD], cycle(DEVICE_KINDS), strict=False)
    assert alarms_of_all([*cover, *spread]) == []


@pytest.mark.parity_all
@pytest.mark.timeout(7200)
def test_no_layout_of_the_matrix_raises_an_alarm() -> None:
    assert alarms_of_all(list(product(all_cases(), DEVICE_KINDS))) == []
