from __future__ import annotations

import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from nearcast.transport.listener import within_descriptors
from nearcast.transport.seam import Limits
from nearcast.transport.watch import NOTICE_S, Seen, Verdict, Watch

LIMITS = Limits(
    handshake_timeout_s=10,
    stall_timeout_s=60,
    idle_timeout_s=900,
    keepalive_s=20,
    keepalive_timeout_s=5,
    connection_age_grace_s=300,
)
QUIET = Seen(is_greeted=True, calls=0, last_stream_id=0, owed_bytes=0, left_bytes=0, read_at=0)
BUSY = replace(QUIET, calls=1, last_stream_id=1)


def watch(age_s: float = 0.0) -> Watch:
    return Watch(LIMITS, opened_at=0.0, age_s=age_s)


def test_who_never_greets_is_dropped() -> None:
    found = watch()
    silent = replace(QUIET, is_greeted=False)
    assert found.look(10, silent) is Verdict.KEEP
    assert found.look(10.1, silent) is Verdict.ABORT


def test_who_reads_nothing_is_dropped_and_who_reads_a_little_is_not() -> None:
    found = watch()
    owing = replace(BUSY, owed_bytes=100)
    assert found.look(1, owing) is Verdict.KEEP
    assert found.is_stalled
    assert found.look(61, owing) is Verdict.KEEP
    assert found.look(61.1, replace(owing, left_bytes=1)) is Verdict.KEEP
    assert not found.is_stalled
    assert found.look(62, replace(owing, left_bytes=1)) is Verdict.KEEP
    assert found.look(122.1, replace(owing, left_bytes=1)) is Verdict.ABORT


def test_a_silent_peer_with_calls_is_pinged_and_then_dropped() -> None:
    found = watch()
    assert found.look(20, BUSY) is Verdict.KEEP
    assert found.look(20.1, BUSY) is Verdict.PING
    assert found.look(25, BUSY) is Verdict.KEEP
    assert found.look(25.2, BUSY) is Verdict.ABORT


def test_a_peer_that_answers_is_pinged_again_later() -> None:
    found = watch()
    assert found.look(21, BUSY) is Verdict.PING
    assert found.look(27, replace(BUSY, read_at=21.5)) is Verdict.KEEP
    assert found.look(41, replace(BUSY, read_at=21.5)) is Verdict.KEEP
    assert found.look(42, replace(BUSY, read_at=21.5)) is Verdict.PING


def test_a_peer_without_calls_or_with_unread_answers_is_not_pinged() -> None:
    assert watch().look(100, QUIET) is Verdict.KEEP
    assert watch().look(50, replace(BUSY, owed_bytes=5)) is Verdict.KEEP


def test_an_old_connection_is_told_first_and_left_after_its_calls() -> None:
    found = watch(age_s=100)
    spoken = replace(BUSY, read_at=1e9)
    assert found.look(100, spoken) is Verdict.KEEP
    assert found.look(100.5, spoken) is Verdict.NOTICE
    assert found.look(100.6, spoken) is Verdict.KEEP
    assert found.look(100.5 + NOTICE_S, spoken) is Verdict.GOODBYE
    assert found.look(401, spoken) is Verdict.KEEP
    assert found.look(402, spoken) is Verdict.ABORT


@pytest.mark.parametrize(("is_crowded", "most_s"), [(False, 900), (True, 10)])
def test_idle_connections_go_sooner_where_there_is_little_room(is_crowded: bool, most_s: float) -> None:
    found = watch()
    assert found.look(5, BUSY, is_crowded=is_crowded) is Verdict.KEEP
    ended = replace(QUIET, last_stream_id=1)
    assert found.look(5 + most_s, ended, is_crowded=is_crowded) is Verdict.KEEP
    assert found.look(5.1 + most_s, ended, is_crowded=is_crowded) is Verdict.NOTICE


def test_pings_of_a_peer_do_not_make_it_busy() -> None:
    found = watch()
    assert found.look(901, replace(QUIET, read_at=901)) is Verdict.NOTICE


def test_calls_between_two_looks_do() -> None:
    found = watch()
    assert found.look(899, replace(QUIET, last_stream_id=7)) is Verdict.KEEP
    assert found.look(1700, replace(QUIET, last_stream_id=7)) is Verdict.KEEP


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.integers(0, 2), st.integers(0, 3), st.booleans(), st.booleans(), st.booleans()),
        max_size=20,
    )
)
def test_every_connection_that_does_nothing_ends(
    steps: list[tuple[float, int, int, bool, bool, bool]],
) -> None:
    """Whatever it did before: without calls it hears goodbye, or is dropped, within the sum of the bounds."""
    found, now, left = watch(), 0.0, 0
    for wait_s, calls, owed, moves, reads, is_crowded in steps:
        now += wait_s
        left += moves
        seen = replace(QUIET, calls=calls, owed_bytes=owed, left_bytes=left, read_at=now if reads else 0)
        if found.look(now, seen, is_crowded=is_crowded) in (Verdict.ABORT, Verdict.GOODBYE):
            return
    quiet = replace(QUIET, left_bytes=left, read_at=now)
    for _ in range(40):
        now += 30
        if found.look(now, quiet) in (Verdict.ABORT, Verdict.GOODBYE):
            return
    raise AssertionError


def test_connections_leave_descriptors_for_the_rest_of_the_process() -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert within_descriptors(Limits(connections_max=10**9)).connections_max == soft // 4
    assert within_descriptors(Limits(connections_max=3)).connections_max == 3
