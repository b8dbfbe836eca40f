"""Batches that need no files and in which there is something to learn."""

from __future__ import annotations

import torch

from megatronish.batch import Batch
from megatronish.config import Config


def learnable_batch(config: Config, step: int) -> Batch:
    """The global batch of `step`: Zipf-like tokens, most of which follow from the one before."""
    generator = torch.Generator().manual_seed(step)
    S, B, V = config.data.sequence_length, config.train.global_batch_size, config.model.vocab_size
    tokens = (torch.rand(S + 1, B, generator=generator) ** 3 * V).long()
    for t in range(1, S + 1):
        tokens[t] = torch.where(torch.rand(B, generator=generator) < 0.7, (tokens[t - 1] * 7 + 3) % V, tokens[t])
    positions = torch.arange(S)[:, None].expand(S, B).contiguous()
    return Batch(tokens[:-1].contiguous(), tokens[1:].contiguous(), torch.ones(S, B), positions, torch.arange(B))


class LearnableBatches:
    """A data rank's share of `learnable_batch`."""

    def __init__(self, config: Config, data_rank: int, data_size: int) -> None:
        self.config, self.rank, self.size = config, data_rank, data_size

    def batch(self, step: int) -> Batch:
        return learnable_batch(self.config, step).microbatches(self.config.train.global_batch_size // self.size)[self.rank]
