"""Which samples a step takes: every sample once and in order, whatever the ramp."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatronish.batch_schedule import BatchSchedule
from megatronish.config import BatchRamp


@st.composite
def schedules(draw: st.DrawFn) -> tuple[BatchSchedule, BatchRamp, int]:
    start, increment = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    full = start + increment * draw(st.integers(1, 12))
    ramp = BatchRamp(start=start, increment=increment, samples=draw(st.integers(1, 2000)))
    return BatchSchedule.of(full, ramp), ramp, full


@given(schedules())
def test_steps_take_all_samples_in_order_in_batches_that_grow_to_the_full_one(case: tuple[BatchSchedule, BatchRamp, int]) -> None:
    schedule, ramp, full = case
    consumed, sizes = 0, []
    for step in range(1, 200):
        assert schedule.first_sample(step) == consumed == schedule.consumed_after(step - 1)
        sizes.append(schedule.batch_size(step))
        # The size follows from the share of the ramp's samples that are taken: Megatron-LM's rule, in integers.
        shares = (full - ramp.start) // ramp.increment
        taken = next((i for i in range(shares) if consumed < -(-(i + 1) * ramp.samples // shares)), shares)
        assert sizes[-1] == ramp.start + taken * ramp.increment
        consumed += sizes[-1]
    assert sizes == sorted(sizes) and sizes[0] == ramp.start
    assert schedule.batch_size(ramp.samples + 1) == full


@given(schedules(), st.integers(1, 10_000))
def test_steps_for_is_the_least_number_that_takes_enough(case: tuple[BatchSchedule, BatchRamp, int], samples: int) -> None:
    steps = case[0].steps_for(samples)
    assert case[0].consumed_after(steps - 1) < samples <= case[0].consumed_after(steps)


def test_without_a_ramp_every_step_takes_the_global_batch() -> None:
    schedule = BatchSchedule.of(8)
    assert [schedule.first_sample(step) for step in (1, 2, 1000)] == [0, 8, 7992]
    assert {schedule.batch_size(step) for step in (1, 2, 10**15)} == {8}
    assert [schedule.steps_for(samples) for samples in (1, 8, 9, 80)] == [1, 1, 2, 10]


def test_gpt3s_ramp_in_small() -> None:
    schedule = BatchSchedule.of(8, BatchRamp(start=2, increment=2, samples=24))
    assert [schedule.batch_size(step) for step in range(1, 11)] == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    assert schedule.consumed_after(8) == 28  # the size 6 ended with the step that reached 24
