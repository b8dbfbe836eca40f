"""Decides which body of an op runs, where the config leaves it open: those that match the reference on this device are measured.

A body is admitted once its results and gradients on the op's sample inputs are those of the reference in float64, within
roundings; the fastest of the admitted, forward and backward together, is chosen for the shape bucket. On CPU nothing is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megatronish.comm import streams
from megatronish.kernels.compare import allowed_error, copied, error_of, ramp, results_and_gradients, widened
from megatronish.kernels.registry import Key, Refused, bodies_of, choosing, key_of
from megatronish.kernels.table import Kernel

ROUNDS = 7
UNMEASURED = "on CPU nothing is measured"


@dataclass(frozen=True)
class Case:
    """A call that a run makes."""

    kernel: Kernel
    dtype: torch.dtype
    """What the sample inputs are tried in."""
    make: Callable[[str], tuple[Any, ...]]
    """device -> arguments; `meta` for their shapes."""
    small: Callable[[str], tuple[Any, ...]]
    """The same call with a few tokens: enough to be refused, and quick in an interpreter."""


@dataclass(frozen=True)
class Decision:
    """What runs, and why."""

    choice: str
    bucket: str
    dtype: str
    device: str
    """The name of the GPU, or `cpu`."""
    implementation: str
    why: str

    def describe(self) -> str:
        """One line of a log."""
        return f"{self.choice} {self.bucket} {self.dtype}: {self.implementation} ({self.why})"

    def saved(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def read_decisions(values: object) -> list[Decision]:
    """What `saved` gave; what is malformed is left out, and so decided anew."""
    names = set(Decision.__dataclass_fields__)
    rows = values if isinstance(values, list) else []
    sound = (r for r in rows if isinstance(r, dict) and r.keys() == names and all(isinstance(v, str) for v in r.values()))
    return [Decision(**row) for row in sound]


def as_keys(decisions: Iterable[Decision], device_kind: str) -> dict[Key, str]:
    """For `registry.choose`."""
    return {(d.choice, d.bucket, d.dtype, device_kind): d.implementation for d in decisions}


def decide(
    cases: Sequence[Case],
    *,
    forced: Mapping[str, str],
    before: Sequence[Decision] = (),
    device: torch.device,
    deterministic: bool = False,
) -> list[Decision]:
    """One decision a case. Refused (a UserError) if a forced body cannot do its case. Waits for the device where it measures."""
    name = streams.device_name(device)
    known = {(d.choice, d.bucket, d.dtype, d.device): d for d in before}
    decisions = []
    for case in cases:
        choice, bucket, dtype, _ = key_of(case.kernel.name, case.make("meta"))
        bodies = bodies_of(choice)
        earlier = known.get((choice, bucket, dtype, name))
        if choice in forced:
            implementation, why = forced[choice], f"kernels.{choice} says so"
            _require(case, implementation, str(device), deterministic=deterministic)
        elif device.type == "cpu":
            implementation, why = next(iter(bodies)), UNMEASURED
        elif earlier is not None and earlier.implementation in bodies:
            implementation, why = earlier.implementation, earlier.why
        else:
            implementation, why = _fastest(case, device=device, deterministic=deterministic)
        decisions.append(Decision(choice, bucket, dtype, name, implementation, why))
    return decisions


def _require(case: Case, name: str, device: str, *, deterministic: bool) -> None:
    """Refused if a body that the config forces cannot do its case."""
    bodies = bodies_of(case.kernel.chosen_as).get(name, [])
    if deterministic and not all(body.is_deterministic for body in bodies):
        raise Refused(case.kernel.chosen_as, name, "it is not deterministic, and train.deterministic is true")
    with choosing({case.kernel.chosen_as: name}):
        case.kernel.function(*case.small(device))


def _fastest(case: Case, *, device: torch.device, deterministic: bool) -> tuple[str, str]:
    """(name, why) of the fastest admitted body; the first where none is."""
    found = bodies_of(case.kernel.chosen_as)
    try:
        arguments = case.make(str(device))
    except RuntimeError as error:
        return next(iter(found)), f"not measured: {first_line(error)}"
    candidates, refused = [], []
    for name, bodies in found.items():
        if name == "reference":
            continue
        if any(body.only_by_name for body in bodies):
            reason: str | None = "runs only where it is named"
        elif deterministic and not all(body.is_deterministic for body in bodies):
            reason = "not deterministic"
        else:
            reason = why_not(case.kernel, name, case.dtype, str(device)) or _attempt(case.kernel, name, arguments)
        if reason is None:
            candidates.append(name)
        else:
            refused.append(f"{name}: {reason}")
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS if len(candidates) > 1 else 0):
        for name in candidates:
            times[name].append(_seconds(case.kernel, name, arguments, device))
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    best = min(medians, key=lambda name: medians[name]) if medians else (candidates or list(found))[0]
    measured = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in sorted(medians.items(), key=lambda item: item[1]))
    return best, "; ".join(filter(None, [measured or "the only one", *refused]))


def why_not(kernel: Kernel, name: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a body is not admitted on this device; None if results and gradients are the reference's on the sample inputs that it
    does not refuse, at least one."""
    reason, matched = "it does none of the sample inputs", 0
    for arguments in kernel.sample_inputs(dtype, device):
        try:
            got = _run(kernel, kernel.function, arguments, name)
        except Refused as error:
            reason = error.reason
            continue
        except Exception as error:
            return first_line(error)
        wide = tuple(map(widened, arguments))
        for a, b in zip(got, _run(kernel, kernel.reference, wide, None), strict=True):
            error_here, limit = error_of(a, b), allowed_error(a)
            if not error_here <= limit:
                return f"off by {error_here:.1e} on a small case, allowed {limit:.1e}"
        matched += 1
    return None if matched else reason


def _run(kernel: Kernel, function: Callable[..., Any], arguments: tuple[Any, ...], name: str | None) -> list[Tensor]:
    with choosing({} if name is None else {kernel.chosen_as: name}):
        results, gradients = results_and_gradients(
            function, arguments, differentiable=kernel.differentiable, mutated=kernel.mutated
        )
    return results + gradients


def _attempt(kernel: Kernel, name: str, arguments: tuple[Any, ...]) -> str | None:
    """Why a body cannot do the run's own call."""
    try:
        _run(kernel, kernel.function, arguments, name)
    except Refused as error:
        return error.reason
    except Exception as error:
        return first_line(error)
    return None


def _seconds(kernel: Kernel, name: str, arguments: tuple[Any, ...], device: torch.device) -> float:
    """Of forward and backward; copies and upstream gradients are made outside of the clock."""
    given = copied(arguments)
    leaves = [given[i].requires_grad_() for i in kernel.differentiable if given[i] is not None]
    with choosing({kernel.chosen_as: name}):
        started = streams.wall_time(device)
        returned = kernel.function(*given)
        seconds = streams.wall_time(device) - started
        if leaves:
            results = [returned] if isinstance(returned, Tensor) else list(returned)
            upstream = [ramp(result) for result in results]
            started = streams.wall_time(device)
            torch.autograd.grad(results, leaves, upstream)
            seconds += streams.wall_time(device) - started
    return seconds


def first_line(error: Exception) -> str:
    """What it is, for one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
