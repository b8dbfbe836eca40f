"""Registers an op with torch.library: a schema, the bodies for real tensors, and the shapes for fake ones.

A body is opaque to fake tensors and torch.compile, so what an op returns is all they ever see: a rehearsal counts the same bytes
whichever body runs. autograd.Functions stand outside, in each op's file.

An op may have several bodies; `choose` says which runs (dispatch.py decides). An op of torch.library is a name of the process, and
so is the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatronish.errors import UserError

_library = torch.library.Library("megatronish", "FRAGMENT")

Key = tuple[str, str, str, str]
"""(choice's name, shape bucket, dtype, kind of device)."""


KeyedBy = Callable[..., tuple[Sequence[int], torch.dtype, str]]
"""(an op's arguments) -> (sizes, dtype, kind) of the call, which are those of the forward call where the op is a backward."""


def by_first_tensor(*arguments: Any) -> tuple[Sequence[int], torch.dtype, str]:
    """Those of the first floating tensor."""
    flat = (b for a in arguments for b in (a if isinstance(a, list) else [a]))
    x = next(a for a in flat if isinstance(a, Tensor) and a.is_floating_point())
    return x.shape, x.dtype, ""


def _refuses_nothing(*arguments: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Implementation:
    """A body of an op: its arguments and results are the op's."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None] = _refuses_nothing
    """(the op's arguments) -> why it cannot do this call, in a few words; None if it can. It must not import what is not installed,
    and must not look into tensors."""
    is_deterministic: bool = True
    """The same bits every time, on every device."""
    only_by_name: bool = False
    """`auto` leaves it alone: it has not yet run on a device, and what waits for ever there would hold up every run."""


class Refused(UserError):
    """A body that the config names cannot do a call."""

    def __init__(self, choice: str, name: str, reason: str) -> None:
        super().__init__(f"kernels.{choice}={name}: not possible here: {reason}; set it to auto")
        self.reason = reason


@dataclass
class _Op:
    bodies: dict[str, Implementation]
    """The first is what runs where nothing else is chosen."""
    choice: str
    """Under what name the choice is made: an op and its backward share one."""
    keyed_by: KeyedBy


@dataclass
class _Chosen:
    forced: dict[str, str] = field(default_factory=dict)
    measured: dict[Key, str] = field(default_factory=dict)


_ops: dict[str, _Op] = {}
_chosen = _Chosen()


def register(
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    also: Mapping[str, Implementation] | None = None,
    choice: str | None = None,
    named: str = "torch",
    keyed_by: KeyedBy = by_first_tensor,
) -> Callable[..., Any]:
    """Define `megatronish::<schema>` and return the callable. `fake` gives outputs of the right shape, dtype and strides.

    `body`, which runs where nothing else is chosen, is the one `named`; `also` has others, by the names of `kernels:` in a config.
    `choice`: the name in `kernels:`, by default that of the op; an op and its backward share one. `keyed_by`: what a choice was
    measured under, so that a backward finds that of its forward."""
    name = schema[: schema.index("(")]
    op = _ops[name] = _Op({named: Implementation(body), **(also or {})}, choice or name, keyed_by)
    _library.define(schema)
    # With one body there is nothing to choose.
    run = body if len(op.bodies) == 1 else lambda *arguments: _run(op, arguments)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megatronish::{name}", fake, lib=_library)
    overload: Callable[..., Any] = getattr(torch.ops.megatronish, name).default
    return overload


def _run(op: _Op, arguments: tuple[Any, ...]) -> Any:
    if (name := _chosen.forced.get(op.choice)) is not None:
        body = op.bodies.get(name)
        if reason := "it does not do this kind" if body is None else body.refuses(*arguments):
            raise Refused(op.choice, name, reason)
        assert body is not None
        return body.run(*arguments)
    if _chosen.measured and (name := _chosen.measured.get(_key(op, arguments))) in op.bodies:
        body = op.bodies[name]
        if body.refuses(*arguments) is None:
            return body.run(*arguments)
    return next(iter(op.bodies.values())).run(*arguments)


def key_of(name: str, arguments: Iterable[Any]) -> Key:
    """What a call of an op is measured under: all dimensions but the last rounded up to powers of two. Flat tensors, as the
    optimizer's, are of one bucket. `name`: of the op, or of a choice for the first of its ops."""
    op = _ops.get(name) or next(op for op in _ops.values() if op.choice == name)
    return _key(op, tuple(arguments))


def _key(op: _Op, arguments: tuple[Any, ...]) -> Key:
    flat = (b for a in arguments for b in (a if isinstance(a, list) else [a]))
    device = next(a for a in flat if isinstance(a, Tensor)).device
    sizes, dtype, kind = op.keyed_by(*arguments)
    rounded = [1 << (size - 1).bit_length() if size else 0 for size in sizes[:-1]]
    bucket = "x".join(map(str, [*rounded, sizes[-1]])) if rounded else "flat"
    return op.choice, f"{kind} {bucket}".lstrip(), str(dtype).removeprefix("torch."), device.type


def bodies_of(choice: str) -> dict[str, list[Implementation]]:
    """Every body that the ops of a choice have, by name, in the order in which they were registered."""
    found: dict[str, list[Implementation]] = {}
    for op in _ops.values():
        if op.choice == choice:
            for name, body in op.bodies.items():
                found.setdefault(name, []).append(body)
    return found


def only_by_name(choices: Iterable[str]) -> list[str]:
    """Bodies of these choices that run only where they are named."""
    found = (item for choice in choices for item in bodies_of(choice).items())
    return list(dict.fromkeys(name for name, bodies in found if any(body.only_by_name for body in bodies)))


def choices() -> list[str]:
    """Names of all choices: those of ops that have more than one body."""
    return list(dict.fromkeys(op.choice for op in _ops.values() if len(op.bodies) > 1))


def choose(*, forced: Mapping[str, str], measured: Mapping[Key, str]) -> None:
    """What runs from now on in this process: `forced` by name of the choice, else `measured`, else each op's first body. A body
    that was measured and refuses a call leaves it to that one; one that is forced raises Refused."""
    _chosen.forced, _chosen.measured = dict(forced), dict(measured)


@contextmanager
def choosing(forced: Mapping[str, str]) -> Iterator[None]:
    """`choose` for the time of a block."""
    before = (_chosen.forced, _chosen.measured)
    choose(forced=forced, measured={})
    try:
        yield
    finally:
        _chosen.forced, _chosen.measured = before


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that sums over `x` are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
