"""Every planted fault is found, named first, and with the rank that is wrong."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from megatronish.preflight.check import Verdict, check
from megatronish.preflight.classes import Plan, RankFailed
from megatronish.preflight.rehearse import Microbatches
from megatronish.preflight.rehearse_job import rehearse_job
from tests.preflight import collective_faults, pipeline_faults  # noqa: F401 - they fill the table
from tests.preflight.collective_faults import DATA, one_replica_cuts_other_buckets
from tests.preflight.faults import FAULTS, Fault, planted, with_evaluation


def verdict_of(fault: Fault, device_kind: str, *, microbatches: Microbatches | None = None) -> Verdict:
    plan = Plan(with_evaluation(fault.case), fault.case.world_size, device_kind, microbatches or fault.microbatches, False)
    with planted(fault):
        return check(rehearse_job(plan, processes=0).job, device_kind)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_first_with_its_rank(name: str) -> None:
    fault = FAULTS[name]
    verdict = verdict_of(fault, "cuda")
    assert not verdict.ok, "not found"
    first = verdict.findings[0]
    assert [words for words in fault.says if words not in str(first)] == [], str(first)
    assert (first.kind, first.culprits) == (fault.kind, fault.culprits), str(first)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.also_on_cpu is not None])
def test_what_hangs_with_nccl_only_is_sound_on_cpus(name: str) -> None:
    fault = FAULTS[name]
    verdict = verdict_of(fault, "cpu")
    assert verdict.ok != fault.also_on_cpu, verdict.findings
    assert verdict.ok or verdict.findings[0].culprits == fault.culprits, str(verdict.findings[0])


def test_a_fault_inside_a_middle_microbatch_needs_all_of_them() -> None:
    """What is inferred is not run: README.md says so."""
    fault = FAULTS["one_rank_has_one_more_call_in_a_middle_microbatch"]
    assert verdict_of(fault, "cuda", microbatches="two of each phase").ok


def test_a_rank_whose_own_code_fails_is_named() -> None:
    plan = Plan(with_evaluation(DATA), DATA.world_size, "cuda", "two of each phase", False)
    with patch.object(*one_replica_cuts_other_buckets()), pytest.raises(RankFailed, match=r"^rank 5 \[pp0 dp5 tp0\] fails"):
        rehearse_job(plan, processes=0)


def test_the_table_is_long_enough() -> None:
    assert len(FAULTS) >= 28
