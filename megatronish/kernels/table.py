"""KERNELS: every op with its reference and the inputs to try it on. Tests, benches and reports run over this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatronish.kernels import (
    adamw,
    attention,
    bias_gelu_dropout_add,
    cached_attention,
    cross_entropy,
    dropout,
    gated,
    gelu,
    layer_norm,
    linear,
    masked_attention,
    rms_norm,
    rotary,
    square_sum,
)
from megatronish.kernels.adamw import AdamWNumbers


@dataclass(frozen=True)
class Kernel:
    """One row."""

    name: str
    function: Callable[..., Any]
    """What the trainer calls."""
    reference: Callable[..., Any]
    """The same arguments and results in plain PyTorch."""
    sample_inputs: Callable[[torch.dtype, str], list[tuple[Any, ...]]]
    """(dtype, device) -> lists of arguments."""
    differentiable: tuple[int, ...] = ()
    """Positions of the arguments that get a gradient, where they are given."""
    mutated: tuple[int, ...] = ()
    """Positions of the arguments that are written: these are results."""
    choice: str = ""
    """The key of a config's `kernels` that says which body runs, where it is not the name."""

    @property
    def chosen_as(self) -> str:
        """That key."""
        return self.choice or self.name


def _adamw(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    low: Tensor | None,
    numbers: AdamWNumbers,
    segments: Tensor | None,
    rounding: adamw.Rounding,
    zero_grad: bool,
) -> None:
    more: dict[str, Any] = {"segments": segments, "rounding": rounding, "zero_grad": zero_grad}
    adamw.adamw_(master, grad, exp_avg, exp_avg_sq, scalars=scalars, low=low, numbers=numbers, **more)


def _attention_reference(query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor) -> Tensor:
    return attention.reference(query_SBHK, key_SBGK, value_SBGK)[0]


