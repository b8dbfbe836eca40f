"""The global gradient norm: each element of the model counted exactly once, whatever the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from megatronish.kernels.square_sum import square_sum
from megatronish.optim.grad_buffer import GradBuffer


def owned_square_sum(grads: GradBuffer) -> Tensor:
    """The sum of squares of what this rank counts: its data slice of every bucket; replicated buckets on tp rank 0 only, tied ones
    on their owner stage only.

    A scalar in the buckets' dtype; the sum of it over the world is the squared norm. Does not wait for the device."""
    counted = [grads.owned(i) for i, bucket in enumerate(grads.buckets) if bucket.is_counted_by(grads.groups["tp"].index)]
    if not counted:
        return torch.zeros((), dtype=grads.dtype, device=grads.device)
    return square_sum(counted).to(grads.dtype)


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What to multiply gradients with: min(1, clip_norm / norm), 1 where clip_norm is 0. Stays on the device."""
    if clip_norm == 0:
        return torch.ones_like(norm)
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)
