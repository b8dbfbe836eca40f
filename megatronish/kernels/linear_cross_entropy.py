"""The output projection fused with cross entropy, some tokens at a time: the logits of a microbatch never exist whole.

    a chunk of tokens:  logits = x W^T -> loss, log-sum-exp (joined over tp) -> gradient, written over the logits -> dx, dW

The gradient of the loss is known before backward: a trainer divides by the global number of targets, which it has counted already.
So forward makes all gradients at once, as Liger does (Hsu et al. 2024), with no product beyond the three of a plain linear.

Memory, for T tokens, V/tp columns and N chunks: ceil(T / N) x V/tp logits, 1/N of them, where the plain way keeps T x V/tp from
forward to backward; and T x D for dx, in the place of the projection's input. The weight's gradient goes straight into its bucket.
Time: each chunk reads and writes that gradient, 8 bytes an element of the weight; its product takes 2 ceil(T / N) operations an
element. On a GPU of 300 operations a byte (H100, bfloat16) chunks of 1,200 tokens balance the two, and smaller ones are bound by
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatronish.kernels.linear import linear, linear_input_gradient

Losses = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits_TV, labels_T) -> (loss_T, log-sum-exp over the whole vocabulary_T), in the accumulation dtype."""


@dataclass(frozen=True)
class Gradients:
    """How the gradients are made, and where they go."""

    of_loss: Tensor
    """The scalar that backward would start from."""
    of_logits: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(dloss_T, logits_TV, labels_T, log_sum_exp_T): write the gradient over the logits."""
    of_weight: Callable[[Tensor, Tensor], None]
    """(dlogits_TV, x_TD): add dlogits^T x to what the weight is owed."""


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    counted_T: Tensor,
    *,
    num_chunks: int,
    losses: Losses,
    gradients: Gradients | None,
) -> tuple[Tensor, Tensor | None]:
    """(sum of loss x counted, a scalar in the accumulation dtype; the gradient of x, this rank's columns' share of it).

    x [T, D], weight [V/tp, D], labels int64 [T], counted: the weight of each token, 0 where its label does not count. Without
    autograd. `gradients` None: the loss alone. What `losses` communicates it does once a chunk."""
    T = x_TD.shape[0]
    size = max(1, -(-T // num_chunks))
    dx_TD = None if gradients is None else torch.empty_like(x_TD)
    total = None
    for start in range(0, T, size):
        part = slice(start, start + size)
        logits_TV = linear(x_TD[part], weight_VD)
        loss_T, log_sum_exp_T = losses(logits_TV, labels_T[part])
        chunk_sum = (loss_T * counted_T[part]).sum()
        total = chunk_sum if total is None else total + chunk_sum
        if gradients is not None and dx_TD is not None:
            # A tensor without dimensions would not widen the product.
            dloss_T = counted_T[part].to(loss_T.dtype) * gradients.of_loss
            gradients.of_logits(dloss_T, logits_TV, labels_T[part], log_sum_exp_T)
            dx_TD[part] = linear_input_gradient(logits_TV, weight_VD)
            gradients.of_weight(logits_TV, x_TD[part])
        del logits_TV  # before the next chunk's take memory
    assert total is not None, "a microbatch has tokens"
    return total, dx_TD
