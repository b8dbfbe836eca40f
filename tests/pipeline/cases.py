"""Every row of SCHEDULES with every number of chunks that is tested: a new row is tested without writing a test."""

from __future__ import annotations

from dataclasses import dataclass

from megatronish.pipeline.lower import Step, lower_all_stages
from megatronish.pipeline.schedules import SCHEDULES, Action, actions_of_all_stages


@dataclass(frozen=True)
class Row:
    """A schedule and its chunks a stage."""

    name: str
    num_chunks: int

    def __str__(self) -> str:
        return self.name + (f" x{self.num_chunks}" if SCHEDULES[self.name].has_chunks else "")

    def actions(self, num_stages: int, num_microbatches: int) -> list[list[Action]]:
        """Of all stages."""
        return actions_of_all_stages(self.name, num_stages, num_microbatches, num_chunks=self.num_chunks)

    def lowered(self, num_stages: int, num_microbatches: int) -> list[list[Step]]:
        """Of all stages, with exchanges."""
        return lower_all_stages(self.actions(num_stages, num_microbatches))


ROWS = [Row(name, chunks) for name, row in SCHEDULES.items() for chunks in ((1, 2, 3, 4) if row.has_chunks else (1,))]
