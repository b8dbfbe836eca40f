"""What decoder-only models share: attention, the pre-norm block, and the stage that runs embedding, blocks and projection.

Plain PyTorch on one device. What keeps a cut over ranks sound: local sizes come from tensor shapes, everything between blocks is
pointwise over S, what is known of tokens is an argument. A pipeline stage is the same class with fewer layers, under their
global names: one or more chunks, each a range of layers that runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatronish.batch import TokenContext
from megatronish.config import ModelConfig
from megatronish.kernels.rotary import split_rotary
from megatronish.kernels.rotary_tables import Scaling, rotary_tables
from megatronish.models.layers import CausalAttention, Dropout, Embedding, LayerNorm, Linear, RMSNorm


@dataclass(frozen=True)
class Parts:
    """In what architectures differ."""

    norm: type[RMSNorm] | type[LayerNorm]
    mlp: type[nn.Module]
    """Called with (config, dtype=, device=)."""
    bias: bool
    """Of the attention's linears."""
    positions: bool
    """A table of learned positions, added to the embedding; else rotary positions inside attention."""


Ending = Callable[[Tensor, nn.Module], Tensor]
"""(normed activations [S, B, D], the projection to the vocabulary: the head, or the embedding where it is tied) -> a result."""


@dataclass(frozen=True)
class Shared:
    """What all blocks of one forward see beside their input."""

    context: TokenContext
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin, [S, B, 1, R/2]."""


class AttentionCore(nn.Module):
    """What has no weights: split, rotary embedding, attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.queries_per_group = config.num_heads // config.kv_heads
        self.packed_shape = (-1, self.queries_per_group + 2, config.head_size)
        self.rope_layout = config.rope_layout
        self.causal = CausalAttention(config.dropout)

    def forward(self, qkv: Tensor, shared: Shared) -> Tensor:
        """[S, B, G*(q+2)*K] -> [S, B, H*K]."""
        qkv_SBGqK = qkv.unflatten(-1, self.packed_shape)
        if shared.rotary is not None:
            query_SBHK, key_SBGK, value_SBGK = split_rotary(qkv_SBGqK, *shared.rotary, layout=self.rope_layout)
        else:
            query, key, value = qkv_SBGqK.split([self.queries_per_group, 1, 1], dim=3)
            query_SBHK, key_SBGK, value_SBGK = query.flatten(2, 3), key.squeeze(3), value.squeeze(3)
        out: Tensor = self.causal(query_SBHK, key_SBGK, value_SBGK, shared.context)
        return out


