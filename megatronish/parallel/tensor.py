"""Tensor parallelism: swaps a plain model's modules for ones that hold a shard, as the model's plan says.

Megatron's column and row pairs (Shoeybi et al. 2019, section 3) with sequence parallelism (Korthikanti et al. 2022, section 4.2.2).
Linears own their backward: it returns the input gradient and hands (weight, dY, X) to a sink, so that the weight product can run
under the input gradient's communication, and accumulates where the sink says.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatronish.comm import Group, Pending
from megatronish.comm.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from megatronish.kernels.linear import linear, linear_input_gradient
from megatronish.layout import Column, ParamLayout, ParamPlacement, Plan, Replicated, ReplicatedTable, Row, Rule, Vocab, shard_range


class WeightGradientSink(Protocol):
    """Who takes the weight gradients of linears and embeddings (see `optim/weight_gradients.py`). What a method returns goes to
    autograd; None: the gradient is kept elsewhere."""

    def linear(self, weight: nn.Parameter, dy: Tensor, x: Tensor) -> Tensor | None:
        """Owe `weight` the gradient dY^T X, for dy [..., O] and x [..., I]."""

    def add_linear(self, weight: nn.Parameter, dy: Tensor, x: Tensor) -> None:
        """The same, in parts and before backward: `complete` ends them."""

    def complete(self, weight: nn.Parameter) -> None:
        """In backward: `weight` has had all parts of `add_linear`."""

    def bias(self, bias: nn.Parameter, dy: Tensor) -> Tensor | None:
        """Owe `bias` the sum of dy [..., O] over tokens."""

    def rows(self, weight: nn.Parameter, dy: Tensor, rows: Tensor) -> Tensor | None:
        """Owe row rows[...] of `weight` the gradient dy[..., D]; rows outside the weight are another rank's."""


@dataclass(frozen=True)
class TensorParallel:
    """What a cut module needs to know."""

    group: Group
    sequence_parallel: bool
    regather_input: bool
    """Column layers gather their input again for backward instead of keeping S tokens: saves memory, costs an all-gather."""
    sink: WeightGradientSink
    name: str = ""
    """The module's global name."""

    def start_gather(self, x: Tensor) -> Pending:
        """[S/tp, ...] -> [S, ...] under sequence parallelism, else x."""
        return start_all_gather(x, self.group, what=self.name) if self.sequence_parallel else Pending(x)

    def start_sum(self, x: Tensor) -> Pending:
        """Partial [S, ...] -> summed [S/tp, ...] under sequence parallelism, else summed [S, ...] in place."""
        if self.sequence_parallel:
            return start_reduce_scatter(x, self.group, what=self.name)
        return start_all_reduce(x, self.group, what=self.name)


Remake = Callable[[], Tensor]
"""Makes a linear's input again, right before its backward (see `recompute.py`)."""


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, tp: TensorParallel, remake: Remake | None
    ) -> Tensor:
        x_full = tp.start_gather(x).wait()
        if remake is None:
            ctx.save_for_backward(x if tp.regather_input else x_full)
        ctx.weight, ctx.bias, ctx.tp, ctx.remake = weight, bias, tp, remake
        return linear(x_full, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        weight, tp = ctx.weight, ctx.tp
        x = ctx.saved_tensors[0] if ctx.remake is None else ctx.remake()
        gathering = tp.start_gather(x) if tp.regather_input or ctx.remake is not None else Pending(x)
        dx = linear_input_gradient(dy, weight)
        x_full = gathering.wait()
        summing = tp.start_sum(dx)
        dw = tp.sink.linear(weight, dy, x_full)  # under the sum's communication
        db = None if ctx.bias is None else tp.sink.bias(ctx.bias, dy)
        return summing.wait(), dw, db, None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, tp: TensorParallel, remake: Remake | None
    ) -> Tensor:
        if remake is None:
            ctx.save_for_backward(x)
        ctx.weight, ctx.bias, ctx.tp, ctx.remake = weight, bias, tp, remake
        if tp.group.size == 1:
            return linear(x, weight, bias)
        out = tp.start_sum(linear(x, weight)).wait()
        return out if bias is None else out.add_(bias)  # once, so after the sum

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        weight, tp = ctx.weight, ctx.tp
        gathering = tp.start_gather(dy)
        # Of this rank's tokens, under the gathering.
        db = None if ctx.bias is None else tp.sink.bias(ctx.bias, dy)
        x = ctx.saved_tensors[0] if ctx.remake is None else ctx.remake()  # as well
        dy_full = gathering.wait()
        dx = linear_input_gradient(dy_full, weight)
        dw = tp.sink.linear(weight, dy_full, x)
        return dx, dw, db, None, None


