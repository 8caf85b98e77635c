"""The batcher's rules, one by one; the property tests hold for every order of events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import ar_schedule
from nearcast.errors import MeshError
from nearcast.serving.batching import Batcher, BatchingConfig, Expire, Refuse, Run
from nearcast.serving.joining import join, split
from nearcast.serving.service_curve import FRESH_S_MIN, SAMPLES_MIN, ServiceCurve, best_window_s
from nearcast.serving.turn_rows import SAMPLES, TurnRows


def batcher(**config: Any) -> Batcher:
    return Batcher(BatchingConfig(**config))


def busy(**config: Any) -> Batcher:
    """With request 0 in its only engine since the instant 0."""
    made = batcher(**config)
    made.add(0.0, 0, 1)
    return made


def taught(fixed_s: float, row_s: float, *, now: float, config: dict[str, Any]) -> Batcher:
    """With a curve that knows the cost of 1 and of 4 rows, idle."""
    made = batcher(**config)
    for index in range(12):
        rows = 1 + 3 * (index % 2)
        made.curve.add(now, rows, fixed_s + row_s * rows)
    return made


def test_an_idle_engine_takes_a_request_at_once() -> None:
    made = batcher()
    assert made.add(0.0, 1, 3) == (Run((1,), 3, "idle"),)
    assert made.next_wake() is None


def test_what_waits_behind_a_busy_engine_leaves_together() -> None:
    made = busy(rows_max=8)
    assert made.add(0.1, 2, 2) == made.add(0.2, 3, 3) == ()
    assert made.finish(0.3, 0) == (Run((2, 3), 5, "idle"),)
    assert made.finish(0.4, 2) == ()


def test_rows_are_counted_and_not_requests() -> None:
    made = busy(rows_max=8)
    for request_id, rows in ((1, 5), (2, 3), (3, 1)):
        made.add(0.0, request_id, rows)
    assert made.finish(1.0, 0) == (Run((1, 2), 8, "full"),)
    assert made.finish(2.0, 1) == (Run((3,), 1, "idle"),)


def test_a_request_larger_than_a_batch_runs_alone() -> None:
    made = busy(rows_max=4)
    made.add(0.0, 1, 9)
    made.add(0.0, 2, 1)
    assert made.finish(1.0, 0) == (Run((1,), 9, "full"),)


def test_only_equal_keys_are_joined() -> None:
    made = busy(rows_max=8)
    for request_id, key in ((1, "a"), (2, "b"), (3, "a")):
        made.add(0.0, request_id, 1, key=key)
    assert made.finish(1.0, 0) == (Run((1, 3), 2, "idle"),)
    assert made.finish(2.0, 1) == (Run((2,), 1, "idle"),)


def test_engines_run_side_by_side() -> None:
    made = batcher(engines=2, rows_max=1)
    assert [len(made.add(0.0, request_id, 1)) for request_id in range(4)] == [1, 1, 0, 0]
    assert made.running == 2
    assert made.finish(1.0, 1) == (Run((2,), 1, "full"),)


# Bounds and priorities.


@pytest.mark.parametrize("queue_rows_max", [1, 2, 7, 64])
def test_exactly_so_many_rows_wait_and_not_one_more(queue_rows_max: int) -> None:
    made = busy(queue_rows_max=queue_rows_max, rows_max=1)
    results = [made.add(0.0, request_id, 1) for request_id in range(1, 100)]
    assert results == [()] * queue_rows_max + [
        (Refuse(request_id, "full", 0.0),) for request_id in range(queue_rows_max + 1, 100)
    ]
    made.finish(1.0, 0)
    assert made.add(1.0, 200, 1) == ()
    assert made.add(1.0, 201, 1)[0] == Refuse(201, "full", pytest.approx(1.0))


def test_the_queue_is_bounded_in_bytes_too() -> None:
    made = busy(queue_bytes_max=100)
    assert made.add(0.0, 1, 1, size_bytes=60) == ()
    assert made.add(0.0, 2, 1, size_bytes=41) == (Refuse(2, "full", 0.0),)
    assert made.add(0.0, 3, 1, size_bytes=40) == ()
    assert made.bytes_waiting == 100
    assert made.cancel(1)
    assert made.bytes_waiting == 40


def test_an_empty_queue_takes_even_what_is_too_large_for_it() -> None:
    made = busy(queue_rows_max=4)
    assert made.add(0.0, 1, 100) == ()
    assert made.add(0.0, 2, 1) == (Refuse(2, "full", 0.0),)


def test_the_higher_priority_goes_first_and_0_is_the_default() -> None:
    made = busy(rows_max=1)
    for request_id, priority in ((1, 3), (2, 0), (3, 2), (4, 1), (5, 99)):
        made.add(0.1, request_id, 1, priority=priority)
    order, last = [], 0
    while runs := made.finish(0.2, last):
        assert isinstance(runs[0], Run)
        order.append(last := runs[0].ids[0])
    assert order == [4, 2, 3, 5, 1]


def test_a_full_queue_gives_the_place_of_its_least_important_to_a_more_important_one() -> None:
    made = busy(rows_max=1, queue_rows_max=3)
    for request_id, priority in ((1, 3), (2, 2), (3, 3)):
        made.add(0.1, request_id, 1, priority=priority)
    assert made.add(0.2, 4, 1, priority=3) == (Refuse(4, "full", 0.0),)
    assert made.add(0.2, 5, 1, priority=2) == (Refuse(3, "displaced", 0.0),)
    assert made.add(0.2, 6, 3, priority=2) == (Refuse(6, "full", 0.0),), "nobody goes unless that is enough"
    assert made.add(0.2, 7, 2, priority=1) == (Refuse(5, "displaced", 0.0), Refuse(1, "displaced", 0.0))
    assert made.rows_waiting == 3


def test_a_low_priority_starves_no_longer_than_its_age() -> None:
    made = busy(rows_max=1, priority_age_s=1.0)
    made.add(0.0, 1, 1, priority=3)
    last, ran_at = 0, None
    for step in range(1, 100):  # one more important request every 0.1 s, and one place every 0.1 s
        now = step / 10
        made.add(now, 100 + step, 1, priority=1)
        (run,) = made.finish(now, last)
        assert isinstance(run, Run)
        last = run.ids[0]
        if last == 1:
            ran_at = now
            break
    assert ran_at == pytest.approx(2.0), "two levels of one second each, then it is its turn"


# Deadlines.


def test_deadlines_expire_in_the_queue_while_the_engine_is_busy() -> None:
    made = busy()
    made.add(0.0, 1, 1, deadline=5.0)
    made.add(0.0, 2, 1, deadline=1.0)
    assert made.next_wake() == 1.0
    assert made.tick(1.0) == (Expire((2,)),)
    assert made.next_wake() == 5.0
    assert made.finish(6.0, 0) == (Expire((1,)),)
    assert made.add(7.0, 3, 1, deadline=7.0) == (Expire((3,)),)


def test_whoever_runs_past_the_deadline_is_told_and_the_run_goes_on() -> None:
    made = batcher()
    assert made.add(0.0, 1, 1, deadline=1.0) == (Run((1,), 1, "idle"),)
    assert made.next_wake() == 1.0
    assert made.tick(1.0) == (Expire((1,)),)
    assert made.is_running(1)
    assert made.next_wake() is None
    assert made.finish(9.0, 1) == ()


def test_expired_requests_make_room() -> None:
    made = busy(queue_rows_max=1)
    made.add(0.0, 1, 1, deadline=1.0)
    assert made.add(2.0, 2, 1) == (Expire((1,)),)
    assert made.finish(3.0, 0) == (Run((2,), 1, "idle"),)


def test_cancelled_requests_leave_the_queue_only() -> None:
    made = busy()
    made.add(0.0, 1, 2)
    assert made.cancel(1)
    assert not made.cancel(1)
    assert not made.cancel(0)
    assert made.rows_waiting == 0
    assert made.finish(1.0, 0) == ()


LATE = {"late_quantile": 0.95, "rows_max": 1}


def test_what_cannot_be_in_time_is_refused_at_once_with_the_time_it_lacks() -> None:
    made = taught(0.2, 0.0, now=0.0, config=LATE)
    assert made.add(0.0, 1, 1, deadline=0.3) == (Run((1,), 1, "full"),)
    assert made.add(0.1, 2, 1, deadline=0.51) == (), "0.1 s of the first, 0.2 s of its own and half of that to spare"
    assert made.add(0.1, 3, 1, deadline=0.51) == (Refuse(3, "late", pytest.approx(0.19)),)
    assert made.add(0.1, 4, 1, deadline=0.25) == (Refuse(4, "hopeless", None),)
    assert made.add(0.1, 5, 1, deadline=0.51, priority=1) == (), "a more important one overtakes"
    (run, *late) = made.finish(0.2, 1)[::-1]
    assert run == Run((5,), 1, "full")
    assert late == []
    assert made.finish(0.4, 5) == (Refuse(2, "late", 0.0),), "what was overtaken is dropped before it runs"


def test_who_need_not_wait_runs_if_that_is_likelier_in_time_than_not() -> None:
    made = batcher(**LATE)
    for index in range(40):  # 1 s, and every fourth time 2 s
        made.curve.add(0.0, 1, 2.0 if index % 4 == 0 else 1.0)
    likely_s, sure_s = made.curve.quantile_s(1, 0.5), made.curve.quantile_s(1, 0.95)
    assert made.add(0.0, 1, 1, deadline=0.9 * likely_s) == (Refuse(1, "hopeless", None),)
    assert made.add(0.0, 2, 1, deadline=1.1 * likely_s) == (Run((2,), 1, "full"),)
    (refusal,) = made.add(0.0, 3, 1, deadline=sure_s + 1.1 * likely_s)
    assert isinstance(refusal, Refuse)
    assert refusal.why == "late", "who is to wait has to be surer"
    assert made.add(0.0, 4, 1, deadline=3 * sure_s) == ()
    now = 3 * sure_s - 1.1 * likely_s
    assert made.finish(now, 2, ran=False) == (Run((4,), 1, "full"),), (
        "and need be no surer than that once it has waited"
    )


def test_where_times_differ_by_shape_only_what_a_quick_run_could_not_save_is_refused() -> None:
    made = batcher(late_quantile=1 - 0.95, rows_max=1)
    for index in range(40):  # most shapes need 0.1 s, some 1 ms
        made.curve.add(0.0, 1, 0.001 if index % 10 == 0 else 0.1)
    quick_s = made.curve.quantile_s(1, 0.05)
    assert made.add(0.0, 1, 1, deadline=0.9 * quick_s) == (Refuse(1, "hopeless", None),)
    assert made.add(0.0, 2, 1, deadline=0.02) == (Run((2,), 1, "full"),), "an engine is idle"
    assert made.add(0.0, 3, 1, deadline=0.02) == ()
    assert made.finish(0.001, 2) == (Run((3,), 1, "full"),), "once it has waited it is judged no harder"


def test_of_cameras_in_overload_each_frame_is_answered_in_time_or_refused_at_once() -> None:
    outcome = sum((ar_schedule.play(seed, seconds=20.0) for seed in range(3)), ar_schedule.Outcome())
    assert outcome.at_once_share >= 0.999
    assert outcome.answered_share >= 0.41, "the engine seldom waits for work"


def test_nothing_is_refused_while_the_estimate_is_unknown_or_stale() -> None:
    made = batcher(**LATE)
    for request_id in range(SAMPLES_MIN):
        now = float(request_id)
        assert made.add(now, request_id, 1, deadline=now + 0.05) == (Run((request_id,), 1, "full"),)
        made.finish(now + 0.2, request_id)
    assert made.add(5.0, 10, 1, deadline=5.05) == (Refuse(10, "hopeless", None),)
    later = 4.2 + 10 * 0.2 + 0.01
    assert later > 4.2 + FRESH_S_MIN
    assert made.add(later, 11, 1, deadline=later + 0.05) == (Run((11,), 1, "full"),), "what is believed gets old"
    assert made.add(later, 20, 1, deadline=later + 0.05) == (Refuse(20, "hopeless", None),), "one try is enough"
    made.finish(later + 0.01, 11)
    assert made.add(later + 0.02, 12, 1, deadline=later + 0.07) == (Run((12,), 1, "full"),), "and is forgotten"


def test_a_batch_stops_where_one_more_row_would_make_somebody_late() -> None:
    made = taught(0.01, 0.1, now=0.0, config={"late_quantile": 0.95, "rows_max": 8})
    made.add(0.0, 0, 1)
    for request_id, deadline in ((1, 0.35), (2, None), (3, None)):
        made.add(0.0, request_id, 1, deadline=deadline)
    assert made.finish(0.11, 0) == (Run((1, 2), 2, "deadline"),)


# Company.


def test_the_window_opens_only_where_arrivals_are_denser_than_what_joining_saves() -> None:
    assert best_window_s(0.010, 0.001, 0.001) == pytest.approx(0.004)
    assert best_window_s(0.010, 0.001, 0.010) == 0.0
    assert best_window_s(0.001, 0.010, 0.0) == 0.0
    assert best_window_s(0.010, 0.001, float("inf")) == 0.0


def test_a_window_waits_for_company_but_not_longer() -> None:
    made = taught(0.010, 0.001, now=0.0, config={"window_s_max": 0.002, "rows_max": 4})
    assert made.add(0.0, 1, 1) == (Run((1,), 1, "idle"),), "nothing is known about arrivals yet"
    made.finish(0.0001, 1)
    assert made.add(0.0002, 2, 1) == ()
    assert made.add(0.0003, 3, 1) == ()
    assert made.next_wake() == pytest.approx(0.0022)
    assert made.tick(0.002) == ()
    assert made.tick(made.next_wake() or 0.0) == (Run((2, 3), 2, "window"),)


def test_a_full_batch_or_a_near_deadline_does_not_wait_for_the_window() -> None:
    made = taught(0.010, 0.001, now=0.0, config={"window_s_max": 0.002, "rows_max": 2, "late_quantile": 0.95})
    made.add(0.0, 1, 1)
    made.finish(0.0001, 1)
    assert made.add(0.0002, 2, 1) == ()
    assert made.add(0.0003, 3, 1) == (Run((2, 3), 2, "full"),)
    made = taught(0.010, 0.001, now=0.0, config={"window_s_max": 0.002, "late_quantile": 0.95})
    made.add(0.0, 1, 1)
    made.add(0.0002, 2, 1)
    made.finish(0.011, 1)
    made.finish(0.022, 2)
    assert made.window_s == 0.002
    assert made.add(0.0221, 4, 1, deadline=0.0221 + 0.0145) == (Run((4,), 1, "idle"),)


def test_a_lone_client_never_waits() -> None:
    made = taught(0.010, 0.001, now=0.0, config={"window_s_max": 0.002, "rows_max": 4})
    for request_id in range(50):
        now = request_id * 0.012
        (run,) = made.add(now, request_id, 1)
        assert isinstance(run, Run)
        made.finish(now + 0.011, request_id)


def test_rows_are_not_joined_where_that_saves_nothing() -> None:
    made = taught(0.0, 0.010, now=0.0, config={"rows_max": 8})
    made.add(0.0, 0, 1)
    for request_id in (1, 2, 3):
        made.add(0.0, request_id, 1)
    assert made.finish(0.01, 0) == (Run((1,), 1, "alone"),)


def test_the_curve_learns_the_cost_of_a_run_and_of_a_row() -> None:
    curve = ServiceCurve()
    for index in range(60):
        rows = 1 + index % 5
        curve.add(index * 0.01, rows, 0.004 + 0.0005 * rows)
    assert curve.fixed_s == pytest.approx(0.004, rel=0.01)
    assert curve.row_s == pytest.approx(0.0005, rel=0.05)
    assert curve.quantile_s(16, 0.95) == pytest.approx(0.012, rel=0.02)
    assert curve.is_fresh(0.59 + FRESH_S_MIN)
    assert not curve.is_fresh(0.59 + FRESH_S_MIN + 0.01)


@pytest.mark.parametrize("known", [1, 2, 3, 4])
def test_the_loop_learns_how_many_rows_it_may_run(known: int) -> None:
    turn = TurnRows(known, 1000.0, rows_max=32)
    for _ in range(40 * SAMPLES):
        turn.observe(turn.rows, 100.0 + 60.0 * turn.rows)
    assert 12 <= turn.rows <= 15
    for _ in range(40 * SAMPLES):
        turn.observe(turn.rows, 1001.0 * turn.rows / known)
    assert turn.rows == known, "never below what was known before"


# Tensors.


def test_split_refuses_a_model_that_loses_rows() -> None:
    with pytest.raises(MeshError, match="Output y has shape"):
        split({"y": np.zeros((3, 2))}, [2, 2], {"y": 0})
    with pytest.raises(MeshError, match="Output y has shape"):
        split({"y": np.zeros(())}, [1, 1], {"y": 0})


def test_joining_one_copies_nothing() -> None:
    x = np.arange(6).reshape(2, 3)
    assert join([{"x": x}], {"x": 0})["x"] is x
