"""AdamW with every kind of master and moment: against float64 within counted roundings, bit by bit against the plain PyTorch, and
the same however a slice is cut, on any number of threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatronish import native
from megatronish.kernels import adamw
from megatronish.kernels.adamw import AdamWNumbers, adamw_, join_master, split_master
from megatronish.kernels.square_sum import square_sum

NUMBERS = AdamWNumbers(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
KINDS = [
    (master, moments, rounding)
    for master in ("float32", "remainder", "none")
    for moments in (torch.float32, torch.bfloat16)
    for rounding in ("nearest", "stochastic")
]
kinds = pytest.mark.parametrize(("master", "moments", "rounding"), KINDS)


def segments_of(n: int) -> Tensor:
    """Three tensors; the last one is cut by columns and its numbers pass 2^32."""
    a, b = n // 3, n // 2
    rows = [[a, 1, 5, 0, 1 << 40, 1 << 40, 0], [b, 0, -(2**62), -a, 1 << 40, 1 << 40, 7]]
    return torch.tensor([*rows, [n, 1, 99, -b, 37, 111, (1 << 32) - 999]])


def state_of(n: int, master: str, moments: torch.dtype, *, seed: int = 0, offset: int = 0) -> dict[str, Any]:
    """Arguments of adamw_; tensors begin `offset` elements into their memory."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype: torch.dtype, *, positive: bool = False) -> Tensor:
        values = torch.randn(n + offset, generator=generator).to(dtype)
        return (values.abs() if positive else values)[offset:]

    weights = draw(torch.float32)
    low: Tensor | None = torch.zeros(n + offset, dtype=torch.bfloat16)[offset:]
    if master == "remainder":
        parts = [torch.zeros(n + offset, dtype=dtype)[offset:] for dtype in (torch.bfloat16, torch.int16)]
        for part, value in zip(parts, split_master(weights), strict=True):
            part.copy_(value)
        low, weights = parts
    elif master == "none":
        low, weights = None, draw(torch.bfloat16)
    grad, exp_avg, exp_avg_sq = draw(torch.float32), draw(moments), draw(moments, positive=True)
    return {"master": weights, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "low": low}


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def copy_of(state: dict[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else value.clone() for name, value in state.items()}


def step(
    state: dict[str, Any], rounding: str, *, scale: float = 0.37, t: int = 7, segments: Tensor | None = None, **more: Any
) -> None:
    """One step of the op."""
    rows = segments_of(state["grad"].numel()) if segments is None else segments
    adamw_(**state, scalars=torch.tensor([scale, t]), numbers=NUMBERS, segments=rows, rounding=rounding, **more)  # type: ignore[arg-type]


@kinds
@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 3000), offset=st.integers(0, 9), t=st.integers(1, 10_000))
def test_native_code_has_the_bits_of_the_reference(
    master: str, moments: torch.dtype, rounding: Any, n: int, offset: int, t: int
) -> None:
    ours = state_of(n, master, moments, seed=n, offset=offset)
    plain = copy_of(ours)
    step(ours, rounding, t=t, zero_grad=True)
    low, scalars = plain.pop("low"), torch.tensor([0.37, t])
    adamw.reference(*plain.values(), scalars, low, NUMBERS, segments_of(n), rounding, zero_grad=True)
    for name, value in tensors_of({**plain, "low": low}).items():
        assert torch.equal(ours[name], value), name


@kinds
def test_a_step_is_float64_within_the_roundings(master: str, moments: torch.dtype, rounding: Any) -> None:
    n = 5000
    state = state_of(n, master, moments)
    before = copy_of(state)
    weights = join_master(state["low"], state["master"]) if master == "remainder" else state["master"]
    exact = [weights.double(), *(before[name].double() for name in ("grad", "exp_avg", "exp_avg_sq"))]
    adamw.reference(*exact, torch.tensor([0.37, 7], dtype=torch.float64), None, NUMBERS, segments_of(n))
    step(state, rounding)
    got = join_master(state["low"], state["master"]) if master == "remainder" else state["master"]
    # Some twenty roundings to float32 (as many units of 2^-24 of terms of size up to 4), and one of bfloat16, by chance twice that.
    wide, narrow = 20 * 4 * 2.0**-24, (2 if rounding == "stochastic" else 1) * 2.0**-8
    for value, expected in ((got, exact[0]), (state["exp_avg"], exact[2]), (state["exp_avg_sq"], exact[3])):
        limit = (narrow if value.dtype == torch.bfloat16 else 0.0) * expected.abs() * 1.01 + wide
        assert ((value.double() - expected).abs() <= limit).all()
    if state["low"] is not None:
        assert ((state["low"].double() - exact[0]).abs() <= 2.0**-8 * exact[0].abs() * 1.01 + wide).all()


@kinds
def test_bits_depend_on_neither_threads_nor_the_cut(master: str, moments: torch.dtype, rounding: Any) -> None:
    n = 3 * 65536 + 17
    threads, outcomes = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            state = state_of(n, master, moments)
            step(state, rounding, zero_grad=number > 1)
            outcomes.append({name: value for name, value in tensors_of(state).items() if name != "grad"})
    finally:
        torch.set_num_threads(threads)
    state, rows = state_of(n, master, moments), segments_of(n)
    for start, stop in ((0, 5), (5, 70_001), (70_001, 70_002), (70_002, n)):
        part = {name: None if value is None else value[start:stop] for name, value in state.items()}
        moved = rows.clone()
        moved[:, 0] = (rows[:, 0] - start).clamp(min=0)
        moved[:, 3] += start
        step(part, rounding, segments=moved)
    outcomes.append({name: value for name, value in tensors_of(state).items() if name != "grad"})
    for outcome in outcomes[1:]:
        for name, value in outcome.items():
            assert torch.equal(value, outcomes[0][name]), name