class _VocabEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: nn.Parameter, first_row: int, tp: TensorParallel) -> Tensor:
        rows = tokens - first_row
        ctx.save_for_backward(rows)
        ctx.weight, ctx.tp = weight, tp
        if tp.group.size == 1:
            return nn.functional.embedding(rows, weight)
        here = (rows >= 0) & (rows < weight.shape[0])
        out = nn.functional.embedding(rows.clamp(0, weight.shape[0] - 1), weight) * here[..., None].to(weight.dtype)
        return tp.start_sum(out).wait()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None, None]:
        (rows,), weight, tp = ctx.saved_tensors, ctx.weight, ctx.tp
        return None, tp.sink.rows(weight, tp.start_gather(dy).wait(), rows), None, None


class _TableLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: nn.Parameter, tp: TensorParallel) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight, ctx.tp = weight, tp
        return nn.functional.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:
        (rows,) = ctx.saved_tensors
        return None, ctx.tp.sink.rows(ctx.weight, dy, rows), None


class _Cut(nn.Module):
    """A module that holds its tp rank's shard of one weight."""

    def __init__(self, weight: nn.Parameter, tp: TensorParallel) -> None:
        super().__init__()
        self.weight = weight
        self.tp = tp

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}, tp {self.tp.group.index} of {self.tp.group.size}" + (
            ", sequence parallel" if self.tp.sequence_parallel else ""
        )


class CutLinear(_Cut):
    """A linear, with or without a bias, that may have its input made again for backward instead of keeping it."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, tp: TensorParallel) -> None:
        super().__init__(weight, tp)
        self.bias = bias
        self.input_source: Callable[[Tensor], Remake | None] | None = None
        """Given an input, how to make it again; set by `recompute_selectively`."""

    def remake(self, x: Tensor) -> Remake | None:
        """How to make `x` again for backward; None: keep it."""
        return None if self.input_source is None else self.input_source(x)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", bias={list(self.bias.shape)}" if self.bias is not None else "")


class ColumnParallelLinear(CutLinear):
    """Output features cut. [S/tp or S, B, in] -> [S, B, out/tp]."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _ColumnLinear.apply(x, self.weight, self.bias, self.tp, self.remake(x))
        return out


class RowParallelLinear(CutLinear):
    """Input features cut, partial outputs summed, then the whole bias. [S, B, in/tp] -> [S/tp or S, B, out]."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RowLinear.apply(x, self.weight, self.bias, self.tp, self.remake(x))
        return out


class VocabParallelEmbedding(_Cut):
    """Rows cut; a rank gives zeros for the tokens of others. [S, B] -> [S/tp or S, B, D]."""

    def __init__(self, weight: nn.Parameter, tp: TensorParallel, *, first_row: int) -> None:
        super().__init__(weight, tp)
        self.first_row = first_row

    def forward(self, tokens_SB: Tensor) -> Tensor:
        out: Tensor = _VocabEmbedding.apply(tokens_SB, self.weight, self.first_row, self.tp)
        return out

    def project(self, x: Tensor) -> Tensor:
        """The product with this rank's rows (tied embeddings): [S/tp or S, B, D] -> [S, B, rows/tp]."""
        out: Tensor = _ColumnLinear.apply(x, self.weight, None, self.tp, None)
        return out


class TableLookup(_Cut):
    """A whole table. [S, B] -> [S/tp or S, B, D]: rows for the tokens that this rank goes on with."""

    def forward(self, rows_SB: Tensor) -> Tensor:
        if self.tp.sequence_parallel:
            rows_SB = rows_SB.chunk(self.tp.group.size)[self.tp.group.index]
        out: Tensor = _TableLookup.apply(rows_SB, self.weight, self.tp)
        return out


