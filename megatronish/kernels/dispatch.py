"""Decides which body of an op runs, where the config leaves it open: those that match the reference on this device are measured.

A body is admitted once its results and gradients on the op's sample inputs are those of the reference in float64, within
roundings; the fastest of the admitted, forward and backward together, is chosen for the shape bucket. On CPU nothing is measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from megatronish.comm import streams
from megatronish.kernels.registry import Key, Refused, accumulate_dtype, bodies_of, choosing, key_of
from megatronish.kernels.table import Kernel

ROUNDINGS, LENGTH = 8, 4096
"""Of any op's results: roundings to the inputs' dtype (six are the most that tests/kernels counts) and the longest sum in the
accumulation dtype, whose error grows as its root. A wrong formula is off by far more."""
ROUNDS = 7


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
        choice, bucket, dtype, _ = key_of(case.kernel.chosen_as, case.make("meta"))
        bodies = bodies_of(choice)
        earlier = known.get((choice, bucket, dtype, name))
        if choice in forced:
            implementation, why = forced[choice], f"kernels.{choice} says so"
            _require(case, implementation, str(device), deterministic=deterministic)
        elif device.type == "cpu":
            implementation, why = next(iter(bodies)), "on CPU nothing is measured"
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
    arguments, candidates, refused = case.make(str(device)), [], []
    found = bodies_of(case.kernel.chosen_as)
    for name, bodies in found.items():
        if name == "reference":
            continue
        if deterministic and not all(body.is_deterministic for body in bodies):
            reason: str | None = "not deterministic"
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
            return _first_line(error)
        wide = tuple(map(_widened, arguments))
        for a, b in zip(got, _run(kernel, kernel.reference, wide, None), strict=True):
            eps, wide_eps = torch.finfo(a.dtype).eps, torch.finfo(accumulate_dtype(a)).eps
            limit = ROUNDINGS * eps / 2 + math.sqrt(LENGTH) * wide_eps
            error_of = error_against(a, b)
            if not error_of <= limit:
                return f"off by {error_of:.1e} on a small case, allowed {limit:.1e}"
        matched += 1
    return None if matched else reason


def _widened(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_widened(a) for a in argument]
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def error_against(a: Tensor, reference: Tensor) -> float:
    """The largest error of `a`, relative to the largest finite value of the reference or 1; equal infinities are no error."""
    if not a.numel():
        return 0.0
    wide, b = a.double(), reference.double()
    size = b.where(b.isfinite(), 0.0).abs().max().clamp_min(1.0)
    return float((wide - b).where(wide != b, 0.0).abs().max() / size)


def _run(kernel: Kernel, function: Callable[..., Any], arguments: tuple[Any, ...], name: str | None) -> list[Tensor]:
    """Results and gradients, for upstream gradients of fixed values."""
    given = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]  # tensors of a list are only read
    leaves = [given[i].requires_grad_() for i in kernel.differentiable if given[i] is not None]
    with choosing({} if name is None else {kernel.chosen_as: name}):
        returned = function(*given)
        results = [returned] if isinstance(returned, Tensor) else list(returned or ())
        results += [given[i] for i in kernel.mutated if given[i] is not None]
        if not leaves:
            return results
        upstream = [_ramp(r) for r in results]
        gradients = torch.autograd.grad(results, leaves, upstream)
    return [r.detach() for r in (*results, *gradients)]


def _ramp(like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, like.numel(), dtype=torch.float64, device=like.device).view(like.shape).to(like.dtype)


def _attempt(kernel: Kernel, name: str, arguments: tuple[Any, ...]) -> str | None:
    """Why a body cannot do the run's own call."""
    try:
        _run(kernel, kernel.function, arguments, name)
    except Refused as error:
        return error.reason
    except Exception as error:
        return _first_line(error)
    return None


def _seconds(kernel: Kernel, name: str, arguments: tuple[Any, ...], device: torch.device) -> float:
    started = streams.wall_time(device)
    _run(kernel, kernel.function, arguments, name)
    return streams.wall_time(device) - started


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
