"""Llama (Touvron et al. 2023; Grattafiori et al. 2024): pre-norm blocks, rotary grouped-query attention, SwiGLU, untied head.

Plain PyTorch on one device, and the reference that parallel runs are compared with. How it is cut over ranks is the data in
TENSOR_PARALLEL_PLAN; what keeps that sound: local sizes come from tensor shapes, everything between blocks is pointwise over S,
what is known of tokens is an argument. A pipeline stage is the same class with fewer layers, under their global names: one or more
chunks, each a range of layers that runs by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatronish.batch import TokenContext
from megatronish.config import ModelConfig
from megatronish.kernels.rotary import rotary_tables, split_rotary
from megatronish.kernels.swiglu import swiglu
from megatronish.layout import Column, Plan, Replicated, Row, Vocab
from megatronish.models.layers import CausalAttention, Dropout, Embedding, Linear, RMSNorm

TENSOR_PARALLEL_PLAN: Plan = {
    "embedding": Vocab(),
    "layers.*.attention_norm": Replicated(),
    "layers.*.attention.qkv": Column(dim=0),
    "layers.*.attention.output": Row(dim=1),
    "layers.*.mlp_norm": Replicated(),
    "layers.*.mlp.gate_up": Column(dim=1),
    "layers.*.mlp.down": Row(dim=1),
    "final_norm": Replicated(),
    "head": Column(dim=0),
}


# Producer -> the one linear that consumes its output: what selective recomputation does not keep (`parallel/recompute.py`).
SELECTIVE_RECOMPUTE = {
    "layers.*.attention_norm": "layers.*.attention.qkv",
    "layers.*.attention.core": "layers.*.attention.output",
    "layers.*.mlp_norm": "layers.*.mlp.gate_up",
    "layers.*.mlp.activation": "layers.*.mlp.down",
}


class AttentionCore(nn.Module):
    """What has no weights: split, rotary embedding, attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.packed_shape = (-1, config.num_heads // config.kv_heads + 2, config.head_size)
        self.causal = CausalAttention(config.dropout)

    def forward(self, qkv: Tensor, cos: Tensor, sin: Tensor, context: TokenContext) -> Tensor:
        """[S, B, G*(q+2)*K] and rotary tables [S, B, 1, K/2] -> [S, B, H*K]."""
        query_SBHK, key_SBGK, value_SBGK = split_rotary(qkv.unflatten(-1, self.packed_shape), cos, sin)
        out: Tensor = self.causal(query_SBHK, key_SBGK, value_SBGK, context)
        return out


class Attention(nn.Module):
    """Causal self-attention. The QKV weight is [G, q + 2, K, D]: group by group its q queries, its key, its value."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        out_shape = (config.kv_heads, config.num_heads // config.kv_heads + 2, config.head_size)
        self.qkv = Linear(config.hidden_size, out_shape, dtype=dtype, device=device)
        self.core = AttentionCore(config)
        self.output = Linear(config.num_heads * config.head_size, (config.hidden_size,), dtype=dtype, device=device)

    def forward(self, x_SBD: Tensor, cos: Tensor, sin: Tensor, context: TokenContext) -> Tensor:
        """[S, B, D] and rotary tables [S, B, 1, K/2] -> [S, B, D]."""
        out: Tensor = self.output(self.core(self.qkv(x_SBD), cos, sin, context))
        return out


class SwiGLU(nn.Module):
    """silu(gate) * up."""

    def forward(self, gate_up: Tensor) -> Tensor:
        """[S, B, 2F] -> [S, B, F]."""
        return swiglu(gate_up)


class MLP(nn.Module):
    """SwiGLU. The fused weight is [2, F, D]: gate, then up."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, (2, config.mlp_size), dtype=dtype, device=device)
        self.activation = SwiGLU()
        self.down = Linear(config.mlp_size, (config.hidden_size,), dtype=dtype, device=device)

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] -> [S, B, D]."""
        out: Tensor = self.down(self.activation(self.gate_up(x_SBD)))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout of both before the sums."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.attention = Attention(config, dtype=dtype, device=device)
        self.attention_dropout = Dropout(config.dropout)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self.mlp = MLP(config, dtype=dtype, device=device)
        self.mlp_dropout = Dropout(config.dropout)

    def forward(self, x_SBD: Tensor, cos: Tensor, sin: Tensor, context: TokenContext) -> Tensor:
        """[S, B, D] and rotary tables [S, B, 1, K/2] -> [S, B, D]."""
        x_SBD = x_SBD + self.attention_dropout(self.attention(self.attention_norm(x_SBD), cos, sin, context), context)
        return x_SBD + self.mlp_dropout(self.mlp(self.mlp_norm(x_SBD)), context)


class Llama(nn.Module):
    """The layers of `chunks`, with the embedding before the model's first layer and the head after its last."""

    embedding: Embedding | None
    embedding_dropout: Dropout | None
    final_norm: RMSNorm | None
    head: Linear | None

    def __init__(
        self, config: ModelConfig, *, chunks: Sequence[range] | None = None, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.chunks = tuple(chunks) if chunks is not None else (range(config.num_layers),)
        has_embedding = any(layers.start == 0 for layers in self.chunks)
        has_head = any(layers.stop == config.num_layers for layers in self.chunks)
        rows, D = config.padded_vocab_size, config.hidden_size
        self.embedding = Embedding(rows, D, dtype=dtype, device=device) if has_embedding else None
        self.embedding_dropout = Dropout(config.dropout) if has_embedding else None
        self.layers = nn.ModuleDict({str(i): Block(config, dtype=dtype, device=device) for layers in self.chunks for i in layers})
        self.final_norm = RMSNorm(D, config.norm_eps, dtype=dtype, device=device) if has_head else None
        self.head = Linear(D, (rows,), dtype=dtype, device=device) if has_head else None

    def forward(self, x: Tensor, context: TokenContext, chunk: int = 0) -> Tensor:
        """Run one chunk: tokens [S, B] (first layer of the model) or activations [S, B, D] -> activations, or logits [S, B, V]
        (last layer)."""
        config, layers = self.config, self.chunks[chunk]
        if layers.start == 0:
            assert self.embedding is not None and self.embedding_dropout is not None
            x = self.embedding_dropout(self.embedding(x), context)
        cos, sin = rotary_tables(context.positions_SB, head_size=config.head_size, theta=config.rope_theta, dtype=self.dtype)
        for i in layers:
            x = self.layers[str(i)](x, cos, sin, context)
        if layers.stop == config.num_layers:
            assert self.final_norm is not None and self.head is not None
            x = self.head(self.final_norm(x))
        return x


def init_std(config: ModelConfig, name: str) -> float | None:
    """Standard deviation of a parameter's first values; None: ones. Projections into the residual stream are scaled down by
    sqrt(2 num_layers) (Radford et al. 2019)."""
    if "norm" in name:
        return None
    if name.endswith(("attention.output.weight", "mlp.down.weight")):
        return config.init_std / float((2 * config.num_layers) ** 0.5)
    return config.init_std
