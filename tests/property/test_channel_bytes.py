"""Whatever a server sends, a channel's calls end and nothing else happens: mutated conversations, without sockets."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_channel import ACTS, CALLS, SENT_SIZE_BYTES, converse


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(ACTS)), st.sampled_from(CALLS)), max_size=8),
    st.lists(st.tuples(st.integers(0, SENT_SIZE_BYTES), st.integers(0, 255)), max_size=4),
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
)
def test_calls_end_whatever_a_server_sends(
    acts: list[tuple[str, int]], changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    asyncio.run(converse(acts, changes, cuts))
