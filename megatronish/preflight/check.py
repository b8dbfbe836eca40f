"""The verdict on a job: does all that its ranks communicate match, and does it end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatronish.preflight.coding import CodedJob
from megatronish.preflight.findings import Finding
from megatronish.preflight.job import Job
from megatronish.preflight.match import match_coded
from megatronish.preflight.order import Rule, check_order


@dataclass(frozen=True)
class Verdict:
    """What was found out about a job."""

    findings: tuple[Finding, ...]
    """First divergent first; empty if the job is sound."""
    passes: Mapping[Rule, bool]
    """By rule of `order.py`, whether the job ends. Empty if calls do not match: then it is not asked."""
    num_calls: int
    """Of all ranks together, each message one."""
    num_collectives: int
    """Matched, each counted once for its group; 0 with findings."""
    num_messages: int
    """Matched, each counted once for its two ends; 0 with findings."""
    num_groups: int
    num_simulated: int
    """Ranks that stood for all when the order was checked."""

    @property
    def ok(self) -> bool:
        return not self.findings


def check(job: Job, device_kind: str, *, every_rank: bool = False) -> Verdict:
    """Match a job's calls, then ask whether they end on GPUs (`cuda`, NCCL) or on CPUs (`cpu`, gloo).

    every_rank: let no rank stand for others in the simulation of the order; the answer is the same."""
    coded = CodedJob(job)
    matched = match_coded(coded)
    num_calls = sum(coded.num_calls[log] for log in job.log_of)
    if matched.findings:
        return Verdict(tuple(matched.findings), {}, num_calls, 0, 0, matched.num_groups, 0)
    order = check_order(coded, device_kind, every_rank=every_rank)
    findings = () if order.finding is None else (order.finding,)
    counts = (num_calls, matched.num_collectives, matched.num_messages, matched.num_groups)
    return Verdict(findings, order.passes, *counts, order.num_simulated)
