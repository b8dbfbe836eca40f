"""What the fields of a config owe each other and the number of ranks: one table, read by `config check`, `plan` and `preflight`.

A row says when it applies, what must hold, and, when it does not, both numbers, the key to change and values near by that would do.
A row applies only where the rows it builds on hold, so that one mistake gives one line.
"""

from __future__ import annotations

from megatronish.config import Config
from megatronish.constraints.engine import ENGINE
from megatronish.constraints.kernels import KERNELS
from megatronish.constraints.ranks import MODEL, RAMP, RANKS, RECOMPUTE, TENSOR
from megatronish.constraints.rotary import ROTARY
from megatronish.constraints.row import Constraint, Layout, Problem, divisors_near, multiples_near
from megatronish.constraints.settings import DATA, OBSERVE, SCHEDULE

__all__ = ["CONSTRAINTS", "Constraint", "Problem", "check", "divisors_near", "find_problems", "multiples_near", "warnings"]

CONSTRAINTS: tuple[Constraint, ...] = (
    *MODEL,
    *ROTARY,
    *TENSOR,
    *RANKS,
    *RAMP,
    *RECOMPUTE,
    *ENGINE,
    *KERNELS,
    *SCHEDULE,
    *DATA,
    *OBSERVE,
)


def find_problems(config: Config, world_size: int | None, *, partial: bool = False) -> list[Problem]:
    """Every row that does not hold, in the table's order. `world_size` None: what can be said without it.

    `partial`: the config may lack fields; rows that read a missing one are left out.
    """
    layout = Layout(config, world_size)
    problems = []
    for row in CONSTRAINTS:
        try:
            if row.applies(layout) and not row.holds(layout):
                problems.append(Problem(row.name, row.keys, row.message(layout)))
        except AttributeError:
            if not partial:
                raise
    return problems


def check(config: Config, world_size: int | None = None) -> list[str]:
    """One line a problem; nothing when the config is sound."""
    return [problem.message for problem in find_problems(config, world_size)]


def warnings(config: Config, world_size: int | None = None) -> list[str]:
    """One line for each choice that is sound but costs more than it seems."""
    layout = Layout(config, world_size)
    if layout.samples_at_once is None or config.parallel.zero_stage != 2 or layout.replicas == 1:
        return []
    microbatches = config.train.global_batch_size // layout.samples_at_once
    if microbatches == 1:
        return []
    return [
        f"parallel.zero_stage=2 reduces gradients once a microbatch: {microbatches} microbatches send {microbatches} times the "
        f"volume of parallel.zero_stage=1"
        + (f", and parallel.pipeline={config.parallel.pipeline} needs them" if config.parallel.pipeline > 1 else "")
    ]
