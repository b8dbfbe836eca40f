"""Batches that need no files: random tokens, with targets masked unevenly."""

from __future__ import annotations

import torch

from megatronish.batch import Batch
from megatronish.config import Config
from megatronish.parallel.mesh import Mesh


def global_batch(config: Config, step: int) -> Batch:
    """Random tokens; about a third of the targets masked, and all but one of the last sample's. Documents of a few tokens where the
    config separates them."""
    generator = torch.Generator().manual_seed(100 + step)
    S, B = config.data.sequence_length, config.train.global_batch_size
    tokens = torch.randint(config.model.vocab_size, (S + 1, B), generator=generator)
    mask = (torch.rand(S, B, generator=generator) > 0.3).float()
    mask[1:, -1] = 0
    positions = torch.arange(S)[:, None].expand(S, B).contiguous()
    documents = None
    if config.data.separate_documents:
        begins = torch.rand(S, B, generator=generator) < 0.2
        documents = begins.long().cumsum(0)
        positions = positions - torch.where(begins, positions, 0).cummax(0).values
    numbers = torch.arange(B) + (step - 1) * B
    return Batch(tokens[:-1].contiguous(), tokens[1:].contiguous(), mask, positions, numbers, documents)


class SlicedBatches:
    """A data rank's samples of the global batch."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.rank, self.size, self.device = config, mesh.index("dp"), mesh.size("dp"), mesh.device

    def batch(self, step: int) -> Batch:
        per_rank = self.config.train.global_batch_size // self.size
        return global_batch(self.config, step).microbatches(per_rank)[self.rank].to(self.device)
