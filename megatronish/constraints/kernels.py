"""What the bodies of ops that `kernels` can name do not do, as far as the config alone tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatronish.constraints.row import Constraint, Layout

_16_BITS = ("bfloat16", "float16")


@dataclass(frozen=True)
class _Attention:
    """What a body of attention takes."""

    dtypes: tuple[str, ...]
    heads: str
    """In words."""
    takes_head: Callable[[int], bool]
    is_masked: bool = False
    """It takes documents and dropout of the weights."""


def _by_8(most: int) -> Callable[[int], bool]:
    return lambda size: size % 8 == 0 and size <= most


_BODIES: dict[str, _Attention] = {
    "triton": _Attention((*_16_BITS, "float32"), "multiples of 8 up to 256", _by_8(256), is_masked=True),
    "triton-tma": _Attention(_16_BITS, "multiples of 8 up to 256", _by_8(256)),
    "flash-attn": _Attention(_16_BITS, "multiples of 8 up to 256", _by_8(256)),
    "cudnn": _Attention(_16_BITS, "multiples of 8 up to 128", _by_8(128)),
    "cuda": _Attention(_16_BITS, "64 or 128", lambda size: size in (64, 128)),
}


def _is_limited(c: Layout) -> bool:
    return c.config.kernels.attention in _BODIES


def _body(c: Layout) -> _Attention:
    return _BODIES[c.config.kernels.attention]


def _unused(c: Layout) -> list[str]:
    """What is named of ops that such a run does not have."""
    if c.model.architecture == "llama":
        absent = {"layer_norm", "add_layer_norm", "gelu", "geglu" if c.model.activation == "swiglu" else "swiglu"}
    else:
        absent = {"rms_norm", "add_rms_norm", "split_rotary", "swiglu", "geglu"}
    absent |= set() if c.model.dropout else {"bias_gelu_dropout_add"}
    absent |= set() if c.parallel.zero_engine == "native" else {"adamw"}
    return [f"kernels.{op}={name}" for op, name in c.config.kernels.forced.items() if op in absent]


KERNELS = (
    Constraint(
        name="kernels names what the run has",
        keys=("model.architecture", "model.activation", "model.dropout", "parallel.zero_engine"),
        applies=lambda c: bool(c.config.kernels.forced),
        holds=lambda c: not _unused(c),
        message=lambda c: (
            f"{', '.join(_unused(c))}: not run with model.architecture={c.model.architecture}, "
            f"model.activation={c.model.activation}, model.dropout={c.model.dropout:g} and "
            f"parallel.zero_engine={c.parallel.zero_engine}; remove {'it' if len(_unused(c)) == 1 else 'them'}"
        ),
    ),
    Constraint(
        name="kernels.attention computes in train.dtype",
        keys=("kernels.attention", "train.dtype"),
        applies=_is_limited,
        holds=lambda c: c.train.dtype in _body(c).dtypes,
        message=lambda c: (
            f"kernels.attention={c.config.kernels.attention} does not take train.dtype={c.train.dtype}; set kernels.attention to "
            f"auto, or train.dtype to {' or '.join(_body(c).dtypes)}"
        ),
    ),
    Constraint(
        name="kernels.attention takes heads of this size",
        keys=("kernels.attention", "model.num_heads", "model.hidden_size"),
        applies=lambda c: _is_limited(c) and c.model.hidden_size % c.model.num_heads == 0,
        holds=lambda c: _body(c).takes_head(c.model.head_size),
        message=lambda c: (
            f"kernels.attention={c.config.kernels.attention} takes head sizes of {_body(c).heads}, but "
            f"model.hidden_size={c.model.hidden_size} / model.num_heads={c.model.num_heads} is {c.model.head_size}; "
            "set kernels.attention to auto, or change model.num_heads"
        ),
    ),
    Constraint(
        name="kernels.attention takes documents and dropout",
        keys=("kernels.attention", "data.separate_documents", "model.dropout"),
        applies=_is_limited,
        holds=lambda c: _body(c).is_masked or not (c.config.data.separate_documents or c.model.dropout),
        message=lambda c: (
            f"kernels.attention={c.config.kernels.attention} does neither data.separate_documents nor model.dropout; set "
            "kernels.attention to auto or triton"
        ),
    ),
)