@kinds
@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_refused_step_writes_zeros_to_the_gradient_alone(master: str, moments: torch.dtype, rounding: Any, scale: float) -> None:
    state = state_of(1021, master, moments)
    state["grad"][5] = math.nan
    before = copy_of(state)
    step(state, rounding, scale=scale, zero_grad=True)
    assert state["grad"].eq(0).all()
    for name, value in tensors_of(state).items():
        assert name == "grad" or torch.equal(value, before[name]), name


def test_remainders_lose_nothing() -> None:
    # Every exponent, ties and their neighbours, infinities.
    lows = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = ((torch.arange(2**16)[:, None] << 16) | lows).flatten()
    master = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    master = master[master.isfinite() | master.isinf()]
    low, remainder = split_master(master)
    assert torch.equal(join_master(low, remainder).view(torch.int32), master.view(torch.int32))
    # Half the distance of neighbours at most; beyond the largest bfloat16 the parameter is infinite, as it is to nearest even.
    sure = low.isfinite() & (master.abs() > 1e-30)
    assert ((low.double() - master.double()).abs() <= 2.0**-8 * master.abs())[sure].all()


def test_masters_in_halves_go_the_way_of_float32_masters() -> None:
    whole, halves = state_of(4099, "float32", torch.float32), state_of(4099, "remainder", torch.float32)
    assert torch.equal(join_master(halves["low"], halves["master"]), whole["master"])
    for t in range(1, 20):
        step(whole, "nearest", t=t)
        step(halves, "nearest", t=t)
    assert torch.equal(join_master(halves["low"], halves["master"]), whole["master"])


def test_rounding_by_chance_is_right_on_average_and_draws_afresh_each_step() -> None:
    # A moment just above a bfloat16 number, of which nearest would never see the difference: 1 + 2^-10 lies an eighth of the way.
    n, value = 1 << 16, 1 + 2.0**-10
    means, ups = [], []
    for t in (1, 2):
        moments = {name: torch.full((n,), 1.0, dtype=torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")}
        state = {"master": torch.ones(n, dtype=torch.bfloat16), "low": None, "grad": torch.full((n,), 1 + 2.0**-10 * 10), **moments}
        step(state, "stochastic", scale=1.0, t=t, segments=torch.tensor([[n, 0, 3, 0, n, n, 0]]))
        means.append(float(state["exp_avg"].double().mean()))
        ups.append(state["exp_avg"] > 1)
        assert {float(x) for x in state["exp_avg"].unique()} == {1.0, 1 + 2.0**-7}
        assert not torch.equal(ups[-1], state["exp_avg_sq"] > 1)
    # A mean of n draws of p = 1/8, in units of 2^-7: five deviations.
    for mean in means:
        assert abs(mean - value) <= 5 * 2.0**-7 * math.sqrt(0.125 * 0.875 / n)
    agree = float((ups[0] == ups[1]).double().mean())
    assert abs(agree - (0.125**2 + 0.875**2)) <= 5 * math.sqrt(0.25 / n)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 70_000), min_size=1, max_size=4), offset=st.integers(0, 9))
def test_the_square_sum_is_float64_on_any_number_of_threads(sizes: list[int], offset: int) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n + offset, generator=generator)[offset:] * 10.0 ** (i * 3) for i, n in enumerate(sizes)]
    expected = sum(float(t.double().square().sum()) for t in tensors)
    threads = torch.get_num_threads()
    try:
        totals = []
        for number in (1, 3):
            torch.set_num_threads(number)
            totals.append(float(square_sum(tensors)))
    finally:
        torch.set_num_threads(threads)
    if native.cpu is not None:
        assert totals[0] == totals[1]
    assert totals[0] == pytest.approx(expected, rel=1e-13 if native.cpu is not None else 1e-6)


def test_a_square_sum_shows_what_is_not_finite() -> None:
    assert math.isnan(square_sum([torch.ones(40), torch.tensor([1.0, math.nan])]))
    assert math.isinf(square_sum([torch.tensor([1.0, -math.inf])]))


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({"low": None}, "low is None"),
        ({"grad": torch.ones(8, dtype=torch.bfloat16)}, "grad is torch.bfloat16"),
        ({"exp_avg": torch.ones(8, dtype=torch.float16)}, "exp_avg is torch.float16"),
        ({"exp_avg_sq": torch.ones(8, dtype=torch.bfloat16)}, "exp_avg_sq is torch.bfloat16"),
        ({"grad": torch.ones(16)[::2]}, "contiguous"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], needed: str) -> None:
    with pytest.raises(ValueError, match=needed):
        step({**state_of(8, "remainder", torch.float32), **change}, "nearest")
    with pytest.raises(ValueError, match="needs segments"):
        plain = state_of(8, "float32", torch.bfloat16)
        adamw_(**plain, scalars=torch.ones(2), numbers=NUMBERS, rounding="stochastic")
