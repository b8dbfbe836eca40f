"""The calls that a step makes of ops with several bodies, in their sizes on one rank: what kernel_choices.py decides on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatronish.assemble import DTYPES
from megatronish.config import Config
from megatronish.kernels.adamw import AdamWNumbers
from megatronish.kernels.dispatch import Case
from megatronish.kernels.rotary_tables import rotary_tables
from megatronish.kernels.table import KERNELS
from megatronish.models.decoder import rotary_settings


@dataclass(frozen=True)
class _Sizes:
    """Of one microbatch on one rank, as batch.py names them."""

    S: int
    B: int
    rows: int
    """Of S, between blocks: fewer under sequence parallelism."""
    D: int
    H: int
    G: int
    K: int
    F: int
    V: int
    """Columns of the logits, padding and all; a part of the vocabulary."""
    dtype: torch.dtype
    flat: int = 1 << 24
    """Elements of the optimizer's tensors: its speed a byte is that of any large slice."""

    def draw(self, device: str, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype, device=device)


Make = Callable[[Config, _Sizes, str], tuple[Any, ...]]


def _sizes(config: Config, tp_size: int) -> _Sizes:
    model, S = config.model, config.data.sequence_length
    return _Sizes(
        S=S,
        B=config.train.micro_batch_size,
        rows=S // tp_size if config.parallel.sequence else S,
        D=model.hidden_size,
        H=model.num_heads // tp_size,
        G=model.kv_heads // tp_size,
        K=model.head_size,
        F=model.mlp_size // tp_size,
        V=model.padded_vocab_size // tp_size,
        dtype=DTYPES[config.train.dtype],
    )


def cases(config: Config, tp_size: int) -> list[Case]:
    """Those of every op that has more than one body."""
    sizes = _sizes(config, tp_size)
    few = replace(sizes, S=min(sizes.S, 4), rows=min(sizes.rows, 4), flat=1 << 12)
    is_masked = config.data.separate_documents or config.model.dropout > 0
    make: dict[str, Make] = {}
    if config.model.architecture == "llama":
        make["rms_norm"] = partial(_norm, num_parameters=1)
        make |= {"split_rotary": _rotary, config.model.activation: _gated}
    else:
        make["layer_norm"] = partial(_norm, num_parameters=2)
        make |= {"gelu": _gelu}
    recomputed = [config.parallel.recompute_of(stage) for stage in range(config.parallel.pipeline)]
    if not config.model.dropout and any(mode != "selective" for mode in recomputed):
        # Dropout takes the sum to itself; a norm that is made again for backward is made from the sum.
        make |= {f"add_{name}": partial(_add_norm, norm=call) for name, call in make.items() if name.endswith("norm")}
    if config.model.dropout:
        make["bias_gelu_dropout_add"] = _dropout_add
    if is_masked:
        make["masked_attention"] = _masked_attention
    if not config.data.separate_documents:
        make["attention"] = _attention  # without dropout, or in evaluation
    make["cross_entropy"] = _cross_entropy
    if config.parallel.zero_engine == "native":  # DeepSpeed's engine brings its own optimizer
        make |= {"adamw": _adamw, "square_sum": _square_sum}
    return [
        Case(KERNELS[name], sizes.dtype, partial(call, config, sizes), partial(call, config, few)) for name, call in make.items()
    ]


def _norm(config: Config, z: _Sizes, device: str, *, num_parameters: int) -> tuple[Any, ...]:
    x = z.draw(device, z.rows, z.B, z.D)
    return x, *(z.draw(device, z.D) for _ in range(num_parameters)), config.model.norm_eps


def _add_norm(config: Config, z: _Sizes, device: str, *, norm: Make) -> tuple[Any, ...]:
    x, *others = norm(config, z, device)
    return x, torch.randn_like(x), *others


def _dropout_add(config: Config, z: _Sizes, device: str) -> tuple[Any, ...]:
    x, residual = (z.draw(device, z.rows, z.B, z.D) for _ in range(2))
    return x, None, residual, torch.arange(z.B, device=device), False, 0, 0, config.model.dropout


def _rotary(config: Config, z: _Sizes, device: str) -> tuple[Any, ...]:
    positions = torch.arange(z.S, device=device)[:, None].expand(z.S, z.B)
    tables = rotary_tables(positions, dtype=z.dtype, **rotary_settings(config.model))
    return z.draw(device, z.S, z.B, z.G, z.H // z.G + 2, z.K), *tables, config.model.rope_layout == "interleaved"


def _gated(config: Config, z: _Sizes, device: str) -> tuple[Any, ...]:
    return (z.draw(device, z.S, z.B, 2 * z.F),)


def _gelu(config: Config, z: _Sizes, device: str) -> tuple[Any, ...]:
    return (z.draw(device, z.S, z.B, z.F),)


def _attention(config: Config, z: _Sizes, device: str) -> tuple[Any, ...]:
    return tuple(z.draw(device, z.S, z.B, heads, z.K) for heads in (z.H, z.G, z.G))


def _masked_attention(config: Config, z: _Sizes, device: str) -> tuple[Any, ...]:
    rate = config.model.dropout
    documents = torch.zeros((z.S, z.B), dtype=torch.int64, device=device) if config.data.separate_documents else None
    samples = torch.arange(z.B, device=device) if rate else None
    return *_attention(config, z, device), documents, None, samples, 0, 0, rate, 1.0 / math.sqrt(z.K), True, 0


def _cross_entropy(config: Config, z: _Sizes, device: str) -> tuple[Any, ...]:
    tokens = -(-z.S * z.B // config.train.loss_chunks)
    num_valid = min(z.V, config.model.vocab_size)  # as the first tensor rank has it
    labels_T = torch.randint(num_valid, (tokens,), device=device)
    return z.draw(device, tokens, z.V), labels_T, 0, num_valid, config.train.label_smoothing > 0


def _wide(z: _Sizes) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _adamw(config: Config, z: _Sizes, device: str) -> tuple[Any, ...]:
    c, wide, n = config.optim, _wide(z), z.flat
    numbers = AdamWNumbers(c.lr, c.beta1, c.beta2, c.eps, c.weight_decay)
    moments = torch.bfloat16 if c.moments_dtype == "bfloat16" else wide
    low = z.draw(device, n)
    has_master = low.dtype != wide and c.master != "none"
    master = low.to(wide) if has_master else low
    if c.master == "remainder":
        master = torch.zeros(n, dtype=torch.int16, device=device)
    grad, scalars = torch.randn(n, dtype=wide, device=device), torch.ones(2, dtype=wide, device=device)
    state = (torch.zeros(n, dtype=moments, device=device) for _ in range(2))
    segments = None
    if c.rounding == "stochastic":
        segments = torch.tensor([[n, 1, 0, 0, 1 << 40, 1 << 40, 0]], device=device)
    return master, grad, *state, scalars, low if has_master else None, numbers, segments, c.rounding, True


def _square_sum(config: Config, z: _Sizes, device: str) -> tuple[Any, ...]:
    return ([torch.randn(z.flat, dtype=_wide(z), device=device)],)
