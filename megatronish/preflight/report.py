"""The page on a rehearsed job, for whoever will submit it: one HTML file that needs nothing else, neither network nor server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatronish.parallel.mesh import AXES
from megatronish.preflight.findings import Finding
from megatronish.preflight.job import Job
from megatronish.preflight.page_data import communication, counts, schedule
from megatronish.preflight.traffic import traffic_of

LIMITS = (
    "Data-dependent control flow, transport, numerics and memory fragmentation are outside: what a network, a file system, a value "
    "or an allocator does is not known here.",
    "The proof holds for the program that was recorded, under the rules stated above.",
    "Time is in units: a forward of a chunk takes 1, a backward 2, communication nothing. It shows order and idle time only.",
    "Bytes sent are those of rings along the group; a backend may choose trees, or let the switch add.",
)
MOST_PROBLEMS = 50
"""Written out on the page; the rest is counted."""
MOST_NAMED = 6
"""Ranks of a problem that are named; the rest is counted."""

ADVICE = {
    "members": "Let every rank of a group build it from the same list of ranks, in the same order (MeshShape.ranks_along).",
    "collective": "At the call sites above, look for a condition on a rank, a stage or local data: every rank of a group must come "
    "to the same calls, in one order, with one dtype, size and reduce operation.",
    "exchange": "Compare what the two ends do at the call sites above: what one sends, the other must receive in the same "
    "exchange, with the same dtype and size. Every stage reads its list from pipeline/lower.py.",
    "left over": "One end posts a message that the other never meets: look, at the call sites above, whether both run the same "
    "number of microbatches and of exchanges.",
    "order": "Let all ranks come to the groups in one order, or wait for the first call before the second is made.",
    "hang": "Break the circle at any one of its waits: post sends and receives of both ends as one exchange, let all ranks come to "
    "the groups in one order, or move a host wait behind the call that the others need.",
}
"""What to change, by kind of problem."""


@dataclass(frozen=True)
class ReportFacts:
    """What the page says. All texts are plain text."""

    name: str
    """Of the config."""
    job: Job
    num_nodes: int
    gpus_per_node: int
    device_kind: str
    problems: Sequence[Finding] = ()
    """First divergent first; empty if the job is sound."""
    certificate: Mapping[str, str] = field(default_factory=dict)
    """E.g. hash of the resolved config, of the code, torch's version, hash of the logs, date."""
    proved: Sequence[str] = ()
    """What was checked, with counts and rules."""
    summary: Mapping[str, str] = field(default_factory=dict)
    """Of the resolved config."""
    config_text: str = ""
    """The resolved config."""
    num_actions_run: int = 0
    """Forwards and backwards of microbatches, of the ranks that ran."""
    num_actions_inferred: int = 0
    seconds: float = 0.0
    warnings: Sequence[str] = ()
    limits: Sequence[str] = LIMITS


def write_report(path: Path, facts: ReportFacts) -> None:
    """Write the page to `path`."""
    path.write_text(render(facts), encoding="utf-8")


def render(facts: ReportFacts) -> str:
    """The page."""
    template = (files("megatronish.preflight") / "page.html").read_text(encoding="utf-8")
    data = json.dumps(page_data(facts), separators=(",", ":"), ensure_ascii=False)
    verdict = verdict_of(facts)
    # "<" only ever stands in strings of JSON: written so, no text can end the script element.
    parts = {"TITLE": escape(f"{verdict}: {facts.name}"), "VERDICT": escape(verdict), "DATA": data.replace("<", "\\u003c")}
    for name, text in parts.items():
        before, marker, after = template.partition(f"@@{name}@@")
        assert marker, f"page.html has no place for {name}"
        template = before + text + after
    return template


def verdict_of(facts: ReportFacts) -> str:
    """In a few words."""
    number = len(facts.problems)
    return "Sound" if not number else f"{number:,} problem{'s' if number > 1 else ''}"


def page_data(facts: ReportFacts) -> dict[str, Any]:
    """All that the page's script draws."""
    job, traffic = facts.job, traffic_of(facts.job)
    return {
        "name": facts.name,
        "verdict": verdict_of(facts),
        "sound": not facts.problems,
        "problems": [_problem(problem, job) for problem in facts.problems[:MOST_PROBLEMS]],
        "problemsLeftOut": max(0, len(facts.problems) - MOST_PROBLEMS),
        "layout": layout(facts),
        "ranks": [job.num_ranks, job.num_run],
        "actions": [facts.num_actions_run, facts.num_actions_inferred],
        "seconds": facts.seconds,
        "device": facts.device_kind,
        "certificate": dict(facts.certificate),
        "proved": list(facts.proved),
        "summary": dict(facts.summary),
        "config": facts.config_text,
        "warnings": [*facts.warnings, *placement_warnings(facts)],
        "limits": list(facts.limits),
        "schedule": schedule(job, facts.problems[0] if facts.problems else None),
        "communication": communication(traffic, gpus_per_node=facts.gpus_per_node),
        "counts": counts(traffic),
    }


def layout(facts: ReportFacts) -> dict[str, Any]:
    """Sizes of the axes and of the cluster."""
    shape = facts.job.shape
    axes = {axis: getattr(shape, axis) for axis in AXES if getattr(shape, axis) > 1 or axis in ("pp", "dp", "tp")}
    return {"axes": axes, "nodes": facts.num_nodes, "gpus": facts.gpus_per_node}


def placement_warnings(facts: ReportFacts) -> list[str]:
    """Tensor groups that leave their node: each layer waits for them."""
    shape, gpus = facts.job.shape, facts.gpus_per_node
    nodes = max(len({member // gpus for member in shape.ranks_along("tp", rank)}) for rank in range(0, shape.num_ranks, shape.tp))
    if nodes == 1:
        return []
    return [
        f"parallel.tensor={shape.tp} on nodes of {gpus} GPUs: a tensor group spans {nodes} nodes, and every layer waits for the "
        f"network between them; use a divisor of {gpus}"
    ]


def _problem(problem: Finding, job: Job) -> dict[str, Any]:
    return {
        "kind": problem.kind,
        "text": str(problem),
        "culprits": _named(problem.culprits, job),
        "others": _named(problem.others, job),
        "advice": ADVICE.get(problem.kind, ""),
    }


def _named(ranks: Sequence[int], job: Job) -> list[str]:
    names = [job.name(rank) for rank in ranks[:MOST_NAMED]]
    return names + ([f"{len(ranks) - MOST_NAMED:,} more"] if len(ranks) > MOST_NAMED else [])
