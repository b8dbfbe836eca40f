"""Where linears and embeddings hand their weight gradients: added straight into the fp32 bucket, one product each."""

from __future__ import annotations

from torch import Tensor, nn

from megatronish.kernels.linear import accumulate_bias_gradient, accumulate_row_gradient, accumulate_weight_gradient
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
