"""One case of `bench kernels`: an op at one size, all of its contenders checked, then timed in turns."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatronish.bench.kernel_op import BenchOp, Work
from megatronish.bench.kernel_peers import Contender
from megatronish.bench.kernel_shapes import Dims
from megatronish.bench.limits import Limits
from megatronish.comm.stopwatch import Stopwatch, free_cached_memory
from megatronish.kernels.compare import allowed_error, error_of, noise, results_and_gradients, widened
from megatronish.kernels.dispatch import first_line
from megatronish.kernels.registry import Refused, choosing

_CHECKED = {"cuda": 1 << 27, "cpu": 1 << 22}
"""Elements of the widest float64 tensor of a check."""
_TURN = {"cuda": 0.02, "cpu": 0.01}
"""Seconds of a contender in a round: as many calls as fit, one at least, _MOST_CALLS at most."""
_LIMIT_CALLS = {"cuda": 3, "cpu": 1}
_MOST_CALLS = 50
_PATIENCE = 3.0
"""Seconds of all rounds of one contender: a slow one has fewer rounds, one at least."""


@dataclass(frozen=True)
class Case:
    """What is compared."""

    op: BenchOp
    dims: Dims
    dtype: torch.dtype
    device: torch.device
    contenders: tuple[Contender, ...]

    @property
    def passes(self) -> dict[str, Work]:
        return self.op.work(self.dims, self.dtype.itemsize)


@dataclass(frozen=True)
class Verdict:
    """Of a contender and a pass."""

    status: str
    """ok, WRONG, refused, failed."""
    reason: str = ""
    error: float | None = None
    """In units of what is allowed."""


def run_case(case: Case, *, rounds: int, limits: Limits, watch: Stopwatch) -> list[dict[str, Any]]:
    """A row for each contender and pass."""
    verdicts = check(case)
    rows: list[dict[str, Any]] = []
    for which, work in case.passes.items():
        turns, now, matrix, copy = _timed(case, which, verdicts, rounds=rounds, limits=limits, watch=watch)
        of_pass = []
        for contender in case.contenders:
            turn, verdict = turns.get(contender.name), now[contender.name]
            of_pass.append(
                {
                    "op": case.op.name,
                    "dims": dict(case.dims),
                    "pass": which,
                    "implementation": contender.name,
                    "kind": "body" if contender.is_body else "limit" if contender.is_limit else "peer",
                    "status": verdict.status,
                    "reason": verdict.reason,
                    "error": verdict.error,
                    "flops": work.flops,
                    "bytes": work.bytes,
                    "extra_bytes": None if turn is None else turn.extra_bytes,
                    "all_milliseconds": [] if turn is None else [s * 1e3 for s in turn.seconds],
                }
            )
        _add_rates(of_pass, work, limits, matrix, copy)
        rows += of_pass
    return rows


def _add_rates(rows: Sequence[dict[str, Any]], work: Work, limits: Limits, matrix: list[float], copy: list[float]) -> None:
    """What the times say, where there are any. A row that is a limit bounds the others."""
    # Of optimizers, which have no body of torch: its fused one.
    plain = ("torch", "torch-fused")
    torch_ms: list[float] = next((r["all_milliseconds"] for r in rows if r["implementation"] in plain), [])
    least, bound = limits.seconds_of(work, matrix, copy) if matrix else (0.0, "")
    for row in rows:
        if row["kind"] == "limit" and row["all_milliseconds"]:
            least, bound = statistics.median(row["all_milliseconds"]) / 1e3, row["implementation"]
    for row in rows:
        times = row["all_milliseconds"]
        if not times:
            row |= dict.fromkeys(("milliseconds", "tflops", "gigabytes_per_second", "fraction_of_limit", "times_torch"))
            row["bound"] = bound
            continue
        seconds = statistics.median(times) / 1e3
        row["milliseconds"] = seconds * 1e3
        row["tflops"] = work.flops / seconds / 1e12
        row["gigabytes_per_second"] = work.bytes / seconds / 1e9
        row["fraction_of_limit"] = least / seconds
        row["bound"] = bound
        pairs = list(zip(torch_ms, times, strict=False))
        row["times_torch"] = statistics.median(a / b for a, b in pairs) if pairs else None


# Correctness


def check(case: Case) -> dict[tuple[str, str], Verdict]:
    """By contender and pass; on a smaller case where the memory is too small even for the float64 that is usual."""
    most = _CHECKED[case.device.type]
    while True:
        try:
            return _check(case, case.op.small(case.dims, most))
        except torch.OutOfMemoryError:
            if most < 1 << 16:
                raise
        most //= 8
        free_cached_memory(case.device)


def _check(case: Case, dims: Dims) -> dict[tuple[str, str], Verdict]:
    arguments = case.op.make(dims, case.dtype, str(case.device))
    exact: Exact = ([], [])
    if case.op.errors is None:
        wide = tuple(widened(a) for a in arguments)
        exact = results_and_gradients(case.op.reference, wide, differentiable=case.op.differentiable, upstream=noise)
    return {
        (contender.name, which): verdict
        for contender in case.contenders
        for which, verdict in _verdicts(case, contender, arguments, exact).items()
    }


Exact = tuple[list[Tensor], list[Tensor]]
"""Results and gradients."""


def _verdicts(case: Case, contender: Contender, arguments: tuple[Any, ...], exact: Exact) -> dict[str, Verdict]:
    op, first = case.op, next(iter(case.passes))
    if contender.is_limit:
        return dict.fromkeys(case.passes, Verdict("ok"))
    if reason := contender.refuses(*arguments):
        return dict.fromkeys(case.passes, Verdict("refused", reason))
    if op.errors is not None:
        errors = op.errors
        return {first: _judge(contender, lambda: errors(contender, arguments)[first])}
    rounded_to = op.rounded_to(case.dtype)

    def run(differentiable: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
        given = [contender.arrange(a) if i in op.differentiable else a for i, a in enumerate(arguments)]
        return results_and_gradients(lambda *a: contender.bind(*a)(), given, differentiable=differentiable, upstream=noise)

    def error(got: list[Tensor], want: list[Tensor]) -> float:
        return max(error_of(g, w) / allowed_error(g, rounded_to=rounded_to) for g, w in zip(got, want, strict=True))

    if not op.differentiable:
        return {first: _judge(contender, lambda: error(run(())[0], exact[0]))}
    both: list[Exact] = []

    def of_gradients() -> float:
        both.append(run(op.differentiable))
        return error(both[0][1], exact[1])

    backward = _judge(contender, of_gradients)
    # One whose backward does not run may still have a forward.
    forward = _judge(contender, lambda: error((both[0] if both else run(()))[0], exact[0]))
    return {first: forward, "backward": backward}


def _judge(contender: Contender, error: Callable[[], float]) -> Verdict:
    try:
        with choosing(contender.forced):
            value = error()
    except Refused as refusal:
        return Verdict("refused", refusal.reason)
    except Exception as failure:  # whatever a peer raises
        return Verdict("failed", first_line(failure))
    if not math.isfinite(value):
        return Verdict("WRONG", "not finite")
    return Verdict("ok" if value <= 1.0 else "WRONG", error=value)


# Time


@dataclass
class _Turn:
    """One that takes turns."""

    call: Callable[[], Any]
    before: Callable[[], Any]
    forced: Mapping[str, str]
    repeats: int = 1
    rounds: int = sys.maxsize
    extra_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)


def _nothing() -> None:
    return None


def _prepare(case: Case, which: str, contender: Contender, arguments: tuple[Any, ...], watch: Stopwatch) -> _Turn:
    """Bound, warm, and with its share of a round."""
    op, given = case.op, list(arguments)
    for i in op.differentiable:
        given[i] = contender.arrange(arguments[i].detach()).requires_grad_()
    call = contender.bind(*given)
    turn = _Turn(call, lambda: op.refresh(*given), contender.forced)
    if which == "backward":
        leaves = [given[i] for i in op.differentiable]
        if contender.backward_runs_once:
            held: list[tuple[list[Tensor], list[Tensor]]] = [([], [])]
            turn.before = lambda: held.__setitem__(0, _graph(call))
            turn.call = lambda: torch.autograd.grad(held[0][0], leaves, held[0][1])
        else:
            results, upstream = _graph(call)
            turn.call = lambda: torch.autograd.grad(results, leaves, upstream, retain_graph=True)
    with choosing(contender.forced):
        first = watch.seconds(turn.call, 1, turn.before)
        estimate = first if first > _PATIENCE else watch.seconds(turn.call, 1, turn.before)
        turn.before()
        turn.extra_bytes = watch.extra_bytes(turn.call)
    turn.repeats = max(1, min(_MOST_CALLS, int(_TURN[case.device.type] / max(estimate, 1e-7))))
    turn.rounds = max(1, int(_PATIENCE / max(estimate * turn.repeats, 1e-7)))
    return turn


def _graph(call: Callable[[], Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(results, upstream gradients)."""
    returned = call()
    results = [returned] if isinstance(returned, Tensor) else list(returned)
    return results, [noise(r) for r in results]


