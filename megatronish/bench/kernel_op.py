"""One op of `bench kernels`: its inputs, the work that nobody can leave out, its contenders. kernel_ops.py has all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatronish.bench.kernel_peers import Contender, calls
from megatronish.bench.kernel_shapes import Dims
from megatronish.kernels.registry import bodies_of


class Work(NamedTuple):
    """Of one call."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class BenchOp:
    """One op. Its contenders are all bodies of `choices`, each forced, and `peers`."""

    name: str
    choices: tuple[str, ...]
    """Keys of a config's `kernels`."""
    make: Callable[[Dims, torch.dtype, str], tuple[Any, ...]]
    """(dims, dtype, device) -> arguments."""
    function: Callable[..., Any]
    reference: Callable[..., Any]
    work: Callable[[Dims, int], dict[str, Work]]
    """(dims, bytes of an element) -> by pass."""
    widest: Callable[[Dims], int]
    """Elements of the largest tensor that the reference makes in float64."""
    cut: tuple[tuple[str, ...], ...]
    """Dimensions that a smaller case of the same kind has less of, together, in this order."""
    differentiable: tuple[int, ...] = ()
    peers: tuple[Contender, ...] = ()
    rounded_to: Callable[[torch.dtype], torch.dtype | None] = lambda dtype: None
    """(dtype of the bench) -> what values inside are rounded to, where that is narrower than the results."""
    refresh: Callable[..., Any] = lambda *arguments: None
    """Before each call, which is not timed."""
    bind: Callable[..., Callable[[], Any]] | None = None
    """Of a body, where it is not a call of `function`."""
    errors: Callable[[Contender, tuple[Any, ...]], dict[str, float]] | None = None
    """(contender, arguments) -> by pass, its error in units of what is allowed; where comparing with `reference` is not enough."""

    def contenders(self) -> list[Contender]:
        """Bodies first."""
        # A package may be the body of one kind of attention and a peer of another.
        peers = {peer.name for peer in self.peers}
        names = [name for name in dict.fromkeys(n for choice in self.choices for n in bodies_of(choice)) if name not in peers]
        bind = self.bind or calls(self.function)
        bodies = [Contender(name, bind, forced=dict.fromkeys(self.choices, name)) for name in names]
        return bodies + list(self.peers)

    def small(self, dims: Dims, most: int) -> Dims:
        """The case, or one with fewer samples, heads, tokens, such that the reference's widest tensor has at most `most`
        elements."""
        now = dict(dims)
        for group in self.cut:
            while self.widest(now) > most and all(now[name] > 1 and now[name] % 2 == 0 for name in group):
                less = {**now, **{name: now[name] // 2 for name in group}}
                if self.widest(less) == self.widest(now):
                    break
                now = less
        if self.widest(now) > most:  # an odd size
            name = self.cut[-1][0]
            now[name] = max(1, now[name] * most // self.widest(now))
        return now


def drawing(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """(sizes) -> standard normal numbers, the same every time."""
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(0), dtype=dtype, device=device)
