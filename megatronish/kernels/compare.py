"""When the results of a body are those of the reference: the rule that dispatch.py admits by and the bench judges by.

A result may be off from float64 by a count of roundings to its dtype, and by what the longest sum in the accumulation dtype may
lose, as a share of the largest value there is, or of 1 where all are smaller. A wrong formula is off by far more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatronish.kernels.registry import accumulate_dtype

ROUNDINGS, LENGTH = 8, 4096
"""Of any op's results: roundings to the inputs' dtype (six are the most that tests/kernels counts) and the longest sum in the
accumulation dtype, whose error grows as its root."""


def allowed_error(result: Tensor, *, rounded_to: torch.dtype | None = None) -> float:
    """Of one result. `rounded_to`: the dtype that values between input and result have, where it is narrower than the result's."""
    eps, wide_eps = torch.finfo(result.dtype).eps, torch.finfo(accumulate_dtype(result)).eps
    if rounded_to is not None:
        eps = max(eps, torch.finfo(rounded_to).eps)
    return ROUNDINGS * eps / 2 + math.sqrt(LENGTH) * wide_eps


def error_of(result: Tensor, exact: Tensor) -> float:
    """The largest error, as a share of the largest finite value, or of 1; NaN where there is one in the result. Infinities that are
    equal are right: the maximum of an empty row is one."""
    if not result.numel():
        return 0.0
    wide = result.double()
    errors = (wide - exact).abs().masked_fill(wide == exact, 0.0)
    return float(errors.max() / exact.abs().masked_fill(exact.isinf(), 0.0).max().clamp_min(1.0))


def widened(value: Any) -> Any:
    """Floating tensors, and those of lists, in float64."""
    if isinstance(value, list):
        return [widened(v) for v in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def copied(arguments: Sequence[Any]) -> list[Any]:
    """The arguments, tensors copied, but for those in lists, which are only read."""
    return [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]


def results_and_gradients(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    differentiable: Sequence[int] = (),
    mutated: Sequence[int] = (),
    upstream: Callable[[Tensor], Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """(results and what was written, gradients of the arguments at `differentiable`), for fixed upstream gradients: `ramp`, or by
    another function of the results. The arguments stay as they are."""
    upstream = upstream or ramp
    given = copied(arguments)
    leaves = [given[i].requires_grad_() for i in differentiable if given[i] is not None]
    returned = function(*given)
    results = [returned] if isinstance(returned, Tensor) else list(returned or ())
    results += [given[i] for i in mutated if given[i] is not None]
    gradients = torch.autograd.grad(results, leaves, [upstream(r) for r in results]) if leaves else ()
    return [r.detach() for r in results], list(gradients)


def ramp(like: Tensor) -> Tensor:
    """-1 to 1 over the elements, with the dtype and strides of `like`."""
    values = torch.linspace(-1, 1, like.numel(), dtype=torch.float64, device=like.device).view(like.shape)
    return torch.empty_like(like).copy_(values)


def noise(like: Tensor) -> Tensor:
    """Normal, the same in every dtype, with the dtype and strides of `like`. Sums of many rows of a ramp cancel, and what is left
    is all rounding."""
    generator = torch.Generator(like.device).manual_seed(0)
    values = torch.randn(like.shape, generator=generator, device=like.device)
    return torch.empty_like(like).copy_(values.bfloat16())
