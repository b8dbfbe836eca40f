"""Where linears and embeddings hand their weight gradients: added straight into the fp32 bucket, one product each."""

from __future__ import annotations

from torch import Tensor, nn

from megatronish.kernels.weight_gradient import accumulate_row_gradient, accumulate_weight_gradient
from megatronish.optim.grad_buffer import GradBuffer


class WeightGradientQueue:
    """Runs each weight product at once, under the input gradient's communication (1F1B). A schedule that runs weight gradients later
    (zero bubble) would keep the triples here until its W action."""

    def __init__(self) -> None:
        self.grad_buffer: GradBuffer | None = None

    def attach(self, grad_buffer: GradBuffer) -> None:
        """Modules are cut before their memory exists; this joins the two."""
        self.grad_buffer = grad_buffer

    def linear(self, weight: nn.Parameter, dy_TO: Tensor, x_TI: Tensor) -> None:
        """bucket[weight] += dY^T X."""
        assert self.grad_buffer is not None, "backward before attach()"
        accumulate_weight_gradient(self.grad_buffer.view(weight).flatten(0, -2), dy_TO, x_TI)
        self.grad_buffer.contributed(weight)

    def rows(self, weight: nn.Parameter, dy_TD: Tensor, rows_T: Tensor) -> None:
        """bucket[weight][rows_T[t]] += dy_TD[t]; rows outside the weight are another rank's and are left out."""
        assert self.grad_buffer is not None, "backward before attach()"
        accumulate_row_gradient(self.grad_buffer.view(weight), dy_TD, rows_T)
        self.grad_buffer.contributed(weight)
