"""Whatever bytes come, and in whatever pieces: a server's connection refuses or answers, and never raises."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fuzz_child import Crashes, converse, make_factory
from benchmarks.fuzz_decoders import compare, feed
from benchmarks.fuzz_json import compare_json
from benchmarks.fuzz_mutations import mutate, record_http2
from benchmarks.fuzz_written import compare_written
from nearcast.errors import MeshError
from nearcast.transport.ngh2_framing import MessageReader

GOOD = record_http2()


class Server:
    """A connection's factory on a loop of its own, and what reached that loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.crashes = Crashes()
        self.loop.set_exception_handler(lambda _, context: self.crashes.note(str(context)))
        self.factory, _ = self.loop.run_until_complete(make_factory("h2"))

    def take(self, pieces: list[bytes], turns: int = 4) -> bytes:
        written = self.loop.run_until_complete(converse(self.factory, self.loop, pieces, turns=turns))
        assert self.crashes.first == []
        return written


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.loop.close()


@given(st.lists(st.binary(max_size=200), max_size=5), st.booleans())
def test_any_bytes(server: Server, pieces: list[bytes], greets: bool) -> None:
    server.take([*GOOD[0][:3], *pieces] if greets else pieces)


@given(st.integers(0, 2**32))
def test_any_mutation_of_a_good_conversation(server: Server, seed: int) -> None:
    rng = random.Random(seed)
    server.take(mutate(rng.choice(GOOD), GOOD, rng))


@given(st.sampled_from(GOOD), st.lists(st.integers(0, 2000), max_size=20))
def test_the_answers_do_not_depend_on_how_the_bytes_come(
    server: Server, conversation: list[bytes], cuts: list[int]
) -> None:
    data = b"".join(conversation)
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    pieces = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    whole, cut = server.take([data], turns=30), server.take(pieces, turns=30)
    # Window updates and the order of answers may differ; what is answered may not.
    assert (b"text" in whole) == (b"text" in cut)
    assert whole.count(b"echo") == cut.count(b"echo")


@given(st.integers(0, 2**32))
def test_messages_mean_the_same_however_they_are_read(seed: int) -> None:
    tally = compare(random.Random(seed), 10)
    assert tally.first == []
    assert compare_written(random.Random(seed), 5).first == []
    assert compare_json(random.Random(seed), 10).first == []


@given(st.binary(max_size=300))
def test_decoders_refuse_and_never_fail(data: bytes) -> None:
    feed(data)


@given(st.lists(st.binary(max_size=100), max_size=6), st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_messages_do_not_depend_on_how_the_bytes_come(messages: list[bytes], sizes: list[int]) -> None:
    data = b"".join(b"\0" + len(message).to_bytes(4, "big") + message for message in messages)
    reader, position = MessageReader(100), 0
    found: list[bytes] = []
    while position < len(data):
        size = sizes[len(found) % len(sizes)]
        found += reader.feed(data[position : position + size])
        position += size
    assert found == messages
    assert not reader.is_partial


@given(st.binary(min_size=1, max_size=60))
def test_a_reader_holds_no_more_than_it_was_given(data: bytes) -> None:
    reader = MessageReader(50)
    try:
        reader.feed(data)
    except MeshError:
        return
    assert reader.buffered_bytes <= len(data)
