"""The modules that models are made of, for one device. `parallel/tensor.py` swaps some for ones that know their tp group."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megatronish.kernels.rms_norm import rms_norm


class Linear(nn.Module):
    """y = x W^T. The weight's leading dimensions may be structured (heads, gate and up), so that a cut along one is contiguous."""

    def __init__(self, in_features: int, out_shape: tuple[int, ...], *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*out_shape, in_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., prod(out_shape)]."""
        return nn.functional.linear(x, self.weight.flatten(0, -2))

    def extra_repr(self) -> str:
        return f"in={self.weight.shape[-1]}, out={math.prod(self.weight.shape[:-1])}, weight={list(self.weight.shape)}"


class Embedding(nn.Module):
    """Rows of a table."""

    def __init__(self, num_rows: int, hidden_size: int, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size, dtype=dtype, device=device))

    def forward(self, tokens_SB: Tensor) -> Tensor:
        """int64 [S, B] -> [S, B, D]."""
        return nn.functional.embedding(tokens_SB, self.weight)

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}"


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a weight. Pointwise over S and B."""

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
