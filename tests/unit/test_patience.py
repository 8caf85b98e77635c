"""Who waits for a link that is down, how long, and who does not."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.mqtt.limits import RequestLimits
from edge_node.mqtt.patience import Patience
from nearcast.errors import Code, MeshError

LIMITS = RequestLimits()


def wait_s(code=Code.UNAVAILABLE, *, attempt=0, remaining_s=30.0, sent=False, missed=False, safe=True, waiting=0):
    patience = Patience(LIMITS, Random(1))
    patience.waiting = waiting
    return patience.wait_s(MeshError(code, "", sent=sent), attempt, remaining_s, is_missed=missed, is_safe=safe)


@given(st.integers(0, 100), st.floats(0.0, 4000.0))
def test_a_wait_ends_before_the_deadline_and_leaves_time_to_say_so(attempt, remaining_s):
    wait = wait_s(attempt=attempt, remaining_s=remaining_s)
    if remaining_s <= LIMITS.answer_margin_s:
        assert wait is None
    else:
        assert wait is not None
        assert 0.0 < wait <= min(remaining_s - LIMITS.answer_margin_s, LIMITS.outlast_max_s)


@pytest.mark.parametrize("code", sorted(set(Code) - {Code.UNAVAILABLE}))
def test_other_failures_are_the_answer(code):
    assert wait_s(code) is None
    assert (wait_s(code, missed=True) is not None) is (code is Code.MODEL_NOT_FOUND)


def test_what_may_have_run_is_repeated_only_where_that_is_harmless():
    assert wait_s(sent=True, safe=True) is not None
    assert wait_s(sent=True, safe=False) is None
    assert wait_s(sent=False, safe=False) is not None


def test_only_so_many_wait():
    assert wait_s(waiting=LIMITS.outlasting_max - 1) is not None
    assert wait_s(waiting=LIMITS.outlasting_max) is None


def test_waiting_requests_do_not_come_back_together():
    patience = Patience(LIMITS, Random(1))
    error = MeshError(Code.UNAVAILABLE, "")
    waits = {patience.wait_s(error, 6, 30.0, is_missed=False, is_safe=True) for _ in range(50)}
    assert len(waits) == 50
    assert max(waits) - min(waits) > LIMITS.outlast_max_s / 2
