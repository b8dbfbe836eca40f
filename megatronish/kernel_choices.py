"""Which kernels a run takes: rank 0 decides, all ranks run the same; RUN/kernels.json and every checkpoint keep it.

On CPU nothing is measured or agreed. A rehearsal, which has no device, communicates as the run does and decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatronish.comm import all_reduce
from megatronish.comm.host import read_values
from megatronish.config import Config
from megatronish.errors import UserError
from megatronish.json_file import write_json
from megatronish.kernel_cases import cases
from megatronish.kernels.dispatch import UNMEASURED, Case, Decision, as_keys, decide, read_decisions
from megatronish.kernels.registry import bodies_of, choose
from megatronish.parallel.mesh import Mesh

FILE_NAME = "kernels.json"
"""In the run folder."""


def choose_kernels(config: Config, mesh: Mesh, *, before: Sequence[Decision], tell: Callable[[str], None]) -> list[Decision]:
    """Decide and begin to use it; a line a decision for `tell`. A UserError, on every rank, if a body that the config forces, or
    that rank 0 has taken, cannot run on one of them. Collective over the job on GPUs; waits for the device."""
    forced = config.kernels.forced
    wanted = cases(config, mesh.size("tp"))
    is_rehearsal = mesh.device.type == "meta"

    def decided() -> list[Decision]:
        # All ranks refuse what is forced and impossible; rank 0 alone measures, and the others wait for it.
        own = wanted if mesh.device_kind == "cpu" or mesh.rank == 0 else [c for c in wanted if c.kernel.chosen_as in forced]
        if is_rehearsal:
            return []
        return decide(own, forced=forced, before=before, device=mesh.device, deterministic=config.train.deterministic)

    decisions = decided() if mesh.device_kind == "cpu" else _agree(mesh, wanted, decided)
    choose(forced={} if is_rehearsal else forced, measured=as_keys(decisions, mesh.device.type))
    unmeasured = [d for d in decisions if d.why == UNMEASURED]
    if unmeasured:
        tell(f"kernels: {', '.join(f'{d.choice} {d.implementation}' for d in unmeasured)} ({UNMEASURED})")
    for decision in decisions:
        if decision not in unmeasured:
            tell(f"kernels: {decision.describe()}")
    return decisions


def _agree(mesh: Mesh, wanted: Sequence[Case], decided: Callable[[], list[Decision]]) -> list[Decision]:
    """Rank 0's decisions, on every rank; what they are for, and why, is in rank 0's words there alone. Collective over the job."""
    names = [list(bodies_of(case.kernel.chosen_as)) for case in wanted]
    numbers, decisions, failure = [0] * len(wanted), [], None
    try:
        decisions = decided()
        if mesh.rank == 0 and decisions:
            numbers = [of_case.index(d.implementation) for of_case, d in zip(names, decisions, strict=True)]
    except Exception as error:
        failure = error
    numbers = _everywhere(mesh, failure, numbers)
    if mesh.rank != 0 and mesh.device.type != "meta":
        rows = zip(wanted, names, numbers, strict=True)
        try:  # as if the config said so: a rank that cannot run what rank 0 took says it now
            taken = [decide([c], forced={c.kernel.chosen_as: of_case[n]}, device=mesh.device)[0] for c, of_case, n in rows]
            decisions = [replace(decision, why="decided by rank 0") for decision in taken]
        except Exception as error:
            failure = error
    _everywhere(mesh, failure, numbers)
    return decisions


def _everywhere(mesh: Mesh, failure: Exception | None, numbers: list[int]) -> list[int]:
    """The largest of all ranks' numbers. Where one rank has failed, all end, each other one with a line that says so."""
    own = [int(failure is not None), *numbers]
    drawn = all_reduce(torch.tensor(own, device=mesh.device), mesh.groups["world"], "max", what="choice of kernels")
    has_failed, *largest = (int(number) for number in read_values(drawn, own))
    if failure is not None:
        raise failure
    if has_failed:
        raise UserError("another rank cannot run a kernel that was chosen; its own line says which, why, and what to set")
    return largest


def decisions_before(folder: Path, numbers: Any) -> list[Decision]:
    """What a checkpoint says (`numbers`, of a run that is resumed), else RUN/kernels.json, else nothing."""
    if saved := read_decisions(numbers):
        return saved
    try:
        return read_decisions(json.loads((folder / FILE_NAME).read_text()))
    except (OSError, ValueError):
        return []


def use_saved(config: Config, folder: Path, device: torch.device) -> None:
    """For programs that read a run: what its config forces, else what the run took. Nothing is measured."""
    choose(forced=config.kernels.forced, measured=as_keys(decisions_before(folder, None), device.type))


def write_decisions(folder: Path, decisions: Sequence[Decision]) -> None:
    """RUN/kernels.json. One process calls this."""
    write_json(folder / FILE_NAME, [decision.saved() for decision in decisions])
