"""One row of numbers from every rank to every rank: how ranks agree on a verdict. Fixed size, so it can be rehearsed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatronish.comm import Group, all_gather
from megatronish.comm.host import read_values


def gather_rows(
    row: Sequence[int], world: Group, device: torch.device, *, what: str, assumed: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """Row i of the result is rank i's `row` (as long on every rank, signed 64-bit numbers). Collective over `world`; waits for it.
    A rehearsal goes on with `assumed`, or as if every rank had said the same."""
    x = torch.tensor([list(row)], dtype=torch.int64, device=device)
    expected = [value for of_rank in assumed or [row] * world.size for value in of_rank]
    flat = read_values(all_gather(x, world, what=what).reshape(-1), expected)
    width = len(row)
    return [[int(value) for value in flat[i * width : (i + 1) * width]] for i in range(world.size)]
