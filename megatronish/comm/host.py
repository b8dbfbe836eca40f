"""The only way from a tensor to a Python number: so that every host wait can be found, counted and rehearsed."""

from __future__ import annotations

from torch import Tensor

from megatronish.comm import history


def read_values(x: Tensor, assumed: list[float] | list[int]) -> list[float]:
    """The elements of a flat tensor on the host. Waits for the device. A rehearsal, which has no values, goes on with `assumed`."""
    record = history.current()
    record.begin_read("values")
    values: list[float] = list(assumed) if x.is_meta else x.tolist()
    record.end_wait()
    return values


def read_scalar(x: Tensor, assumed: float) -> float:
    """The only element of `x` on the host. Waits for the device. A rehearsal goes on with `assumed`."""
    return read_values(x.reshape(1), [assumed])[0]
