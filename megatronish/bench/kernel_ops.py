"""OPS: what `bench kernels` measures, one entry an op: inputs, reference, the work that nobody can leave out, contenders.

The work decides what a limit is. FLOPs are those of matrix products, two a multiplication and addition, and for the rest one an
arithmetic operation or function, roughly (they only place a point in the roofline). Bytes are each input and each output once.

    attention     forward 4 K a pair of a query and a key that it sees, in each head; backward 2.5 times that: five products.
                  Pairs: S^2 of full attention, half of them of causal, S W - W^2 / 2 of a window, S L / 2 of documents of length L
    linear loss   6 T D V: three products
    cross entropy logits read for the loss, read and overwritten by the gradient
    optimizer     bytes a parameter as counted in kernels/adamw.py, with a float32 gradient
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatronish.bench import adamw, kernel_peers, optimizer_peers
from megatronish.bench.kernel_op import BenchOp, Work, drawing
from megatronish.bench.kernel_peers import Contender, eager_and_compiled
from megatronish.bench.kernel_shapes import Dims
from megatronish.kernels import cross_entropy, linear, rotary
from megatronish.kernels.linear_cross_entropy import Gradients, linear_cross_entropy
from megatronish.kernels.registry import accumulate_dtype
from megatronish.kernels.rotary_tables import rotary_tables
from megatronish.kernels.table import KERNELS

# Attention


def _qkv(dims: Dims, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    draw = drawing(device, dtype)
    return tuple(draw(dims["S"], dims["B"], dims[heads], dims["K"]) for heads in ("H", "G", "G"))


_RATE = 0.1


def _masked(
    dims: Dims, dtype: torch.dtype, device: str, *, causal: bool = True, window: str = "", documents: str = "", drops: bool = False
) -> tuple[Any, ...]:
    S, B = dims["S"], dims["B"]
    numbers = (torch.arange(S, device=device) // dims[documents])[:, None].expand(S, B).contiguous() if documents else None
    samples = torch.arange(B, device=device) if drops else None
    mask = (numbers, None, samples, 0, 1, _RATE if drops else 0.0, dims["K"] ** -0.5, causal, dims[window] if window else 0)
    return (*_qkv(dims, dtype, device), *mask)


def _attention_work(dims: Dims, size: int, *, pairs: Callable[[Dims], float]) -> dict[str, Work]:
    S, B, H, G, K = (dims[name] for name in ("S", "B", "H", "G", "K"))
    flops, heads = 4.0 * B * H * K * pairs(dims), S * B * (H + G) * K * size
    statistics = 4 * B * H * S
    return {"forward": Work(flops, 2 * heads + statistics), "backward": Work(2.5 * flops, 4 * heads + statistics)}


def _scores(dims: Dims) -> int:
    return dims["B"] * dims["H"] * dims["S"] ** 2


_SAMPLES_AND_HEADS = (("B",), ("H", "G"), ("H",), ("S",))


def _attention(name: str, pairs: Callable[[Dims], float], peers: Iterable[Contender], **mask: Any) -> BenchOp:
    kernel = KERNELS["masked_attention" if mask else "attention"]
    return BenchOp(
        name,
        ("attention",),
        partial(_masked, **mask) if mask else _qkv,
        kernel.function,
        kernel.reference,
        partial(_attention_work, pairs=pairs),
        _scores,
        _SAMPLES_AND_HEADS,
        differentiable=(0, 1, 2),
        peers=tuple(peers),
    )


def _half(dims: Dims) -> float:
    return dims["S"] ** 2 / 2


def _in_window(dims: Dims) -> float:
    W = min(dims["W"], dims["S"])
    return dims["S"] * W - W**2 / 2


def _in_documents(dims: Dims) -> float:
    return dims["S"] * min(dims["L"], dims["S"]) / 2


# What is bound by memory


def _elementwise(
    name: str,
    make: Callable[[Dims, torch.dtype, str], tuple[Any, ...]],
    passes: dict[str, tuple[float, float]],
    *,
    elements: Callable[[Dims], int],
    peers: tuple[Contender, ...],
    differentiable: tuple[int, ...] = (0,),
    more_bytes: Callable[[Dims, int], int] = lambda dims, size: 0,
    cut: tuple[tuple[str, ...], ...] = (("T",),),
) -> BenchOp:
    """`passes`: of each, operations an element, and elements read and written an element. `more_bytes`: of each pass."""

    def work(dims: Dims, size: int) -> dict[str, Work]:
        n, more = elements(dims), more_bytes(dims, size)
        return {which: Work(flops * n, moved * n * size + more) for which, (flops, moved) in passes.items()}

    kernel = KERNELS[name]
    given: dict[str, Any] = {"differentiable": differentiable, "peers": peers}
    return BenchOp(name, (name,), make, kernel.function, kernel.reference, work, elements, cut, **given)


def _rows(dims: Dims) -> int:
    return dims["T"] * dims["D"]


def _wide_rows(dims: Dims) -> int:
    return dims["T"] * dims["F"]


def _norm(parameters: int, *, rows: int = 1) -> Callable[[Dims, torch.dtype, str], tuple[Any, ...]]:
    def make(dims: Dims, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        draw = drawing(device, dtype)
        return (*(draw(dims["T"], dims["D"]) for _ in range(rows)), *(draw(dims["D"]) for _ in range(parameters)), 1e-5)

    return make


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _packed(dims: Dims, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    S, B, H, G, K = (dims[name] for name in ("S", "B", "H", "G", "K"))
    positions = torch.arange(S, device=device)[:, None].expand(S, B)
    tables = rotary_tables(positions, size=K, theta=10000.0, dtype=dtype)
    return (drawing(device, dtype)(S, B, G, H // G + 2, K), *tables, False)


def _packed_elements(dims: Dims) -> int:
    return dims["S"] * dims["B"] * (dims["H"] + 2 * dims["G"]) * dims["K"]


def _dropout_inputs(dims: Dims, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    return drawing(device, dtype)(dims["T"], 1, dims["D"]), torch.arange(1, device=device), 1, 0, 1, _RATE


def _bias_gelu_dropout_inputs(dims: Dims, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    draw, T, D = drawing(device, dtype), dims["T"], dims["D"]
    return draw(T, 1, D), draw(D), draw(T, 1, D), torch.arange(1, device=device), True, 0, 1, _RATE


# Losses


def _logits(dims: Dims, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    labels_T = torch.randint(dims["V"], (dims["T"],), generator=generator, device=device)
    return drawing(device, dtype)(dims["T"], dims["V"]), labels_T


def _losses(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """(losses, log-sum-exp) of the whole vocabulary on one rank, as `parallel/loss.py` joins them."""
    max_T, sum_exp_T, target_T = cross_entropy.cross_entropy_parts(logits_TV, labels_T, 0, logits_TV.shape[1]).unbind()
    log_sum_exp_T = sum_exp_T.log() + max_T
    return log_sum_exp_T - target_T, log_sum_exp_T


def _cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    loss_T, log_sum_exp_T = _losses(logits_TV, labels_T)
    cross_entropy.cross_entropy_backward_(torch.ones_like(loss_T), logits_TV, labels_T, log_sum_exp_T, 0, logits_TV.shape[1])
    return loss_T.sum(), logits_TV


def _cross_entropy_reference(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    loss = functional.cross_entropy(logits_TV, labels_T, reduction="sum")
    onehot_TV = functional.one_hot(labels_T, logits_TV.shape[1])
    return loss, logits_TV.softmax(-1) - onehot_TV


def _projected(dims: Dims, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    draw, T, D, V = drawing(device, dtype), dims["T"], dims["D"], dims["V"]
    return draw(T, D), draw(V, D) * D**-0.5, _logits({"T": T, "V": V}, dtype, device)[1], dims["C"]


def _linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, num_chunks: int) -> tuple[Tensor, ...]:
    bucket_VD = torch.zeros_like(weight_VD, dtype=accumulate_dtype(weight_VD))
    V = weight_VD.shape[0]
    gradients = Gradients(
        of_loss=torch.ones((), dtype=bucket_VD.dtype, device=x_TD.device),
        of_logits=lambda dloss_T, logits_TV, labels, lse_T: cross_entropy.cross_entropy_backward_(
            dloss_T, logits_TV, labels, lse_T, 0, V
        ),
        of_weight=lambda dlogits_TV, x: linear.accumulate_weight_gradient(bucket_VD, dlogits_TV, x),
    )
    counted_T = torch.ones(len(labels_T), dtype=bucket_VD.dtype, device=x_TD.device)
    given: dict[str, Any] = {"num_chunks": num_chunks, "losses": _losses, "gradients": gradients}
    loss, dx_TD = linear_cross_entropy(x_TD, weight_VD, labels_T, counted_T, **given)
    assert dx_TD is not None
    return loss, dx_TD, bucket_VD


def _linear_cross_entropy_reference(x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, num_chunks: int) -> tuple[Tensor, ...]:
    loss, dlogits_TV = _cross_entropy_reference(x_TD @ weight_VD.t(), labels_T)
    return loss, dlogits_TV @ weight_VD, dlogits_TV.t() @ x_TD


def _linear_loss_work(dims: Dims, size: int) -> dict[str, Work]:
    T, D, V = dims["T"], dims["D"], dims["V"]
    return {"forward+backward": Work(6.0 * T * D * V, (2 * T * D + V * D) * size + 4 * V * D)}


# The optimizer


def _state(dims: Dims, dtype: torch.dtype, device: str, *, in_halves: bool = False) -> tuple[Tensor, ...]:
    """(weights, gradients), or (bfloat16 weights, remainders, gradients); float32 in any dtype of the bench."""
    draw = drawing(device, torch.float32)
    weights, gradients = draw(dims["N"]), draw(dims["N"]) * 0.01
    if in_halves:
        return weights.bfloat16(), torch.zeros(dims["N"], dtype=torch.int16, device=device), gradients
    return weights, gradients


def _refill(*state: Tensor) -> None:
    """A whole step leaves zeros, or what it has clipped."""
    state[-1].fill_(0.01)


def _optimizer_error(contender: Contender, arguments: tuple[Tensor, ...], *, group: str) -> dict[str, float]:
    """`adamw.error_of`, in units of what is allowed."""
    weights, *remainders, gradients = (a.clone() for a in arguments)
    more = remainders[0] if remainders else None
    step = contender.bind(*(a for a in (weights, more, gradients) if a is not None))
    row = adamw.Variant(group, contender.name, weights, gradients, step, 0, more)
    return {"step": adamw.error_of(row) / adamw.allowed_error("16-bit" if remainders else "")}


def _optimizer(
    name: str,
    bytes_each: int,
    bind: Callable[..., Callable[[], Any]],
    peers: tuple[Contender, ...] = (),
    *,
    group: str = "adamw",
    in_halves: bool = False,
) -> BenchOp:
    return BenchOp(
        name,
        ("adamw", "square_sum") if group == "whole step" else ("adamw",),
        partial(_state, in_halves=in_halves),
        bind,
        bind,
        lambda dims, size: {"step": Work(15.0 * dims["N"], float(bytes_each * dims["N"]))},
        lambda dims: 40 * dims["N"],  # a check is of three steps, of many operations each
        (("N",),),
        peers=peers,
        refresh=_refill,
        bind=bind,
        errors=partial(_optimizer_error, group=group),
    )


def _gradients(dims: Dims, dtype: torch.dtype, device: str) -> tuple[list[Tensor]]:
    N = dims["N"]
    return (list(drawing(device, torch.float32)(N).split(max(1, N // 8))),)


OPS: dict[str, BenchOp] = {
    op.name: op
    for op in (
        _attention("attention", _half, kernel_peers.ATTENTION),
        _attention("attention_full", lambda dims: float(dims["S"] ** 2), kernel_peers.ATTENTION_FULL, causal=False),
        _attention("attention_window", _in_window, kernel_peers.ATTENTION_WINDOW, window="W"),
        _attention("attention_documents", _in_documents, kernel_peers.ATTENTION_DOCUMENTS, documents="L"),
        _attention("attention_dropout", _half, (), drops=True),
        _elementwise(
            "rms_norm",
            _norm(1),
            {"forward": (5, 2), "backward": (10, 3)},
            elements=_rows,
            peers=kernel_peers.RMS_NORM,
            differentiable=(0, 1),
            more_bytes=lambda dims, size: 2 * dims["D"] * size + 4 * dims["T"],
        ),
        _elementwise(
            "layer_norm",
            _norm(2),
            {"forward": (7, 2), "backward": (12, 3)},
            elements=_rows,
            peers=kernel_peers.LAYER_NORM,
            differentiable=(0, 1, 2),
            more_bytes=lambda dims, size: 2 * dims["D"] * size + 8 * dims["T"],
        ),
        # The sum is read again, not its parts; both have the same gradient, which is written once.
        _elementwise(
            "add_rms_norm",
            _norm(1, rows=2),
            {"forward": (6, 4), "backward": (11, 4)},
            elements=_rows,
            peers=kernel_peers.ADD_RMS_NORM,
            differentiable=(0, 1, 2),
            more_bytes=lambda dims, size: 2 * dims["D"] * size + 4 * dims["T"],
        ),
        _elementwise(
            "add_layer_norm",
            _norm(2, rows=2),
            {"forward": (8, 4), "backward": (13, 4)},
            elements=_rows,
            peers=kernel_peers.ADD_LAYER_NORM,
            differentiable=(0, 1, 2, 3),
            more_bytes=lambda dims, size: 2 * dims["D"] * size + 8 * dims["T"],
        ),
        _elementwise(
            "split_rotary",
            _packed,
            {"forward": (3, 2), "backward": (3, 2)},
            elements=_packed_elements,
            peers=(*eager_and_compiled(rotary.reference), *kernel_peers.ROTARY),
            more_bytes=lambda dims, size: 4 * dims["S"] * dims["B"] * dims["K"],
            cut=(("B",), ("H", "G"), ("S",)),
        ),
        *(
            _elementwise(
                name,
                lambda dims, dtype, device: (drawing(device, dtype)(dims["T"], 2 * dims["F"]),),
                {"forward": (flops, 3), "backward": (2 * flops, 5)},
                elements=_wide_rows,
                peers=(*eager_and_compiled(KERNELS[name].reference), *peers),
            )
            for name, flops, peers in (("swiglu", 5, kernel_peers.SWIGLU), ("geglu", 9, ()))
        ),
        _elementwise(
            "gelu",
            lambda dims, dtype, device: (drawing(device, dtype)(dims["T"], dims["F"]),),
            {"forward": (8, 2), "backward": (15, 3)},
            elements=_wide_rows,
            peers=eager_and_compiled(_gelu),
        ),
        _elementwise("dropout", _dropout_inputs, {"forward": (12, 2), "backward": (12, 2)}, elements=_rows, peers=()),
        _elementwise(
            "bias_gelu_dropout_add",
            _bias_gelu_dropout_inputs,
            {"forward": (22, 3), "backward": (28, 3)},  # the residual's gradient is the upstream one
            elements=_rows,
            peers=eager_and_compiled(KERNELS["bias_gelu_dropout_add"].reference),
            differentiable=(0, 1, 2),
        ),
        BenchOp(
            "cross_entropy",
            ("cross_entropy",),
            _logits,
            _cross_entropy,
            _cross_entropy_reference,
            lambda dims, size: {"forward+backward": Work(8.0 * dims["T"] * dims["V"], 3.0 * dims["T"] * dims["V"] * size)},
            lambda dims: dims["T"] * dims["V"],
            (("T",),),
            peers=kernel_peers.CROSS_ENTROPY,
        ),
        BenchOp(
            "linear_cross_entropy",
            ("cross_entropy",),
            _projected,
            _linear_cross_entropy,
            _linear_cross_entropy_reference,
            _linear_loss_work,
            lambda dims: max(dims["T"], dims["D"]) * dims["V"],
            (("T",), ("D",), ("V",)),
            peers=kernel_peers.LINEAR_CROSS_ENTROPY,
            rounded_to=lambda dtype: dtype,  # the logits
        ),
        BenchOp(
            "square_sum",
            ("square_sum",),
            _gradients,
            KERNELS["square_sum"].function,
            KERNELS["square_sum"].reference,
            lambda dims, size: {"forward": Work(2.0 * dims["N"], 4.0 * dims["N"])},
            lambda dims: dims["N"],
            (("N",),),
            peers=optimizer_peers.SQUARE_SUM,
            rounded_to=lambda dtype: torch.float32,
        ),
        _optimizer("adamw", 28, partial(adamw.ours, kind="plain"), optimizer_peers.ADAMW),
        _optimizer("adamw_bf16", 30, partial(adamw.ours, kind="low")),
        _optimizer("adamw_16bit", 20, adamw.ours_in_halves, in_halves=True),
        _optimizer("optimizer_step", 38, partial(adamw.ours, kind="whole"), optimizer_peers.OPTIMIZER_STEP, group="whole step"),
    )
}
"""By name, in the order in which they are measured."""