class Attention(nn.Module):
    """Causal self-attention. The QKV weight is [G, q + 2, K, D]: group by group its q queries, its key, its value."""

    def __init__(self, config: ModelConfig, *, bias: bool, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        out_shape = (config.kv_heads, config.num_heads // config.kv_heads + 2, config.head_size)
        self.qkv = Linear(config.hidden_size, out_shape, bias=bias, dtype=dtype, device=device)
        self.core = AttentionCore(config)
        self.output = Linear(config.num_heads * config.head_size, (config.hidden_size,), bias=bias, dtype=dtype, device=device)

    def forward(self, x_SBD: Tensor, shared: Shared) -> Tensor:
        """[S, B, D] -> [S, B, D]."""
        out: Tensor = self.output(self.core(self.qkv(x_SBD), shared))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout of both before the sums."""

    def __init__(self, config: ModelConfig, parts: Parts, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.attention_norm = parts.norm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.attention = Attention(config, bias=parts.bias, dtype=dtype, device=device)
        self.attention_dropout = Dropout(config.dropout)
        self.mlp_norm = parts.norm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.mlp = parts.mlp(config, dtype=dtype, device=device)
        self.mlp_dropout = Dropout(config.dropout)

    def forward(self, x_SBD: Tensor, shared: Shared) -> Tensor:
        """[S, B, D] -> [S, B, D]."""
        out_SBD = self.attention(self.attention_norm(x_SBD), shared)
        # The sum goes with the norm, or with dropout: together they would write one array more. A norm that is made again for
        # backward is made from the sum alone.
        if isinstance(self.mlp_norm, RMSNorm | LayerNorm) and not self.attention_dropout.is_active:
            normed_SBD, x_SBD = self.mlp_norm(x_SBD, out_SBD)
        else:
            x_SBD = self.attention_dropout(out_SBD, shared.context, x_SBD)
            normed_SBD = self.mlp_norm(x_SBD)
        out: Tensor = self.mlp_dropout(self.mlp(normed_SBD), shared.context, x_SBD)
        return out


class Decoder(nn.Module):
    """The layers of `chunks`, with the embedding before the model's first layer and the projection to the vocabulary after its
    last.

    With `model.tie_embeddings` the projection is the embedding's: the stage of the last layer then has the embedding too."""

    parts: ClassVar[Parts]
    embedding: Embedding | None
    positions: Embedding | None
    embedding_dropout: Dropout | None
    final_norm: RMSNorm | LayerNorm | None
    head: Linear | None

    def __init__(
        self, config: ModelConfig, *, chunks: Sequence[range] | None = None, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.chunks = tuple(chunks) if chunks is not None else (range(config.num_layers),)
        is_first = any(layers.start == 0 for layers in self.chunks)
        is_last = any(layers.stop == config.num_layers for layers in self.chunks)
        rows, D, tied = config.padded_vocab_size, config.hidden_size, config.tie_embeddings
        has_embedding = is_first or (is_last and tied)
        self.embedding = Embedding(rows, D, dtype=dtype, device=device) if has_embedding else None
        self.positions = None
        if self.parts.positions and is_first:
            assert config.max_positions is not None, "constraints/ refuses learned positions without their number"
            self.positions = Embedding(config.max_positions, D, dtype=dtype, device=device)
        self.embedding_dropout = Dropout(config.dropout) if is_first else None
        blocks = {str(i): Block(config, self.parts, dtype=dtype, device=device) for layers in self.chunks for i in layers}
        self.layers = nn.ModuleDict(blocks)
        self.final_norm = self.parts.norm(D, config.norm_eps, dtype=dtype, device=device) if is_last else None
        self.head = Linear(D, (rows,), dtype=dtype, device=device) if is_last and not tied else None

    def forward(self, x: Tensor, context: TokenContext, chunk: int = 0, ending: Ending | None = None) -> Tensor:
        """Run one chunk: tokens [S, B] (first layer of the model) or activations [S, B, D] -> activations, or logits [S, B, V]
        (last layer). `ending` then stands in the place of the projection: its result is returned."""
        layers = self.chunks[chunk]
        if layers.start == 0:
            x = self.embed(x, context)
        shared = self.shared(context)
        for i in layers:
            x = self.layers[str(i)](x, shared)
        if layers.stop < self.config.num_layers:
            return x
        return self.project(x) if ending is None else self.end(x, ending)

    def embed(self, tokens_SB: Tensor, context: TokenContext) -> Tensor:
        """[S, B] -> [S, B, D]."""
        assert self.embedding is not None and self.embedding_dropout is not None
        x_SBD: Tensor = self.embedding(tokens_SB)
        if self.positions is not None:
            x_SBD = x_SBD + self.positions(context.positions_SB)
        out: Tensor = self.embedding_dropout(x_SBD, context)
        return out

    def shared(self, context: TokenContext) -> Shared:
        """What the blocks share in a forward over these tokens."""
        if self.parts.positions:
            return Shared(context, None)
        return Shared(context, rotary_tables(context.positions_SB, dtype=self.dtype, **rotary_settings(self.config)))

    def project(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] -> logits [S, B, V]."""
        assert self.final_norm is not None
        x_SBD = self.final_norm(x_SBD)
        if self.head is not None:
            return self.head(x_SBD)
        assert self.embedding is not None
        return self.embedding.project(x_SBD)

    def end(self, x_SBD: Tensor, ending: Ending) -> Tensor:
        """What `ending` makes of the normed activations and the module of the projection."""
        assert self.final_norm is not None
        projection = self.head if self.head is not None else self.embedding
        assert projection is not None
        return ending(self.final_norm(x_SBD), projection)


def rotary_settings(config: ModelConfig) -> dict[str, Any]:
    """What `rotary_tables` makes of a model."""
    given = config.rope_scaling
    scaling = None if given is None else Scaling(**given.model_dump(exclude_none=True))
    return {"size": config.rotary_size, "theta": config.rope_theta, "scaling": scaling}


def init_std(config: ModelConfig, name: str) -> float | None:
    """Standard deviation of a parameter's first values; None: ones, 0: zeros. Projections into the residual stream are scaled down
    by sqrt(2 num_layers) (Radford et al. 2019)."""
    if name.endswith(".bias"):
        return 0.0
    if "norm" in name:
        return None
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        return config.init_std / float((2 * config.num_layers) ** 0.5)
    return config.init_std
