"""Batches that need no files and in which there is something to learn."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

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


@cache
def words(count: int, vocab_size: int) -> Tensor:
    """The first `count` words, spaces and signs of Python's library, int64: numbered as they first appear, the rarest as one."""
    known: dict[str, int] = {}
    ids: list[int] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for word in re.findall(r"\w+|\s+|[^\w\s]", path.read_text(encoding="utf-8")):
            ids.append(known.setdefault(word, len(known)) if len(known) < vocab_size - 1 else known.get(word, vocab_size - 1))
        if len(ids) >= count:
            break
    return torch.tensor(ids[:count])


class TextBatches:
    """A data rank's share of samples that follow each other in `words`, in the order of a fixed permutation."""

    def __init__(self, config: Config, data_rank: int, data_size: int) -> None:
        S, self.global_batch_size = config.data.sequence_length, config.train.global_batch_size
        num_samples = config.num_steps * self.global_batch_size
        self.stream, self.sequence_length = words(num_samples * S + 1, config.model.vocab_size), S
        self.order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))
        self.rank, self.per_rank = data_rank, self.global_batch_size // data_size

    def batch(self, step: int) -> Batch:
        S, first = self.sequence_length, (step - 1) * self.global_batch_size + self.rank * self.per_rank
        samples = self.order[first : first + self.per_rank]
        tokens = self.stream[samples[None, :] * S + torch.arange(S + 1)[:, None]]
        positions = torch.arange(S)[:, None].expand(S, len(samples)).contiguous()
        ones = torch.ones(S, len(samples))
        return Batch(tokens[:-1].contiguous(), tokens[1:].contiguous(), ones, positions, torch.arange(first, first + len(samples)))
