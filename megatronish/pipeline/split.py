"""Which layers go to which stage: contiguous ranges of about equal cost, the embedding and the output projection counted."""

from __future__ import annotations

import heapq

from megatronish.errors import UserError


def split_layers(num_layers: int, num_stages: int, *, layer_cost: float, embedding_cost: float, head_cost: float) -> list[range]:
    """The layers of each stage, at least one each, such that the largest cost of a stage is the least possible.

    Costs are in any one unit, such as FLOPs of a forward and backward; the embedding is counted on the first stage, the head on the
    last. Among the splits with the least largest cost it takes one with the least second largest, and so on; then one with the
    fewest layers on the first and last stage; then later stages get the extra layer, as they keep fewer microbatches in flight.
    UserError if there are fewer layers than stages.
    """
    assert num_layers >= 1 and num_stages >= 1 and layer_cost > 0 and embedding_cost >= 0 and head_cost >= 0
    if num_layers < num_stages:
        raise UserError(
            f"model.num_layers={num_layers} is fewer than parallel.pipeline={num_stages}: every stage needs a layer; "
            f"use parallel.pipeline of at most {num_layers}"
        )
    fixed_costs = [0.0] * num_stages
    fixed_costs[0] += embedding_cost
    fixed_costs[-1] += head_cost

    # Exact, though greedy: a stage's cost grows with its size, so a split whose largest cost is least holds the smallest of all
    # costs (stage, size), and taking them from the smallest up finds them.
    def entry(stage: int, size: int) -> tuple[float, bool, int]:
        return fixed_costs[stage] + layer_cost * size, stage in (0, num_stages - 1), -stage

    sizes = [1] * num_stages
    cheapest = [entry(stage, 2) for stage in range(num_stages)]
    heapq.heapify(cheapest)
    for _ in range(num_layers - num_stages):
        stage = -cheapest[0][2]
        sizes[stage] += 1
        heapq.heapreplace(cheapest, entry(stage, sizes[stage] + 1))
    starts = [sum(sizes[:stage]) for stage in range(num_stages)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
