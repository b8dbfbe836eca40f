"""What the kernels bench measures beside the bodies of our ops: torch, and packages of others, each where it can be imported.

A contender takes an op's arguments and gives its results, through autograd where the op does; so one test of correctness and one
clock serve all. What an installed version no longer has under these names is shown as that, with the error.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatronish.comm.groups import lone_communicator
from megatronish.errors import UserError
from megatronish.kernels.installed import refuses_cpu, refuses_package

Bind = Callable[..., Callable[[], Any]]
"""(the op's arguments) -> a call with its results. What is made before the call is not timed."""


def _refuses_nothing(*arguments: Any) -> str | None:
    return None


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Contender:
    """One way to do an op."""

    name: str
    bind: Bind
    refuses: Callable[..., str | None] = _refuses_nothing
    """(the op's arguments) -> why it cannot do this call; None if it may."""
    forced: Mapping[str, str] = field(default_factory=dict)
    """Of a body of ours: what `registry.choosing` forces. A peer has none."""
    arrange: Callable[[Tensor], Tensor] = _same
    """An argument in the memory layout that it likes best; made before the clock starts."""
    backward_runs_once: bool = False
    """It frees what it saved, even where autograd is told to retain it."""
    is_limit: bool = False
    """It does the part of the work that nobody can leave out, not the op."""

    @property
    def is_body(self) -> bool:
        return bool(self.forced)


def calls(function: Callable[..., Any]) -> Bind:
    """The plain way."""
    return lambda *arguments: lambda: function(*arguments)


def needs(package: str, *modules: str) -> Callable[..., str | None]:
    """Refuses where a package is missing, and on CPU."""

    def refuses(*arguments: Any) -> str | None:
        return refuses_package(package, *modules) or refuses_cpu(_first_tensor(arguments))

    return refuses


def _first_tensor(arguments: Any) -> Tensor:
    """Of an op's arguments."""
    flat = (b for a in arguments for b in (a if isinstance(a, list) else [a]))
    return next(a for a in flat if isinstance(a, Tensor))


def load(name: str) -> Any:
    """A module of a package that may not be there."""
    return importlib.import_module(name)


def compiled(name: str, function: Callable[..., Any]) -> Contender:
    """torch.compile of plain PyTorch."""

    def bind(*arguments: Any) -> Callable[[], Any]:
        torch.compiler.reset()  # beyond some shapes of one function torch gives up and runs it eagerly
        fast = torch.compile(function, dynamic=False)
        return lambda: fast(*arguments)

    # What is compiled frees what it saved.
    return Contender(name, bind, backward_runs_once=True)


def eager_and_compiled(function: Callable[..., Any]) -> tuple[Contender, ...]:
    """Both."""
    return Contender("torch-eager", calls(function)), compiled("torch-compile", function)


# Attention: [S, B, H, K], and what follows of a mask.


def _sdpa(name: str, *, causal: bool) -> Contender:
    backend = {"sdpa-flash": "FLASH_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION", "sdpa-efficient": "EFFICIENT_ATTENTION"}[name]

    def attend(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return out.permute(2, 0, 1, 3)

    return Contender(name, calls(attend), _refuses_nothing if name == "sdpa-flash" else lambda *a: refuses_cpu(a[0]))


def _flash_attn(*, causal: bool) -> Contender:
    def attend(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> Tensor:
        window = (mask[-1] - 1, 0) if mask and mask[-1] else (-1, -1)
        given = [x.transpose(0, 1) for x in (query, key, value)]
        return load("flash_attn").flash_attn_func(*given, causal=causal, window_size=window).transpose(0, 1)

    return Contender("flash-attn", calls(attend), needs("flash_attn", "flash_attn.flash_attn_interface"))


def _flex(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> Callable[[], Any]:
    """torch's flex_attention, compiled, with the blocks of a window or of documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    documents_SB, window = mask[0], mask[-1]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (i >= j) & (i - j < window) if window else i >= j
        return near if documents_SB is None else near & (documents_SB[i, b] == documents_SB[j, b])

    S, B = query.shape[:2]
    blocks = create_block_mask(sees, None if documents_SB is None else B, None, S, S, device=query.device.type)
    torch.compiler.reset()
    attend = torch.compile(flex_attention, dynamic=False)

    def call() -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return attend(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1]).permute(2, 0, 1, 3)

    return call


FLEX = Contender("torch-flex", _flex, lambda *a: refuses_cpu(a[0]), backward_runs_once=True)


def _te_attention(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> Callable[[], Any]:
    H, K = query.shape[2:]
    kind = load("transformer_engine.pytorch").DotProductAttention
    attend = kind(H, K, num_gqa_groups=key.shape[2], attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal")
    return lambda: attend(query, key, value).unflatten(-1, (H, K))


_TE = needs("transformer_engine", "transformer_engine.pytorch")

ATTENTION = (
    *(_sdpa(name, causal=True) for name in ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")),
    Contender("transformer-engine", _te_attention, _TE, backward_runs_once=True),
)
ATTENTION_FULL = (
    *(_sdpa(name, causal=False) for name in ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient")),
    _flash_attn(causal=False),
)
ATTENTION_WINDOW = (_flash_attn(causal=True), FLEX)
ATTENTION_DOCUMENTS = (FLEX,)


def tutorial(path: Path) -> Contender:
    """The attention of Triton's tutorial 06-fused-attention.py, which is in no package. UserError if it is not that."""
    module = _load(path)
    if not callable(attend := getattr(module, "attention", None)):
        raise UserError(f"--tutorial {path}: has no function `attention`; name Triton's python/tutorials/06-fused-attention.py")

    def refuses(query: Tensor, key: Tensor, *others: Any) -> str | None:
        if query.shape[2] != key.shape[2]:
            return "grouped heads"
        return None if query.shape[0] % 128 == 0 else "lengths that are no multiple of 128"

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return attend(q, k, v, True, query.shape[-1] ** -0.5).permute(2, 0, 1, 3)

    def heads_first(x: Tensor) -> Tensor:
        return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)

    return Contender("triton-tutorial", calls(call), refuses, arrange=heads_first)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_tutorial", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--tutorial {path}: no Python file; name Triton's python/tutorials/06-fused-attention.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(f"--tutorial {path}: cannot be imported ({reason}); it wants a GPU, triton and pytest") from None
    return module


# Norms: x [T, 1, D], weight [D], (bias [D],) eps.


def _te_norm(kind: str) -> Bind:
    def bind(x: Tensor, *given: Any) -> Callable[[], Any]:
        *parameters, eps = given
        module = getattr(load("transformer_engine.pytorch"), kind)(x.shape[-1], eps=eps, device=x.device, dtype=x.dtype)
        named = dict(zip(("weight", "bias"), parameters, strict=False))
        return lambda: torch.func.functional_call(module, named, (x,))

    return bind


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight_D.shape, weight_D, eps)


def _layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)


RMS_NORM = (*eager_and_compiled(_rms_norm), Contender("transformer-engine", _te_norm("RMSNorm"), _TE, backward_runs_once=True))
LAYER_NORM = (
    *eager_and_compiled(_layer_norm),
    Contender("transformer-engine", _te_norm("LayerNorm"), _TE, backward_runs_once=True),
)

ADD_RMS_NORM = eager_and_compiled(lambda x, residual, *given: (_rms_norm(summed := x + residual, *given), summed))
ADD_LAYER_NORM = eager_and_compiled(lambda x, residual, *given: (_layer_norm(summed := x + residual, *given), summed))


# Activations and rotation.


def _liger_rope(qkv: Tensor, cos: Tensor, sin: Tensor) -> Callable[[], Any]:
    rope = load("liger_kernel.ops.rope").LigerRopeFunction.apply
    # It wants [1, S, K]: positions are those of every sample.
    tables = [torch.cat((t, t), -1)[:, 0, 0][None] for t in (cos, sin)]
    q = qkv.shape[3] - 2

    def call() -> tuple[Tensor, Tensor, Tensor]:
        query, key = qkv[..., :q, :].flatten(2, 3), qkv[..., q, :].contiguous()
        heads = rope(query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), *tables)
        query, key = (x.permute(2, 0, 1, 3) for x in heads)
        return query, key, qkv[..., q + 1, :].contiguous()

    return call


