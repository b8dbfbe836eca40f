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
from megatronish.json_file import write_json
from megatronish.kernel_cases import cases
from megatronish.kernels.dispatch import UNMEASURED, Case, Decision, as_keys, decide, read_decisions
from megatronish.kernels.registry import bodies_of, choose
from megatronish.parallel.mesh import Mesh

FILE_NAME = "kernels.json"
"""In the run folder."""


def choose_kernels(config: Config, mesh: Mesh, *, before: Sequence[Decision], tell: Callable[[str], None]) -> list[Decision]:
    """Decide and begin to use it; a line a decision for `tell`. Refused (a UserError), on every rank, if a body that the config
    forces cannot run here. Collective over the job on GPUs; waits for the device."""
    forced = config.kernels.forced
    wanted = cases(config, mesh.size("tp"))
    is_rehearsal = mesh.device.type == "meta"
    decisions: list[Decision] = []
    if not is_rehearsal:
        # All ranks refuse what is forced and impossible; rank 0 alone measures, and the others wait for it.
        own = wanted if mesh.device_kind == "cpu" or mesh.rank == 0 else [c for c in wanted if c.kernel.chosen_as in forced]
        decisions = decide(own, forced=forced, before=before, device=mesh.device, deterministic=config.train.deterministic)
    if mesh.device_kind != "cpu":
        decisions = _agree(mesh, wanted, decisions)
    choose(forced={} if is_rehearsal else forced, measured=as_keys(decisions, mesh.device.type))
    unmeasured = [d for d in decisions if d.why == UNMEASURED]
    if unmeasured:
        tell(f"kernels: {', '.join(f'{d.choice} {d.implementation}' for d in unmeasured)} ({UNMEASURED})")
    for decision in decisions:
        if decision not in unmeasured:
            tell(f"kernels: {decision.describe()}")
    return decisions


def _agree(mesh: Mesh, wanted: Sequence[Case], decisions: list[Decision]) -> list[Decision]:
    """Rank 0's decisions, on every rank; what they are for, and why, is in rank 0's words there alone. Collective over the job."""
    names = [list(bodies_of(case.kernel.chosen_as)) for case in wanted]
    own = [0] * len(wanted)
    if decisions and mesh.rank == 0:
        own = [of_case.index(d.implementation) for of_case, d in zip(names, decisions, strict=True)]
    drawn = all_reduce(
        torch.tensor(own, dtype=torch.int64, device=mesh.device), mesh.groups["world"], "max", what="choice of kernels"
    )
    numbers = [int(number) for number in read_values(drawn, own)]
    if mesh.device.type == "meta" or mesh.rank == 0:
        return decisions
    # As if the config said so: a rank that cannot run what rank 0 took says it now.
    mine = [
        decide([case], forced={case.kernel.chosen_as: of_case[number]}, device=mesh.device)[0]
        for case, of_case, number in zip(wanted, names, numbers, strict=True)
    ]
    return [replace(decision, why="decided by rank 0") for decision in mine]


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
