"""The local part of cross entropy over a vocabulary that may be cut over ranks: what one rank can say from its own columns.

`parallel/loss.py` joins the parts: with m = max over ranks, loss = log(sum over ranks of sum_exp * e^(max - m)) + m - target logit.
Label smoothing (Szegedy et al. 2016) and z-loss (Chowdhery et al. 2022) need one more sum over the columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.installed import refuses_triton_of_float32
from megatronish.kernels.registry import Implementation, accumulate_dtype, register


def reference(logits_TV: Tensor, labels_T: Tensor, first_row: int, num_valid: int, with_sum: bool = False) -> Tensor:
    """Plain PyTorch: [3, T] of max, sum of exp(logit - max), logit of the label or 0 where another rank has it, in the accumulation
    dtype; `with_sum`, which label smoothing needs: [4, T], the sum of the logits too. Nothing but -inf: max -inf, sum 0."""
    valid = logits_TV[:, :num_valid].to(accumulate_dtype(logits_TV))
    if num_valid == 0:
        empty_PT = valid.new_zeros(4 if with_sum else 3, logits_TV.shape[0])
        empty_PT[0] = -math.inf
        return empty_PT
    max_T = valid.amax(-1)
    sum_exp_T = (valid - max_T.masked_fill(max_T == -math.inf, 0.0)[:, None]).exp_().sum(-1)
    local_T = labels_T - first_row
    here_T = (local_T >= 0) & (local_T < num_valid)
    picked_T = valid.gather(1, local_T.clamp(0, num_valid - 1)[:, None]).squeeze(1)
    parts = [max_T, sum_exp_T, torch.where(here_T, picked_T, 0.0)]
    return torch.stack([*parts, valid.sum(-1)] if with_sum else parts)


def _forward_fake(logits_TV: Tensor, labels_T: Tensor, first_row: int, num_valid: int, with_sum: bool = False) -> Tensor:
    return logits_TV.new_empty(4 if with_sum else 3, logits_TV.shape[0], dtype=accumulate_dtype(logits_TV))


def reference_backward(
    dloss_T: Tensor,
    logits_TV: Tensor,
    labels_T: Tensor,
    log_sum_exp_T: Tensor,
    first_row: int,
    num_valid: int,
    target_weight: float = 1.0,
    uniform_weight: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """d loss / d logits = softmax (1 + 2 z_loss log-sum-exp) - target_weight onehot(label) - uniform_weight, times dloss; padded
    columns get zero."""
    grad_TV = torch.empty_like(logits_TV, dtype=accumulate_dtype(logits_TV))
    grad_TV[:, num_valid:] = 0
    if num_valid:
        valid = grad_TV[:, :num_valid]
        torch.sub(logits_TV[:, :num_valid].to(grad_TV.dtype), log_sum_exp_T[:, None], out=valid).exp_()
        local_T = labels_T - first_row
        here_T = (local_T >= 0) & (local_T < num_valid)
        if z_loss:
            valid.mul_((1.0 + 2.0 * z_loss * log_sum_exp_T)[:, None])
        if uniform_weight:
            valid.sub_(uniform_weight)
        target_T = here_T.to(grad_TV.dtype).mul_(-target_weight)
        valid.scatter_add_(1, local_T.clamp(0, num_valid - 1)[:, None], target_T[:, None])
        valid.mul_(dloss_T[:, None])
    return grad_TV.to(logits_TV.dtype)


def _backward_fake(dloss_T: Tensor, logits_TV: Tensor, *others: Any, **numbers: float) -> Tensor:
    return torch.empty_like(logits_TV)


_ROWS_AT_ONCE = 1 << 24
"""Logits that the body in place widens at a time: what it takes beside them stays below 64 MiB."""


def reference_backward_in_place(dloss_T: Tensor, logits_TV: Tensor, labels_T: Tensor, log_sum_exp_T: Tensor, *numbers: Any) -> None:
    """Plain PyTorch: the same, written over the logits."""
    rows = max(1, _ROWS_AT_ONCE // max(1, logits_TV.shape[1]))
    for start in range(0, logits_TV.shape[0], rows):
        part = slice(start, start + rows)
        given = (dloss_T[part], logits_TV[part], labels_T[part], log_sum_exp_T[part])
        logits_TV[part] = reference_backward(*given, *numbers)


def _in_place_fake(*arguments: Any, **numbers: float) -> None:
    return None


def _refuses_triton(logits_TV: Tensor, *others: Any) -> str | None:
    if logits_TV.shape[1] > 1 and logits_TV.stride(1) != 1:
        return "logits of a token that are not side by side"
    return refuses_triton_of_float32(logits_TV)


def _refuses_triton_backward(dloss_T: Tensor, logits_TV: Tensor, *others: Any) -> str | None:
    return _refuses_triton(logits_TV)


def _triton_forward(*arguments: Any) -> Tensor:
    from megatronish.kernels.triton import cross_entropy

    return cross_entropy.forward(*arguments)


def _triton_backward(dloss_T: Tensor, logits_TV: Tensor, labels_T: Tensor, log_sum_exp_T: Tensor, *numbers: Any) -> Tensor:
    from megatronish.kernels.triton import cross_entropy

    grad_TV = torch.empty_like(logits_TV)
    cross_entropy.backward(dloss_T, logits_TV, labels_T, log_sum_exp_T, grad_TV, *numbers)
    return grad_TV


def _triton_backward_in_place(dloss_T: Tensor, logits_TV: Tensor, labels_T: Tensor, log_sum_exp_T: Tensor, *numbers: Any) -> None:
    from megatronish.kernels.triton import cross_entropy

    cross_entropy.backward(dloss_T, logits_TV, labels_T, log_sum_exp_T, logits_TV, *numbers)


def _by_logits(dloss_T: Tensor, logits_TV: Tensor, *others: Any) -> tuple[Sequence[int], torch.dtype, str]:
    return logits_TV.shape, logits_TV.dtype, ""


cross_entropy_parts = register(
    "cross_entropy_parts(Tensor logits, Tensor labels, int first_row, int num_valid, bool with_sum=False) -> Tensor",
    reference,
    _forward_fake,
    also={"triton": Implementation(_triton_forward, _refuses_triton)},
    choice="cross_entropy",
)
"""Columns of logits_TV are rows first_row, first_row + 1, ... of the vocabulary; the first num_valid of them are not padding."""

_BACKWARD = "int first_row, int num_valid, float target_weight=1.0, float uniform_weight=0.0, float z_loss=0.0"

cross_entropy_backward = register(
    f"cross_entropy_backward(Tensor dloss, Tensor logits, Tensor labels, Tensor log_sum_exp, {_BACKWARD}) -> Tensor",
    reference_backward,
    _backward_fake,
    also={"triton": Implementation(_triton_backward, _refuses_triton_backward)},
    choice="cross_entropy",
    keyed_by=_by_logits,
)
"""The gradient of the local columns, given the log-sum-exp over all ranks' columns. With label smoothing e over V tokens the
target's weight is 1 - e and the uniform one e / V."""