ROTARY = (Contender("liger", _liger_rope, needs("liger_kernel", "liger_kernel.ops.rope")),)
SWIGLU = (
    Contender(
        "liger",
        calls(lambda x: load("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction.apply(x)),
        needs("liger_kernel", "liger_kernel.ops.swiglu"),
    ),
)


# Cross entropy: (logits [T, V], labels [T]) -> (sum of the losses, gradient of the logits).


def _with_gradients(loss: Callable[..., Tensor], *, leaves: int) -> Callable[..., Any]:
    """Of its first arguments."""

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        given = [a.detach().requires_grad_() for a in arguments[:leaves]]
        with torch.enable_grad():
            total = loss(*given, *arguments[leaves:])
        return (total.detach(), *torch.autograd.grad(total, given))

    return call


def _loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return functional.cross_entropy(logits_TV.float(), labels_T, reduction="sum")


def _liger_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    apply = load("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction.apply
    return apply(logits_TV, labels_T, None, -100, 0.0, 0.0, "sum")[0]


def _te_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    return load("transformer_engine.pytorch.cross_entropy").parallel_cross_entropy(logits_TV[None], labels_T[None]).sum()


_MEGATRON = "megatron.core.fusions.fused_cross_entropy"


def _megatron_loss(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    fused = load(_MEGATRON).fused_vocab_parallel_cross_entropy
    return fused(logits_TV[:, None], labels_T[:, None], lone_communicator(logits_TV.device.type)).sum()


def _refuses_megatron(logits_TV: Tensor, *others: Any) -> str | None:
    if reason := refuses_cpu(logits_TV):
        return reason
    try:  # a namespace, which find_package does not know
        load(_MEGATRON)
    except Exception as error:
        return f"the package megatron-core cannot be imported ({type(error).__name__})"
    # Its gradient is bfloat16 whatever it was given.
    return None if logits_TV.dtype == torch.bfloat16 else f"dtype {logits_TV.dtype} (bfloat16 only)"


def _both(loss: Callable[..., Tensor], *, leaves: int) -> tuple[Contender, ...]:
    def bind(*arguments: Any) -> Callable[[], Any]:
        torch.compiler.reset()
        call = _with_gradients(torch.compile(loss, dynamic=False), leaves=leaves)
        return lambda: call(*arguments)

    return Contender("torch-eager", calls(_with_gradients(loss, leaves=leaves))), Contender("torch-compile", bind)


CROSS_ENTROPY = (
    *_both(_loss, leaves=1),
    Contender("liger", calls(_with_gradients(_liger_loss, leaves=1)), needs("liger_kernel", "liger_kernel.ops.cross_entropy")),
    Contender("transformer-engine", calls(_with_gradients(_te_loss, leaves=1)), _TE),
    Contender(
        "megatron-core",
        calls(_with_gradients(_megatron_loss, leaves=1)),
        _refuses_megatron,
    ),
)


# The projection and the loss: (x [T, D], weight [V, D], labels [T], chunks) -> (sum, gradients of x and of the weight).


def _projected_loss(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, num_chunks: int) -> Tensor:
    return _loss(functional.linear(x_TD, weight_VD), labels_T)


def _liger_projected_loss(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, num_chunks: int) -> Tensor:
    apply = load("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction.apply
    # With the weight's gradient summed in float32, as ours.
    return apply(x_TD, weight_VD, labels_T, None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)[0]


def _bare_products(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, num_chunks: int) -> Callable[[], Any]:
    """The three matrix products whole, into memory that is there."""
    logits_TV = x_TD @ weight_VD.t()
    dx_TD, dweight_VD = torch.empty_like(x_TD), torch.empty_like(weight_VD)

    def call() -> None:
        torch.mm(x_TD, weight_VD.t(), out=logits_TV)
        torch.mm(logits_TV, weight_VD, out=dx_TD)
        torch.mm(logits_TV.t(), x_TD, out=dweight_VD)

    return call


LINEAR_CROSS_ENTROPY = (
    Contender("three bare products", _bare_products, is_limit=True),
    *_both(_projected_loss, leaves=2),
    Contender(
        "liger",
        calls(_with_gradients(_liger_projected_loss, leaves=2)),
        needs("liger_kernel", "liger_kernel.ops.fused_linear_cross_entropy"),
    ),
)


PACKAGES = ("triton", "flash_attn", "liger_kernel", "apex", "transformer_engine", "megatron", "deepspeed")
ASKED_ON_CPU = ("torch-compile", "deepspeed")
"""Contenders that compile for minutes on CPU: only where --impl names them."""
ASKED_ON_GPU = ("reference", "deepspeed")
"""What all are compared with, since at the sizes of a GPU its scores fill the memory; and what compiles."""
