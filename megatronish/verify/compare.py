"""Joins what ranks saw into global tensors and measures how far they are from the truth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatronish.comm.host import read_scalar, read_values
from megatronish.layout import Rectangle
from megatronish.verify.layout_run import Pieces, RankResult
from megatronish.verify.reference import Reference

SMALL = 1e-3
"""A gradient that is zero but for rounding, as that of a key's bias is (softmax does not see it), has no relative error: nothing is
compared with less than this share of the largest gradient. A real fault in one that small still shows seven orders above 1e-10."""


def relative_error(got: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """max |a - b| / max(max |b|, floor); NaN and missing elements count as infinite."""
    difference, size = read_values(torch.stack(((got - expected).abs().max(), expected.abs().max())).double(), [0.0, 1.0])
    if difference == 0.0:
        return 0.0
    error = difference / max(size, floor) if max(size, floor) > 0 else math.inf
    return error if error == error else math.inf


def join(pieces: list[Pieces], kind: str, shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Global tensors from the boxes of all ranks; every element must be given exactly once."""
    joined = {name: torch.full_like(like, float("nan")) for name, like in shapes.items()}
    for rank_pieces in pieces:
        for piece_kind, name, box, values in rank_pieces:
            if piece_kind == kind:
                whole = Rectangle((0,) * len(box.sizes), tuple(shapes[name].shape))
                target = joined[name][box.within(whole)]
                assert target.isnan().all(), f"{name} {box} is given twice"
                target.copy_(values.view(box.sizes))
    return joined


Kind = Literal["gradient", "norm", "loss", "weight"]


@dataclass(frozen=True)
class Difference:
    """One thing that was compared."""

    kind: Kind
    what: str
    """In words, with the step."""
    error: float
    """Relative."""
    parameter: str | None = None


def differences(results: list[RankResult], expected: Reference) -> Iterator[Difference]:
    """How far all that the ranks saw is from the truth, in the order in which a fault would spread."""
    num_steps = len(expected.losses)
    for step in range(num_steps):
        yield from gradient_differences([r.gradients[step] for r in results], expected.gradients[step], step=step + 1)
        for rank, result in enumerate(results):
            where = f"of step {step + 1} on rank {rank}"
            yield Difference("norm", f"norm {where}", abs(result.norms[step] / expected.norms[step] - 1))
            yield Difference("loss", f"loss {where}", abs(result.losses[step] / expected.losses[step] - 1))
        yield from weight_differences([r.weights[step] for r in results], expected.weights[step], after=f"step {step + 1}")
    for result in results:  # what each rank computes with, gathered after the last step
        for rank_name, name, box, values in result.held:
            whole = Rectangle((0,) * len(box.sizes), tuple(expected.weights[-1][name].shape))
            error = relative_error(values, expected.weights[-1][name][box.within(whole)])
            yield Difference("weight", f"{name} held by {rank_name}", error, name)


def gradient_differences(pieces: list[Pieces], expected: Mapping[str, Tensor], *, step: int) -> Iterator[Difference]:
    """Every gradient of a step, in the order of the model."""
    gradients = join(pieces, "gradient", expected)
    floor = SMALL * max(read_scalar(gradient.abs().max(), 0.0) for gradient in expected.values())
    for name, gradient in gradients.items():
        error = relative_error(gradient, expected[name], floor=floor)
        yield Difference("gradient", f"gradient of {name} in step {step}", error, name)


def weight_differences(pieces: list[Pieces], expected: Mapping[str, Tensor], *, after: str) -> Iterator[Difference]:
    """Every master weight."""
    for name, master in join(pieces, "master", expected).items():
        yield Difference("weight", f"{name} after {after}", relative_error(master, expected[name]), name)
