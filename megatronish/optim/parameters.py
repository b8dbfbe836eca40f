"""The parameters of this rank in flat memory, bucket by bucket; modules hold views of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from megatronish.comm.host import read_scalar
from megatronish.comm.random import normal_fill_, stream_key
from megatronish.layout import ParamPlacement
from megatronish.optim.buckets import Bucket


class FlatParameters:
    """Flat parameter memory for `buckets`, and a view of it in place of each meta parameter of `model`.

    All memory starts as NaN, so that a weight which nothing has drawn or loaded shows (see `all_finite`).
    """

    def __init__(self, model: nn.Module, buckets: list[Bucket], *, dtype: torch.dtype, device: torch.device) -> None:
        self.buckets = buckets
        self.flat = [torch.full((b.num_elements,), math.nan, dtype=dtype, device=device) for b in buckets]
        self.by_name: dict[str, nn.Parameter] = {}
        for bucket, flat in zip(buckets, self.flat, strict=True):
            covered = 0
            for slot in bucket.slots:
                flat[covered : slot.start].zero_()  # alignment gaps
                covered = slot.stop
                parameter = nn.Parameter(flat[slot.start : slot.stop].view(slot.local_box.sizes))
                owner, _, leaf = slot.name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, parameter)
                self.by_name[slot.name] = parameter
            flat[covered:].zero_()
        left = [name for name, _ in model.named_parameters() if name not in self.by_name]
        assert not left, f"no bucket holds {left[:3]}"

    def draw(self, placements: Mapping[str, ParamPlacement], *, seed: int, std_of: Callable[[str], float | None]) -> None:
        """Give every parameter its first values: a function of (seed, name, global coordinates) alone; a std of None means ones, 0
        zeros."""
        with torch.no_grad():
            for bucket in self.buckets:
                for slot in bucket.slots:
                    parameter, std = self.by_name[slot.name], std_of(slot.name)
                    if not std:
                        parameter.fill_(1.0 if std is None else 0.0)
                        continue
                    shape, key = placements[slot.name].global_shape, stream_key(seed, "init", slot.name)
                    normal_fill_(parameter, offsets=slot.local_box.offsets, global_shape=shape, key=key, std=std)

    def all_finite(self) -> Tensor:
        """A bool scalar on the device: no parameter is NaN or infinite, so none was left uninitialised."""
        return torch.stack([torch.isfinite(flat).all() for flat in self.flat]).all()

    def first_not_finite(self) -> str | None:
        """The name of a parameter that is not finite, for an error message. Waits for the device."""
        for name, parameter in self.by_name.items():
            if not read_scalar(torch.isfinite(parameter).all(), 1.0):
                return name
        return None