def find_rule(plan: Plan, module_name: str) -> tuple[str, Rule]:
    """The one (pattern, rule) of the plan for a module that owns parameters. Errors name a module with none or with several."""
    matches = [(pattern, rule) for pattern, rule in plan.items() if fnmatch.fnmatchcase(module_name, pattern)]
    if len(matches) != 1:
        found = ", ".join(pattern for pattern, _ in matches) or "none"
        raise ValueError(
            f"module {module_name} owns parameters and needs exactly one rule of the tensor-parallel plan; found: {found}"
        )
    return matches[0]


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module that owns parameters directly."""
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            yield name, module


def make_param_layout(
    stages: list[nn.Module], plan: Plan, *, tp_size: int, sequence_parallel: bool, tied: Collection[str] = ()
) -> ParamLayout:
    """The whole model's table from its plain stages (meta tensors will do); `tied` names the parameters used at both ends of the
    model. An error names a rule that matches nothing."""
    placements: dict[str, ParamPlacement] = {}
    used: set[str] = set()
    for stage, model in enumerate(stages):
        for module_name, module in owners(model):
            pattern, rule = find_rule(plan, module_name)
            used.add(pattern)
            for parameter_name, parameter in module.named_parameters(recurse=False):
                name, shard_dim = f"{module_name}.{parameter_name}", _shard_dim(rule, parameter_name)
                # Such a parameter sees only S/tp tokens on each rank.
                partial = shard_dim is None and sequence_parallel and tp_size > 1
                sums = ("tp",) if partial else ()
                first, is_tied = placements.get(name), name in tied
                if first is not None:
                    assert is_tied, f"{name} is on stages {first.stages[0]} and {stage}, but not tied"
                    placements[name] = replace(first, stages=(*first.stages, stage), sum_gradient_over=(*sums, "ends"))
                    continue
                placements[name] = ParamPlacement(
                    global_shape=tuple(parameter.shape),
                    dtype=parameter.dtype,
                    shard_dim=shard_dim,
                    stages=(stage,),
                    owner_stage=stage,
                    sum_gradient_over=sums,
                    is_bias=parameter_name == "bias",
                    tied=is_tied,
                )
    unused = [pattern for pattern in plan if pattern not in used]
    if unused:
        raise ValueError(f"rules of the tensor-parallel plan match no module: {', '.join(unused)}")
    return ParamLayout(placements, tp_size=tp_size, pp_size=len(stages))


def _shard_dim(rule: Rule, parameter_name: str) -> int | None:
    if isinstance(rule, Replicated | ReplicatedTable) or (isinstance(rule, Row) and parameter_name == "bias"):
        return None
    return rule.dim


def apply_plan(model: nn.Module, plan: Plan, tp: TensorParallel) -> None:
    """Swap the modules of a plain model on the meta device for ones that hold this tp rank's shards, still on meta."""
    for name, module in list(owners(model)):
        _, rule = find_rule(plan, name)
        if not isinstance(rule, Replicated):
            model.set_submodule(name, _cut_module(rule, module, replace(tp, name=name)))


def _cut_module(rule: Rule, module: nn.Module, tp: TensorParallel) -> nn.Module:
    weight = _shard(module.weight, _shard_dim(rule, "weight"), tp)
    bias = _shard(module.bias, _shard_dim(rule, "bias"), tp) if getattr(module, "bias", None) is not None else None
    if isinstance(rule, Column):
        return ColumnParallelLinear(weight, bias, tp)
    if isinstance(rule, Row):
        return RowParallelLinear(weight, bias, tp)
    assert bias is None, f"{type(module).__name__} has a bias, and its rule {rule} none"
    if isinstance(rule, ReplicatedTable):
        return TableLookup(weight, tp)
    assert isinstance(rule, Vocab) and rule.dim == 0, rule
    assert isinstance(module.weight, nn.Parameter)
    start, _ = shard_range(module.weight.shape[0], tp.group.index, tp.group.size)
    return VocabParallelEmbedding(weight, tp, first_row=start)


def _shard(parameter: object, shard_dim: int | None, tp: TensorParallel) -> nn.Parameter:
    """This tp rank's part, on the meta device."""
    assert isinstance(parameter, nn.Parameter) and parameter.is_meta, "apply_plan cuts plain models on the meta device"
    shape = list(parameter.shape)
    if shard_dim is not None:
        start, stop = shard_range(shape[shard_dim], tp.group.index, tp.group.size)
        shape[shard_dim] = stop - start
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
