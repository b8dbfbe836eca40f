"""Cross entropy over logits whose vocabulary is cut over tp; the logits are never gathered (Shoeybi et al. 2019, section 3).

Two ways: over the logits of a microbatch, or joined with the projection that makes them, some tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatronish.comm import Group, all_gather
from megatronish.kernels.cross_entropy import cross_entropy_backward, cross_entropy_backward_, cross_entropy_parts
from megatronish.kernels.linear_cross_entropy import Gradients, linear_cross_entropy
from megatronish.layout import shard_range
from megatronish.parallel.tensor import ColumnParallelLinear, VocabParallelEmbedding


@dataclass(frozen=True)
class LossTerms:
    """What training adds to the cross entropy."""

    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the vocabulary (Szegedy et al. 2016)."""
    z_loss: float = 0.0
    """Weight of log-sum-exp^2 (Chowdhery et al. 2022)."""


@dataclass(frozen=True)
class Columns:
    """This rank's part of the vocabulary."""

    first_row: int
    num_valid: int
    vocab_size: int
    group: Group

    @classmethod
    def of(cls, *, vocab_size: int, padded_vocab_size: int, group: Group) -> Columns:
        """Rows at or beyond `vocab_size` are padding."""
        start, stop = shard_range(padded_vocab_size, group.index, group.size)
        return cls(start, max(0, min(stop, vocab_size) - start), vocab_size, group)

    def weights(self, terms: LossTerms) -> tuple[float, float, float]:
        """What the gradient needs to know of the terms: of the target, uniform, of the z-loss."""
        return 1.0 - terms.label_smoothing, terms.label_smoothing / self.vocab_size, terms.z_loss


def join_losses(logits_TV: Tensor, labels_T: Tensor, columns: Columns, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """(loss of each token, log-sum-exp over the whole vocabulary), equal on all ranks of the group, which all call it."""
    parts_PT = cross_entropy_parts(logits_TV, labels_T, columns.first_row, columns.num_valid, bool(terms.label_smoothing))
    group = columns.group
    parts_RPT = all_gather(parts_PT, group, what="parts of the loss").view(group.size, *parts_PT.shape)
    max_RT, sum_exp_RT, target_RT, *sums_RT = parts_RPT.unbind(1)
    max_T = max_RT.amax(0)
    log_sum_exp_T = (sum_exp_RT * (max_RT - max_T).exp()).sum(0).log() + max_T
    target_T = target_RT.sum(0)
    if sums_RT:  # the target's logit becomes a mean of it and of all
        target_T = torch.lerp(target_T, sums_RT[0].sum(0) / columns.vocab_size, terms.label_smoothing)
    loss_T = log_sum_exp_T - target_T
    return loss_T + terms.z_loss * log_sum_exp_T.square() if terms.z_loss else loss_T, log_sum_exp_T


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        labels_T: Tensor,
        columns: Columns,
        terms: LossTerms,
        logits_after: Literal["kept", "overwritten"],
    ) -> Tensor:
        loss_T, log_sum_exp_T = join_losses(logits_TV, labels_T, columns, terms)
        ctx.save_for_backward(logits_TV, labels_T, log_sum_exp_T)
        ctx.columns, ctx.terms, ctx.logits_after = columns, terms, logits_after
        return loss_T

    @staticmethod
    def backward(ctx: Any, dloss_T: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_TV, labels_T, log_sum_exp_T = ctx.saved_tensors
        columns: Columns = ctx.columns
        given = (labels_T, log_sum_exp_T, columns.first_row, columns.num_valid, *columns.weights(ctx.terms))
        if ctx.logits_after == "kept":
            return cross_entropy_backward(dloss_T, logits_TV, *given), None, None, None, None
        cross_entropy_backward_(dloss_T, logits_TV, *given)
        return logits_TV.detach(), None, None, None, None


def vocab_parallel_cross_entropy(
    logits_SBV: Tensor,
    labels_SB: Tensor,
    *,
    vocab_size: int,
    padded_vocab_size: int,
    group: Group,
    terms: LossTerms = LossTerms(),
    logits_after: Literal["kept", "overwritten"] = "kept",
) -> Tensor:
    """Loss of each token: logits [S, B, V/tp], labels int64 [S, B] -> [S, B] in the accumulation dtype, equal on all tp ranks.

    Columns at or beyond `vocab_size` are padding: out of softmax and smoothing, and without gradient. Collective over `group` (one
    all-gather of three numbers a token, four with label smoothing). `logits_after` backward: "overwritten" by their gradient, which
    saves its memory, where nobody needs them any more."""
    columns = Columns.of(vocab_size=vocab_size, padded_vocab_size=padded_vocab_size, group=group)
    loss_T: Tensor = _VocabParallelCrossEntropy.apply(logits_SBV.flatten(0, 1), labels_SB.flatten(), columns, terms, logits_after)
    return loss_T.view(labels_SB.shape)


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Makes all gradients in forward; the weight's is in its bucket by then."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        projection: ColumnParallelLinear | VocabParallelEmbedding,
        labels_T: Tensor,
        counted_T: Tensor,
        loss_gradient: Tensor | None,
        chunks: tuple[Columns, LossTerms, int],
    ) -> Tensor:
        columns, terms, num_chunks = chunks
        weight, tp = projection.weight, projection.tp
        where = (columns.first_row, columns.num_valid, *columns.weights(terms))
        gradients = None
        if loss_gradient is not None:
            gradients = Gradients(
                of_loss=loss_gradient,
                of_logits=lambda dloss_T, logits_TV, labels_T, lse_T: cross_entropy_backward_(
                    dloss_T, logits_TV, labels_T, lse_T, *where
                ),
                of_weight=lambda dlogits_TV, x_TD: tp.sink.add_linear(weight, dlogits_TV, x_TD),
            )
        x_full = tp.start_gather(x).wait()
        loss, dx_TD = linear_cross_entropy(
            x_full.flatten(0, 1),
            weight,
            labels_T,
            counted_T,
            num_chunks=num_chunks,
            losses=lambda logits_TV, labels_T: join_losses(logits_TV, labels_T, columns, terms),
            gradients=gradients,
        )
        if dx_TD is not None:
            ctx.save_for_backward(tp.start_sum(dx_TD.view(x_full.shape)).wait())
            ctx.weight, ctx.sink = weight, tp.sink
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (dx,) = ctx.saved_tensors
        ctx.sink.complete(ctx.weight)
        return dx, None, None, None, None, None


def projected_cross_entropy(
    x: Tensor,
    projection: ColumnParallelLinear | VocabParallelEmbedding,
    labels_SB: Tensor,
    counted_SB: Tensor,
    *,
    columns: Columns,
    terms: LossTerms,
    num_chunks: int,
    loss_gradient: Tensor | None,
) -> Tensor:
    """The sum over tokens of loss x counted, a scalar: what `vocab_parallel_cross_entropy` of projection(x) gives, with the logits
    of 1/num_chunks of the tokens at a time. x [S/tp or S, B, D]; see `linear_cross_entropy` for memory and time.

    `loss_gradient` is the scalar that backward will start from, and must (None: there will be no backward): the weight is owed its
    gradient from forward on. Collective over the tensor group: the gathering of x, an all-gather of a few numbers a token for each
    chunk, and the sum of x's gradient."""
    loss: Tensor = _ProjectedCrossEntropy.apply(
        x, projection, labels_SB.flatten(), counted_SB.flatten(), loss_gradient, (columns, terms, num_chunks)
    )
    return loss
