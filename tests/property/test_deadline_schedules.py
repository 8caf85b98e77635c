"""No answer comes later than deadline + 5 ms in random schedules in virtual time; `benchmarks deadlines` plays more."""

from __future__ import annotations

from benchmarks.deadline_schedules import TIMER_LATE_S_MAX, Outcome, play


def test_no_answer_is_later_than_its_deadline_and_a_timer() -> None:
    total = sum((play(seed) for seed in range(1_500)), Outcome())
    assert total.latest_s <= TIMER_LATE_S_MAX + 1e-9
    assert total.latest_s > 0, "some came late by a timer, or nothing was tested"
    assert min(total.answered, total.refused, total.expired) > total.requests / 100
    assert total.requests >= total.answered + total.refused + total.expired
