"""Cross entropy over logits whose vocabulary is cut over tp; the logits are never gathered (Shoeybi et al. 2019, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatronish.comm import Group, all_gather
from megatronish.kernels.cross_entropy import cross_entropy_backward, cross_entropy_parts
from megatronish.layout import shard_range


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, first_row: int, num_valid: int, group: Group) -> Tensor:
        parts_3T = torch.stack(cross_entropy_parts(logits_TV, labels_T, first_row, num_valid))
        parts_R3T = all_gather(parts_3T, group).view(group.size, 3, -1)
        max_RT, sum_exp_RT, target_RT = parts_R3T.unbind(1)
        max_T = max_RT.amax(0)
        log_sum_exp_T = (sum_exp_RT * (max_RT - max_T).exp()).sum(0).log() + max_T
        ctx.save_for_backward(logits_TV, labels_T, log_sum_exp_T)
        ctx.first_row, ctx.num_valid = first_row, num_valid
        return log_sum_exp_T - target_RT.sum(0)

    @staticmethod
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_TV, labels_T, log_sum_exp_T = ctx.saved_tensors
        grad = cross_entropy_backward(dloss_T, logits_TV, labels_T, log_sum_exp_T, ctx.first_row, ctx.num_valid)
        return grad, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_SBV: Tensor, labels_SB: Tensor, *, vocab_size: int, padded_vocab_size: int, group: Group
) -> Tensor:
    """Loss of each token: logits [S, B, V/tp], labels int64 [S, B] -> [S, B] in the accumulation dtype, equal on all tp ranks.

    Columns at or beyond `vocab_size` are padding: out of the softmax, and without gradient. Collective over `group` (one all-gather
    of three numbers a token)."""
    start, stop = shard_range(padded_vocab_size, group.index, group.size)
    num_valid = max(0, min(stop, vocab_size) - start)
    loss_T: Tensor = _VocabParallelCrossEntropy.apply(logits_SBV.flatten(0, 1), labels_SB.flatten(), start, num_valid, group)
    return loss_T.view(labels_SB.shape)
