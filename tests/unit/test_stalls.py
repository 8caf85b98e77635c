"""Which of the late ones of a benchmark were on their way while the machine itself stood still."""

from __future__ import annotations

import os

import pytest

from benchmarks.stalls import Span, Stalls, watch_stalls


@pytest.mark.parametrize(
    ("span", "met"),
    [((0.0, 1.0), False), ((0.9, 1.1), True), ((1.05, 1.06), True), ((0.0, 9.0), True), ((1.2, 2.0), False)],
)
def test_a_stall_is_met_by_whatever_overlaps_it(span: Span, met: bool) -> None:
    stalls = Stalls([(1.0, 1.2), (5.0, 5.1)])
    assert stalls.met(*span) is met
    assert stalls.beyond([span, (3.0, 4.0)]) == 2 - met


def test_the_machine_is_watched_by_real_processes_that_end_with_the_block() -> None:
    with watch_stalls(os.getpid()) as stalls:
        assert stalls.spans == []
    assert all(until - since > 0.001 for since, until in stalls.spans)
    assert stalls.is_known or (not stalls.spans and "not known" in str(stalls))
