"""GPT-2 (Radford et al. 2019; GPT-3: Brown et al. 2020): pre-norm blocks, learned positions, LayerNorm, GELU, biases.

Plain PyTorch on one device, and the reference that parallel runs are compared with. How it is cut over ranks is the data in
TENSOR_PARALLEL_PLAN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatronish.config import ModelConfig
from megatronish.kernels.gelu import gelu
from megatronish.layout import Column, Plan, Replicated, ReplicatedTable, Row, Vocab
from megatronish.models.decoder import Decoder, Parts
from megatronish.models.layers import LayerNorm, Linear

TENSOR_PARALLEL_PLAN: Plan = {
    "embedding": Vocab(),
    "positions": ReplicatedTable(),
    "layers.*.attention_norm": Replicated(),
    "layers.*.attention.qkv": Column(dim=0),
    "layers.*.attention.output": Row(dim=1),
    "layers.*.mlp_norm": Replicated(),
    "layers.*.mlp.up": Column(dim=0),
    "layers.*.mlp.down": Row(dim=1),
    "final_norm": Replicated(),
    "head": Column(dim=0),
}

# Producer -> the one linear that consumes its output: what selective recomputation does not keep (`parallel/recompute.py`).
SELECTIVE_RECOMPUTE = {
    "layers.*.attention_norm": "layers.*.attention.qkv",
    "layers.*.attention.core": "layers.*.attention.output",
    "layers.*.mlp_norm": "layers.*.mlp.up",
    "layers.*.mlp.activation": "layers.*.mlp.down",
}


class GELU(nn.Module):
    """GPT-2's."""

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, F] -> [S, B, F]."""
        return gelu(x)


class MLP(nn.Module):
    """GELU between two linears with biases."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.up = Linear(config.hidden_size, (config.mlp_size,), bias=True, dtype=dtype, device=device)
        self.activation = GELU()
        self.down = Linear(config.mlp_size, (config.hidden_size,), bias=True, dtype=dtype, device=device)

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] -> [S, B, D]."""
        out: Tensor = self.down(self.activation(self.up(x_SBD)))
        return out


class GPT2(Decoder):
    """Embedding and positions, blocks, norm, projection."""

    parts = Parts(norm=LayerNorm, mlp=MLP, bias=True, positions=True)
