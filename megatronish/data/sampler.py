"""Which samples: pure functions of a few integers. No state, no index to build, no cache file.

Samples of a run are numbered 0, 1, 2, ... over all steps and epochs. A step takes the next `global_batch_size` numbers, a data
rank a contiguous block of them; a number's place in the set follows from (seed, dataset fingerprint, epoch) alone. So the order
of samples depends neither on the number of ranks, nor on the length of the run, nor on where it was interrupted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatronish.data.permutation import Permutation
from megatronish.errors import UserError


def sample_numbers(*, consumed_samples: int, data_rank: int, data_size: int, global_batch_size: int) -> NDArray[np.int64]:
    """Numbers of the samples that `data_rank` reads in the step that follows `consumed_samples` samples.

    Raises UserError when the ranks do not divide the batch."""
    assert 0 <= data_rank < data_size
    if global_batch_size % data_size:
        raise UserError(
            f"train.global_batch_size={global_batch_size} is not divisible by the {data_size} data ranks; "
            "change it or parallel.data"
        )
    local = global_batch_size // data_size
    start = consumed_samples + data_rank * local
    return np.arange(start, start + local, dtype=np.int64)


def sample_ids(numbers: NDArray[np.int64], *, seed: int, fingerprint: int, num_samples: int) -> NDArray[np.int64]:
    """Places in the set, [0, num_samples), of sample numbers. Every place comes once in each epoch of `num_samples` numbers."""
    epochs, positions = np.divmod(numbers, num_samples)
    ids = np.empty_like(positions)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        ids[chosen] = Permutation.keyed(num_samples, seed, fingerprint, int(epoch)).map(positions[chosen])
    return ids