def _timed(
    case: Case, which: str, verdicts: Mapping[tuple[str, str], Verdict], *, rounds: int, limits: Limits, watch: Stopwatch
) -> tuple[dict[str, _Turn], dict[str, Verdict], list[float], list[float]]:
    """(turns by contender, verdicts by contender, seconds of the matrix product and of the copy)."""
    now = {c.name: verdicts[c.name, which] for c in case.contenders}
    turns: dict[str, _Turn] = {}
    arguments: tuple[Any, ...] | None = None
    for contender in case.contenders:
        if now[contender.name].status != "ok":
            continue
        try:
            if arguments is None:
                arguments = case.op.make(case.dims, case.dtype, str(case.device))
            with choosing(contender.forced):
                turns[contender.name] = _prepare(case, which, contender, arguments, watch)
        except Refused as refusal:
            now[contender.name] = replace(now[contender.name], status="refused", reason=refusal.reason)
        except Exception as failure:  # out of memory, more often than not
            now[contender.name] = replace(now[contender.name], status="failed", reason=first_line(failure))
    repeats = _LIMIT_CALLS[case.device.type]
    bounds = [_Turn(act, _nothing, {}, repeats) for act in (limits.matrix, limits.copy)] if turns else []
    for turn in bounds:
        watch.seconds(turn.call, 1)
    order = [*bounds, *turns.values()]
    for number in range(rounds):
        first = number % max(1, len(order))  # nobody always comes after the same one
        for turn in order[first:] + order[:first]:
            if number < turn.rounds:
                with choosing(turn.forced):
                    turn.seconds.append(watch.seconds(turn.call, turn.repeats, turn.before))
    matrix, copy = (turn.seconds for turn in bounds) if bounds else ([], [])
    limits.note(matrix, copy)
    return turns, now, matrix, copy
