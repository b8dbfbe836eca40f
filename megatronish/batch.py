"""A batch on the device, and the legend of shape letters used in tensor names everywhere.

| letter | size |
|---|---|
| B | samples in a microbatch |
| S | tokens in a sample; `S/tp` between blocks under sequence parallelism |
| D | hidden size |
| H | query heads |
| G | key/value heads (groups of query heads) |
| K | size of one head |
| F | width of the MLP |
| V | rows of the vocabulary, padding included |
| T | tokens, S x B flattened |

Letters are logical sizes: under tensor parallelism a tensor named `_SBV` may hold V/tp columns. Axes of the mesh (`axis`: pp, dp,
tp) are never called dimensions (`dim`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenContext:
    """What a model knows of a microbatch's tokens beside their ids; whole along S on every rank."""

    positions_SB: Tensor
    """int64: position of each token, for rotary or learned positions."""
    sample_numbers_B: Tensor
    """int64: the global number of each sample: the key of per-sample randomness."""
    documents_SB: Tensor | None = None
    """int64, non-decreasing along S: number of each token's document within its sample; tokens attend within a document only.
    None: a sample is one document."""


@dataclass(frozen=True)
class Batch:
    """The samples of one data rank for one step (or one microbatch of it); sequence first, so that a cut along S is contiguous."""

    tokens_SB: Tensor
    """int64: inputs."""
    labels_SB: Tensor
    """int64: the next token of each position."""
    loss_mask_SB: Tensor
    """float32, 0 or 1: which labels count as targets."""
    positions_SB: Tensor
    """int64: position of each token, for rotary or learned positions."""
    sample_numbers_B: Tensor
    """int64: the global number of each sample since the start of the run, 0, 1, 2, ...: the key of per-sample randomness."""
    documents_SB: Tensor | None = None
    """int64: see TokenContext; None unless data.separate_documents is set."""

    @property
    def context(self) -> TokenContext:
        """The model's view of it."""
        return TokenContext(self.positions_SB, self.sample_numbers_B, self.documents_SB)

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items() if tensor is not None})

    def microbatches(self, micro_batch_size: int) -> list[Batch]:
        """Views of `micro_batch_size` samples each, in order. Copies nothing."""
        return [
            Batch(
                tokens_SB=self.tokens_SB[:, i : i + micro_batch_size],
                labels_SB=self.labels_SB[:, i : i + micro_batch_size],
                loss_mask_SB=self.loss_mask_SB[:, i : i + micro_batch_size],
                positions_SB=self.positions_SB[:, i : i + micro_batch_size],
                sample_numbers_B=self.sample_numbers_B[i : i + micro_batch_size],
                documents_SB=None if self.documents_SB is None else self.documents_SB[:, i : i + micro_batch_size],
            )
            for i in range(0, self.tokens_SB.shape[1], micro_batch_size)
        ]
