"""Llama (Touvron et al. 2023; Grattafiori et al. 2024): pre-norm blocks, rotary grouped-query attention, gated MLP, no biases.

Plain PyTorch on one device, and the reference that parallel runs are compared with. How it is cut over ranks is the data in
TENSOR_PARALLEL_PLAN.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatronish.config import ModelConfig
from megatronish.kernels.gated import geglu, swiglu
from megatronish.layout import Column, Plan, Replicated, Row, Vocab
from megatronish.models.decoder import Decoder, Parts
from megatronish.models.layers import Linear, RMSNorm

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


class SwiGLU(nn.Module):
    """silu(gate) * up."""

    def forward(self, gate_up: Tensor) -> Tensor:
        """[S, B, 2F] -> [S, B, F]."""
        return swiglu(gate_up)


class GeGLU(nn.Module):
    """gelu(gate) * up."""

    def forward(self, gate_up: Tensor) -> Tensor:
        """[S, B, 2F] -> [S, B, F]."""
        return geglu(gate_up)


class MLP(nn.Module):
    """A gated activation between two linears. The fused weight is [2, F, D]: gate, then up."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, (2, config.mlp_size), dtype=dtype, device=device)
        self.activation = SwiGLU() if config.activation == "swiglu" else GeGLU()
        self.down = Linear(config.mlp_size, (config.hidden_size,), dtype=dtype, device=device)

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] -> [S, B, D]."""
        out: Tensor = self.down(self.activation(self.gate_up(x_SBD)))
        return out


class Llama(Decoder):
    """Embedding, blocks, norm, projection."""

    parts = Parts(norm=RMSNorm, mlp=MLP, bias=False, positions=False)
