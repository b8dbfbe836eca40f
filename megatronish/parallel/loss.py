"""Cross entropy over logits whose vocabulary is cut over tp; the logits are never gathered (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatronish.comm import Group, all_gather
from megatronish.kernels.cross_entropy import cross_entropy_backward, cross_entropy_parts, sum_of_logits
from megatronish.layout import shard_range


@dataclass(frozen=True)
class LossTerms:
    """What training adds to the cross entropy."""

    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the vocabulary (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Weight of log-sum-exp^2 (Chowdhery et al. 2022)."""


@dataclass(frozen=True)
class _Columns:
    """This rank's part of the vocabulary."""

    first_row: int
    num_valid: int
    vocab_size: int
    group: Group


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, columns: _Columns, terms: LossTerms) -> Tensor:
        parts = list(cross_entropy_parts(logits_TV, labels_T, columns.first_row, columns.num_valid))
        if terms.label_smoothing:
            parts.append(sum_of_logits(logits_TV, columns.num_valid))
        group = columns.group
        parts_RPT = all_gather(torch.stack(parts), group, what="parts of the loss").view(group.size, len(parts), -1)
        max_RT, sum_exp_RT, target_RT, *sums_RT = parts_RPT.unbind(1)
        max_T = max_RT.amax(0)
        log_sum_exp_T = (sum_exp_RT * (max_RT - max_T).exp()).sum(0).log() + max_T
        ctx.save_for_backward(logits_TV, labels_T, log_sum_exp_T)
        ctx.columns, ctx.terms = columns, terms
        target_T = target_RT.sum(0)
        if sums_RT:  # the target's logit becomes a mean of it and of all
            target_T = torch.lerp(target_T, sums_RT[0].sum(0) / columns.vocab_size, terms.label_smoothing)
        loss_T = log_sum_exp_T - target_T
        return loss_T + terms.z_loss * log_sum_exp_T.square() if terms.z_loss else loss_T

    @staticmethod
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TV, labels_T, log_sum_exp_T = ctx.saved_tensors
        columns, smoothing = ctx.columns, ctx.terms.label_smoothing
        weights = (1.0 - smoothing, smoothing / columns.vocab_size, ctx.terms.z_loss)
        where = (columns.first_row, columns.num_valid)
        return cross_entropy_backward(dloss_T, logits_TV, labels_T, log_sum_exp_T, *where, *weights), None, None, None


def vocab_parallel_cross_entropy(
    logits_SBV: Tensor,
    labels_SB: Tensor,
    *,
    vocab_size: int,
    padded_vocab_size: int,
    group: Group,
    terms: LossTerms = LossTerms(),
) -> Tensor:
    """Loss of each token: logits [S, B, V/tp], labels int64 [S, B] -> [S, B] in the accumulation dtype, equal on all tp ranks.

    Columns at or beyond `vocab_size` are padding: out of softmax and smoothing, and without gradient. Collective over `group` (one
    all-gather of three numbers a token, four with label smoothing)."""
    start, stop = shard_range(padded_vocab_size, group.index, group.size)
    columns = _Columns(start, max(0, min(stop, vocab_size) - start), vocab_size, group)
    loss_T: Tensor = _VocabParallelCrossEntropy.apply(logits_SBV.flatten(0, 1), labels_SB.flatten(), columns, terms)
    return loss_T.view(labels_SB.shape)
