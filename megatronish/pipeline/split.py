"""Which layers go to which part of the pipeline: contiguous ranges of about equal cost, the embedding and the output projection
counted. With one chunk a stage a part is a stage."""

from __future__ import annotations

import heapq

from megatronish.errors import UserError


def split_layers(num_layers: int, num_parts: int, *, layer_cost: float, embedding_cost: float, head_cost: float) -> list[range]:
    """The layers of each part, at least one each, such that the largest cost of a part is the least possible.

    Costs are in any one unit, such as FLOPs of a forward and backward; the embedding is counted on the first part, the head on the
    last. Among the splits with the least largest cost it takes one with the least second largest, and so on; then one with the
    fewest layers on the first and last part; then later parts get the extra layer, as they keep fewer microbatches in flight.
    UserError if there are fewer layers than parts.
    """
    assert num_layers >= 1 and num_parts >= 1 and layer_cost > 0 and embedding_cost >= 0 and head_cost >= 0
    if num_layers < num_parts:
        raise UserError(
            f"model.num_layers={num_layers} is fewer than parallel.pipeline x parallel.num_chunks={num_parts}: every part needs a "
            f"layer; use a product of at most {num_layers}"
        )
    fixed_costs = [0.0] * num_parts
    fixed_costs[0] += embedding_cost
    fixed_costs[-1] += head_cost

    # Exact, though greedy: a part's cost grows with its size, so a split whose largest cost is least holds the smallest of all
    # costs (part, size), and taking them from the smallest up finds them.
    def entry(part: int, size: int) -> tuple[float, bool, int]:
        return fixed_costs[part] + layer_cost * size, part in (0, num_parts - 1), -part

    sizes = [1] * num_parts
    cheapest = [entry(part, 2) for part in range(num_parts)]
    heapq.heapify(cheapest)
    for _ in range(num_layers - num_parts):
        part = -cheapest[0][2]
        sizes[part] += 1
        heapq.heapreplace(cheapest, entry(part, sizes[part] + 1))
    starts = [sum(sizes[:part]) for part in range(num_parts)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
