"""Keys and values that are kept from token to token: a module that is swapped in for a model's attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatronish.batch import TokenContext
from megatronish.kernels.cached_attention import cached_attention
from megatronish.models.layers import CausalAttention


@dataclass
class CacheRows:
    """How many rows the caches of a model have, and how many of them are in use: those that attention has to look at."""

    reserved: int = 0
    used: int = 0


class CachedAttention(nn.Module):
    """CausalAttention over all tokens so far. Row t of the cache is the token at position t, so a sample shorter than its
    companions needs no mask: what stands in rows beyond its position is never seen, and written over when it gets there."""

    def __init__(self, rows: CacheRows) -> None:
        super().__init__()
        self.rows = rows
        self._keys_BGTK: Tensor | None = None
        self._values_BGTK: Tensor | None = None

    def forward(self, query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, context: TokenContext) -> Tensor:
        """query [S, B, H, K], key and value [S, B, G, K] of new tokens -> [S, B, H*K]."""
        _, B, G, K = key_SBGK.shape
        if self._keys_BGTK is None or self._values_BGTK is None:
            # Zeros: a row that is masked out counts 0 times what it holds, and 0 x NaN is NaN.
            self._keys_BGTK, self._values_BGTK = (key_SBGK.new_zeros(B, G, self.rows.reserved, K) for _ in range(2))
        samples_B = torch.arange(B, device=key_SBGK.device)
        for cache, new in ((self._keys_BGTK, key_SBGK), (self._values_BGTK, value_SBGK)):
            cache.permute(2, 0, 1, 3)[context.positions_SB, samples_B] = new
        used = self.rows.used
        out: Tensor = cached_attention(
            query_SBHK, self._keys_BGTK[:, :, :used], self._values_BGTK[:, :, :used], context.positions_SB
        )
        return out.flatten(2)

    def clear(self) -> None:
        """Let go of the memory; the next call reserves `rows.reserved` rows for its own number of samples."""
        self._keys_BGTK = self._values_BGTK = None


def install_cache(model: nn.Module) -> CacheRows:
    """Swap every CausalAttention of `model`, once; returns the rows that they share."""
    rows = CacheRows()
    names = [name for name, module in model.named_modules() if isinstance(module, CausalAttention)]
    assert names, "the model has no CausalAttention to put a cache in place of"
    for name in names:
        model.set_submodule(name, CachedAttention(rows))
    return rows


def clear_cache(model: nn.Module, rows: CacheRows, *, reserved: int) -> None:
    """Start anew with room for `reserved` tokens a sample."""
    rows.reserved, rows.used = reserved, 0
    for module in model.modules():
        if isinstance(module, CachedAttention):
            module.clear()
