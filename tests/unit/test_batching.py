"""The batcher's rules, one by one; the property tests hold for every order of events."""

from __future__ import annotations

import numpy as np
import pytest

from nearcast.errors import MeshError
from nearcast.serving.batching import Batcher, BatchingConfig, Expire, Refuse, Run
from nearcast.serving.joining import join, split


def test_an_idle_engine_takes_a_request_at_once() -> None:
    batcher = Batcher(BatchingConfig())
    assert batcher.add(0.0, 1, 3) == (Run((1,), 3, "idle"),)
    assert batcher.next_wake() is None


def test_what_waits_behind_a_busy_engine_leaves_together() -> None:
    batcher = Batcher(BatchingConfig(rows_max=8))
    batcher.add(0.0, 1, 1)
    assert batcher.add(0.1, 2, 2) == batcher.add(0.2, 3, 3) == ()
    assert batcher.finish(0.3) == (Run((2, 3), 5, "idle"),)
    assert batcher.finish(0.4) == ()


def test_rows_are_counted_and_not_requests() -> None:
    batcher = Batcher(BatchingConfig(rows_max=8))
    batcher.add(0.0, 0, 1)
    for request_id, rows in ((1, 5), (2, 3), (3, 1)):
        batcher.add(0.0, request_id, rows)
    assert batcher.finish(1.0) == (Run((1, 2), 8, "full"),)
    assert batcher.finish(2.0) == (Run((3,), 1, "idle"),)


def test_a_request_larger_than_a_batch_runs_alone() -> None:
    batcher = Batcher(BatchingConfig(rows_max=4))
    batcher.add(0.0, 0, 1)
    batcher.add(0.0, 1, 9)
    batcher.add(0.0, 2, 1)
    assert batcher.finish(1.0) == (Run((1,), 9, "full"),)


def test_only_equal_keys_are_joined() -> None:
    batcher = Batcher(BatchingConfig(rows_max=8))
    batcher.add(0.0, 0, 1)
    for request_id, key in ((1, "a"), (2, "b"), (3, "a")):
        batcher.add(0.0, request_id, 1, key=key)
    assert batcher.finish(1.0) == (Run((1, 3), 2, "idle"),)
    assert batcher.finish(2.0) == (Run((2,), 1, "idle"),)


def test_a_window_waits_for_company_but_not_longer() -> None:
    batcher = Batcher(BatchingConfig(rows_max=4, window_s=0.5))
    assert batcher.add(0.0, 1, 1) == ()
    assert batcher.add(0.2, 2, 1) == ()
    assert batcher.next_wake() == 0.5
    assert batcher.tick(0.4) == ()
    assert batcher.tick(0.5) == (Run((1, 2), 2, "window"),)


def test_a_full_batch_does_not_wait_for_the_window() -> None:
    batcher = Batcher(BatchingConfig(rows_max=2, window_s=0.5))
    assert batcher.add(0.0, 1, 1) == ()
    assert batcher.add(0.1, 2, 1) == (Run((1, 2), 2, "full"),)


def test_the_queue_is_bounded_in_rows() -> None:
    batcher = Batcher(BatchingConfig(queue_rows_max=4))
    batcher.add(0.0, 0, 1)
    assert batcher.add(0.0, 1, 3) == ()
    assert batcher.add(0.0, 2, 2) == (Refuse(2),)
    assert batcher.add(0.0, 3, 1) == ()


def test_an_empty_queue_takes_even_what_is_too_large_for_it() -> None:
    batcher = Batcher(BatchingConfig(queue_rows_max=4))
    batcher.add(0.0, 0, 1)
    assert batcher.add(0.0, 1, 100) == ()
    assert batcher.add(0.0, 2, 1) == (Refuse(2),)


def test_deadlines_expire_in_the_queue_while_the_engine_is_busy() -> None:
    batcher = Batcher(BatchingConfig())
    batcher.add(0.0, 0, 1)
    batcher.add(0.0, 1, 1, deadline=5.0)
    batcher.add(0.0, 2, 1, deadline=1.0)
    assert batcher.next_wake() == 1.0
    assert batcher.tick(1.0) == (Expire((2,)),)
    assert batcher.next_wake() == 5.0
    assert batcher.finish(6.0) == (Expire((1,)),)
    assert batcher.add(7.0, 3, 1, deadline=7.0) == (Expire((3,)),)


def test_expired_requests_make_room() -> None:
    batcher = Batcher(BatchingConfig(queue_rows_max=1))
    batcher.add(0.0, 0, 1)
    batcher.add(0.0, 1, 1, deadline=1.0)
    assert batcher.add(2.0, 2, 1) == (Expire((1,)),)
    assert batcher.finish(3.0) == (Run((2,), 1, "idle"),)


def test_cancelled_requests_leave_the_queue_only() -> None:
    batcher = Batcher(BatchingConfig())
    batcher.add(0.0, 0, 1)
    batcher.add(0.0, 1, 2)
    assert batcher.cancel(1)
    assert not batcher.cancel(1)
    assert not batcher.cancel(0)
    assert batcher.rows_waiting == 0
    assert batcher.finish(1.0) == ()


def test_engines_run_side_by_side() -> None:
    batcher = Batcher(BatchingConfig(engines=2, rows_max=1))
    assert [len(batcher.add(0.0, request_id, 1)) for request_id in range(4)] == [1, 1, 0, 0]
    assert batcher.running == 2
    assert batcher.finish(1.0) == (Run((2,), 1, "full"),)


def test_split_refuses_a_model_that_loses_rows() -> None:
    with pytest.raises(MeshError, match="Output y has shape"):
        split({"y": np.zeros((3, 2))}, [2, 2], {"y": 0})
    with pytest.raises(MeshError, match="Output y has shape"):
        split({"y": np.zeros(())}, [1, 1], {"y": 0})


def test_joining_one_copies_nothing() -> None:
    x = np.arange(6).reshape(2, 3)
    assert join([{"x": x}], {"x": 0})["x"] is x
