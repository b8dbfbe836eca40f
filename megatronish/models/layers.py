"""The modules that models are made of, for one device. `parallel/tensor.py` swaps some for ones that know their tp group."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor, nn

from megatronish.batch import TokenContext
from megatronish.comm.random import stream_key
from megatronish.kernels.attention import attention
from megatronish.kernels.bias_gelu_dropout_add import bias_gelu_dropout_add
from megatronish.kernels.dropout import dropout
from megatronish.kernels.layer_norm import add_layer_norm, layer_norm
from megatronish.kernels.masked_attention import WeightDropout, masked_attention
from megatronish.kernels.rms_norm import add_rms_norm, rms_norm


class Linear(nn.Module):
    """y = x W^T + b. The weight's leading dimensions may be structured (heads, gate and up), so that a cut along one is contiguous;
    the bias has the same."""

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_shape: tuple[int, ...], *, bias: bool = False, dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*out_shape, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_shape, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., prod(out_shape)]."""
        return nn.functional.linear(x, self.weight.flatten(0, -2), None if self.bias is None else self.bias.flatten())

    def extra_repr(self) -> str:
        shape = self.weight.shape
        return f"in={shape[-1]}, out={math.prod(shape[:-1])}, weight={list(shape)}" + (", bias" if self.bias is not None else "")


class Embedding(nn.Module):
    """Rows of a table."""

    def __init__(self, num_rows: int, hidden_size: int, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, hidden_size, dtype=dtype, device=device))

    def forward(self, tokens_SB: Tensor) -> Tensor:
        """int64 [S, B] -> [S, B, D]."""
        return nn.functional.embedding(tokens_SB, self.weight)

    def project(self, x_SBD: Tensor) -> Tensor:
        """x W^T, the product with every row (tied embeddings): [S, B, D] -> [S, B, rows]."""
        return nn.functional.linear(x_SBD, self.weight)

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}"


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a weight; `add` first, if given: returns the sum too. Pointwise over S and B."""

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=device))
        self.eps = eps

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, add: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., D] -> [..., D]; with `add` [..., D]: (norm of x + add, x + add)."""
        return rms_norm(x, self.weight, self.eps) if add is None else add_rms_norm(x, add, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """To zero mean and unit variance, then by a weight, plus a bias; `add` as in RMSNorm. Pointwise over S and B."""

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=device))
        self.eps = eps

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, add: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., D] -> [..., D]; with `add` [..., D]: (norm of x + add, x + add)."""
        if add is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return add_layer_norm(x, add, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Dropout(nn.Module):
    """Zeroes a share `rate` of activations in training, by bits that no layout changes. `place_dropout` must have been called."""

    cut_along: Literal["sequence", "heads"] = "sequence"
    """What tensor ranks cut the activations along, where they do (see `place_dropout`)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.key: int | None = None
        """Names seed and site."""
        self.part = 0
        """Which of the equal parts of a sample's leading coordinate this rank holds."""

    @property
    def is_active(self) -> bool:
        """In training, with a rate above 0."""
        return self.training and self.rate > 0

    @property
    def placed_key(self) -> int:
        """The key, which must have been set."""
        assert self.key is not None, "a model with dropout trains after place_dropout(model, seed=...)"
        return self.key

    def forward(self, x_SBD: Tensor, context: TokenContext, add: Tensor | None = None) -> Tensor:
        """[S, B, D] -> [S, B, D]; `add` [S, B, D] is added to what is left."""
        if not self.is_active:
            return x_SBD if add is None else add + x_SBD
        samples_B, numbers = context.sample_numbers_B, {"first": self.part * x_SBD.shape[0], "key": self.placed_key}
        if add is None:
            return dropout(x_SBD, samples_B, batch_dim=1, rate=self.rate, **numbers)
        return bias_gelu_dropout_add(x_SBD, None, add, samples_B, activation="none", rate=self.rate, **numbers)

    def extra_repr(self) -> str:
        return f"{self.rate}"


class WeightsDropout(Dropout):
    """Dropout of attention weights [heads, queries, keys]: says which, for the kernel to do it."""

    cut_along = "heads"

    def forward(self, num_heads: int, context: TokenContext) -> WeightDropout | None:  # type: ignore[override]
        """For this rank's `num_heads` heads; None: keep all."""
        if not self.is_active:
            return None
        return WeightDropout(context.sample_numbers_B, self.part * num_heads, self.placed_key, self.rate)


def place_dropout(model: nn.Module, *, seed: int, tp_index: int = 0, sequence_parallel: bool = False) -> None:
    """Give each Dropout of a model its key, from its name, and its place in the sample. Call it while names are the global ones.

    Heads are cut over tensor ranks; activations between blocks only under sequence parallelism: else every rank holds all of them
    and drops the same elements."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.key = stream_key(seed, "dropout", name)
            module.part = tp_index if sequence_parallel or module.cut_along == "heads" else 0


class CausalAttention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V over the past, within documents where the context has them; dropout of the weights."""

    def __init__(self, dropout_rate: float) -> None:
        super().__init__()
        self.dropout = WeightsDropout(dropout_rate)

    def forward(self, query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, context: TokenContext) -> Tensor:
        """query [S, B, H, K], key and value [S, B, G, K] -> [S, B, H*K]."""
        drop = self.dropout(query_SBHK.shape[2], context)
        if drop is None and context.documents_SB is None:
            return attention(query_SBHK, key_SBGK, value_SBGK).flatten(2)
        return masked_attention(query_SBHK, key_SBGK, value_SBGK, documents_SB=context.documents_SB, drop=drop).flatten(2)
