"""Where linears and embeddings hand their weight gradients: added straight into the fp32 bucket, one product each; or back to
autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatronish.kernels.linear import accumulate_bias_gradient, accumulate_row_gradient, accumulate_weight_gradient
from megatronish.kernels.registry import accumulate_dtype
from megatronish.optim.grad_buffer import GradBuffer


class WeightGradientQueue:
    """Runs each weight product at once, under the input gradient's communication (1F1B). A schedule that runs weight gradients
    later (zero bubble) would keep the triples here until its W action."""

    def __init__(self) -> None:
        self.grad_buffer: GradBuffer | None = None

    def attach(self, grad_buffer: GradBuffer) -> None:
        """Modules are cut before their memory exists; this joins the two."""
        self.grad_buffer = grad_buffer

    def linear(self, weight: nn.Parameter, dy: Tensor, x: Tensor) -> None:
        """bucket[weight] += dY^T X."""
        assert self.grad_buffer is not None, "backward before attach()"
        accumulate_weight_gradient(self.grad_buffer.view(weight), dy, x)
        self.grad_buffer.contributed(weight)

    def add_linear(self, weight: nn.Parameter, dy: Tensor, x: Tensor) -> None:
        """bucket[weight] += dY^T X, of some tokens and maybe before backward; `complete` follows."""
        assert self.grad_buffer is not None, "forward before attach()"
        accumulate_weight_gradient(self.grad_buffer.view(weight), dy, x)

    def complete(self, weight: nn.Parameter) -> None:
        """`add_linear` has had all of a microbatch; called in its backward."""
        assert self.grad_buffer is not None, "backward before attach()"
        self.grad_buffer.view(weight)  # other microbatches may have sent off the memory since
        self.grad_buffer.contributed(weight)

    def bias(self, bias: nn.Parameter, dy: Tensor) -> None:
        """bucket[bias] += sum of dY over tokens."""
        assert self.grad_buffer is not None, "backward before attach()"
        accumulate_bias_gradient(self.grad_buffer.view(bias), dy)
        self.grad_buffer.contributed(bias)

    def rows(self, weight: nn.Parameter, dy: Tensor, rows: Tensor) -> None:
        """bucket[weight][rows[...]] += dy[...]; rows outside the weight are another rank's and are left out."""
        assert self.grad_buffer is not None, "backward before attach()"
        accumulate_row_gradient(self.grad_buffer.view(weight), dy, rows)
        self.grad_buffer.contributed(weight)


class AutogradGradients:
    """Gives each weight gradient back to autograd, in the weight's dtype: for an engine that takes gradients through autograd's
    hooks. A weight that is used twice has them added there."""

    def linear(self, weight: nn.Parameter, dy: Tensor, x: Tensor) -> Tensor:
        """dY^T X."""
        total = _zeros(weight)
        accumulate_weight_gradient(total, dy, x)
        return total.to(weight.dtype)

    def add_linear(self, weight: nn.Parameter, dy: Tensor, x: Tensor) -> None:
        """There is nowhere to keep parts of a gradient."""
        raise AssertionError("constraints/ refuses train.loss_chunks with gradients that go through autograd")

    def complete(self, weight: nn.Parameter) -> None:
        """See `add_linear`."""
        raise AssertionError("constraints/ refuses train.loss_chunks with gradients that go through autograd")

    def bias(self, bias: nn.Parameter, dy: Tensor) -> Tensor:
        """The sum of dY over tokens."""
        total = _zeros(bias)
        accumulate_bias_gradient(total, dy)
        return total.to(bias.dtype)

    def rows(self, weight: nn.Parameter, dy: Tensor, rows: Tensor) -> Tensor:
        """dy[...] added up by row; rows outside the weight are another rank's and are left out."""
        total = _zeros(weight)
        accumulate_row_gradient(total, dy, rows)
        return total.to(weight.dtype)


def _zeros(parameter: nn.Parameter) -> Tensor:
    """Where to add up, in the accumulation's dtype: products of one microbatch are rounded once."""
    return torch.zeros_like(parameter, dtype=accumulate_dtype(parameter))