def _cross_entropy(bodies: tuple[Callable[..., Tensor], Callable[..., Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(parts of the loss, gradient of a loss that counts every token once), as a rank that has all columns makes them."""
    parts, backward = bodies

    def both(logits_TV: Tensor, labels_T: Tensor, first_row: int, num_valid: int, with_sum: bool) -> tuple[Tensor, Tensor]:
        parts_PT = parts(logits_TV, labels_T, first_row, num_valid, with_sum)
        log_sum_exp_T = parts_PT[1].log() + parts_PT[0]
        return parts_PT, backward(torch.ones_like(log_sum_exp_T), logits_TV, labels_T, log_sum_exp_T, first_row, num_valid)

    return both


def _dropout(x: Tensor, samples_B: Tensor, batch_dim: int, first: int, key: int, rate: float) -> Tensor:
    return dropout.dropout(x, samples_B, batch_dim=batch_dim, first=first, key=key, rate=rate)


def _bias_gelu_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, samples_B: Tensor | None, use_gelu: bool, *numbers: Any
) -> Tensor:
    named: dict[str, Any] = dict(zip(("first", "key", "rate"), numbers, strict=True))
    activation: Literal["gelu", "none"] = "gelu" if use_gelu else "none"
    return bias_gelu_dropout_add.bias_gelu_dropout_add(x, bias, residual, samples_B, activation=activation, **named)


def _split_rotary(qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    return rotary.split_rotary(qkv, cos, sin, layout="interleaved" if interleaved else "half")


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> Tensor:
    m = masked_attention.Mask(*mask)
    drop = m.samples_B if m.samples_B is None else masked_attention.WeightDropout(m.samples_B, m.first_head, m.drop_key, m.rate)
    given: dict[str, Any] = {"causal": m.causal, "window": m.window, "scale": m.scale, "slopes_H": m.slopes_H}
    return masked_attention.attend(query, key, value, documents_SB=m.documents_SB, drop=drop, **given)[0]


def _masked_attention_reference(*arguments: Any) -> Tensor:
    return masked_attention.reference(*arguments)[0]


KERNELS: dict[str, Kernel] = {
    row.name: row
    for row in (
        Kernel("rms_norm", rms_norm.rms_norm, rms_norm.reference, rms_norm.sample_inputs, differentiable=(0, 1)),
        Kernel("layer_norm", layer_norm.layer_norm, layer_norm.reference, layer_norm.sample_inputs, differentiable=(0, 1, 2)),
        Kernel("add_rms_norm", rms_norm.add_rms_norm, rms_norm.add_reference, rms_norm.add_sample_inputs, differentiable=(0, 1, 2)),
        Kernel(
            "add_layer_norm",
            layer_norm.add_layer_norm,
            layer_norm.add_reference,
            layer_norm.add_sample_inputs,
            differentiable=(0, 1, 2, 3),
        ),
        Kernel("split_rotary", _split_rotary, rotary.reference, rotary.sample_inputs, differentiable=(0,)),
        Kernel("swiglu", gated.swiglu, gated.swiglu_reference, gated.sample_inputs, differentiable=(0,)),
        Kernel("geglu", gated.geglu, gated.geglu_reference, gated.sample_inputs, differentiable=(0,)),
        Kernel("gelu", gelu.gelu, gelu.reference, gelu.sample_inputs, differentiable=(0,)),
        Kernel("attention", attention.attention, _attention_reference, attention.sample_inputs, differentiable=(0, 1, 2)),
        Kernel(
            "masked_attention",
            _masked_attention,
            _masked_attention_reference,
            masked_attention.sample_inputs,
            differentiable=(0, 1, 2),
            choice="attention",
        ),
        Kernel(
            "bias_gelu_dropout_add",
            _bias_gelu_dropout_add,
            bias_gelu_dropout_add.reference,
            bias_gelu_dropout_add.sample_inputs,
            differentiable=(0, 1, 2),
        ),
        Kernel("dropout", _dropout, dropout.reference, dropout.sample_inputs, differentiable=(0,)),
        Kernel("cached_attention", cached_attention.cached_attention, cached_attention.reference, cached_attention.sample_inputs),
        Kernel("linear", linear.linear, linear.reference, linear.sample_inputs),
        Kernel(
            "linear_input_gradient",
            linear.linear_input_gradient,
            linear.input_gradient_reference,
            linear.input_gradient_sample_inputs,
        ),
        Kernel(
            "accumulate_weight_gradient",
            linear.accumulate_weight_gradient,
            linear.weight_gradient_reference,
            linear.weight_gradient_sample_inputs,
            mutated=(0,),
        ),
        Kernel(
            "accumulate_bias_gradient",
            linear.accumulate_bias_gradient,
            linear.bias_gradient_reference,
            linear.bias_gradient_sample_inputs,
            mutated=(0,),
        ),
        Kernel(
            "accumulate_row_gradient",
            linear.accumulate_row_gradient,
            linear.row_gradient_reference,
            linear.row_gradient_sample_inputs,
            mutated=(0,),
        ),
        Kernel(
            "cross_entropy",
            _cross_entropy((cross_entropy.cross_entropy_parts, cross_entropy.cross_entropy_backward)),
            _cross_entropy((cross_entropy.reference, cross_entropy.reference_backward)),
            cross_entropy.sample_inputs,
        ),
        Kernel(
            "cross_entropy_parts",
            cross_entropy.cross_entropy_parts,
            cross_entropy.reference,
            cross_entropy.sample_inputs,
            choice="cross_entropy",
        ),
        Kernel(
            "cross_entropy_backward",
            cross_entropy.cross_entropy_backward,
            cross_entropy.reference_backward,
            cross_entropy.backward_sample_inputs,
            choice="cross_entropy",
        ),
        Kernel(
            "cross_entropy_backward_",
            cross_entropy.cross_entropy_backward_,
            cross_entropy.reference_backward_in_place,
            cross_entropy.backward_sample_inputs,
            mutated=(1,),
            choice="cross_entropy",
        ),
        Kernel("adamw", _adamw, adamw.reference, adamw.sample_inputs, mutated=(0, 1, 2, 3, 5)),
        Kernel("square_sum", square_sum.square_sum, square_sum.reference, square_sum.sample_inputs),
    )
}
