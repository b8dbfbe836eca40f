"""Joins what ranks saw into global tensors and measures how far they are from the truth."""

from __future__ import annotations

import math
from collections.abc import Iterator

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


def join(pieces: list[Pieces], kind: str, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
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


def errors(results: list[RankResult], expected: Reference) -> Iterator[tuple[str, float]]:
    """(what, relative error) of all that the ranks saw, in the order in which a fault would spread."""
    num_steps = len(expected.losses)
    for step in range(num_steps):
        gradients = join([r.gradients[step] for r in results], "gradient", expected.gradients[step])
        floor = SMALL * max(read_scalar(gradient.abs().max(), 0.0) for gradient in expected.gradients[step].values())
        for name, gradient in gradients.items():
            yield f"gradient of {name} in step {step + 1}", relative_error(gradient, expected.gradients[step][name], floor=floor)
        for rank, result in enumerate(results):
            for what, got, truth in (("norm", result.norms, expected.norms), ("loss", result.losses, expected.losses)):
                yield f"{what} of step {step + 1} on rank {rank}", abs(got[step] / truth[step] - 1)
    masters = join([r.states for r in results], "master", expected.parameters)
    for name, master in masters.items():
        yield f"{name} after {num_steps} steps", relative_error(master, expected.parameters[name])
    for result in results:  # what each rank computes with, gathered after the last step
        for kind, name, box, values in result.states:
            if kind.startswith("parameter"):
                whole = Rectangle((0,) * len(box.sizes), tuple(expected.parameters[name].shape))
                yield f"{name} held by {kind}", relative_error(values, expected.parameters[name][box.within(whole)])