cross_entropy_backward_ = register(
    f"cross_entropy_backward_(Tensor dloss, Tensor(a!) logits, Tensor labels, Tensor log_sum_exp, {_BACKWARD}) -> ()",
    reference_backward_in_place,
    _in_place_fake,
    also={"triton": Implementation(_triton_backward_in_place, _refuses_triton_backward)},
    choice="cross_entropy",
    keyed_by=_by_logits,
)
"""The same, written over the logits, whose memory nobody else may need."""


def sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Tensor, Tensor, int, int, bool]]:
    """Inputs that tests and benches run every implementation on: whole rows, labels of another part, some padding, only padding."""
    generator = torch.Generator(device).manual_seed(0)
    cases = []
    for T, columns, first_row, num_valid, V in [(6, 40, 0, 40, 40), (5, 17, 17, 17, 50), (7, 16, 32, 9, 41), (3, 8, 48, 0, 41)]:
        logits_TV = torch.randn(T, columns, generator=generator, dtype=dtype, device=device) * 4
        cases.append((logits_TV, torch.randint(V, (T,), generator=generator, device=device), first_row, num_valid, T % 2 == 0))
    return cases


def backward_sample_inputs(dtype: torch.dtype, device: str) -> list[tuple[Any, ...]]:
    """The same for the backward op, with and without smoothing and z-loss; the log-sum-exp is what other ranks' columns might make
    it."""
    generator = torch.Generator(device).manual_seed(1)
    cases: list[tuple[Any, ...]] = []
    for logits_TV, labels_T, first_row, num_valid, _ in sample_inputs(dtype, device):
        wide = accumulate_dtype(logits_TV)
        dloss_T = torch.rand(len(labels_T), generator=generator, dtype=wide, device=device)
        log_sum_exp_T = logits_TV.to(wide).logsumexp(-1) + torch.rand(len(labels_T), generator=generator, dtype=wide, device=device)
        given = (dloss_T, logits_TV, labels_T, log_sum_exp_T, first_row, num_valid)
        cases += [given, (*given, 0.9, 0.1 / 41, 0.01)]
    return cases
