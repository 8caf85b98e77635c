"""The two lanes against a model of the disk: order per stream, nothing lost, nothing twice, bounded memory.

The model keeps the one promise of the owner: operations reach the disk in order, and are told in that order.
"""

from __future__ import annotations

from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edge_node.mqtt.backlog import UNSTORED, Backlog, BacklogLimits, Row

LIMITS = BacklogLimits(live_rows_max=3, live_bytes_max=40, page_rows_max=4, page_bytes_max=1 << 20, live_share=2)
WINDOW = 3
STREAMS = st.sampled_from("abcd")


class Lanes(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.disk: dict[int, str] = {}
        self.ids = 0
        self.queue = deque()  # operations on their way to the disk
        self.told = deque()  # what the disk has done, on its way back
        self.lanes = Backlog(LIMITS)
        self.in_flight: list[Row] = []
        self.confirmed: Counter[int] = Counter()
        self.dropped: set[int] = set()
        self.handed = {}

    @rule(streams=st.lists(STREAMS, min_size=1, max_size=8), size=st.sampled_from((1, 10, 50)))
    def commit(self, streams, size):
        self.queue.extend(("add", stream, size) for stream in streams)

    @rule(count=st.integers(1, 12))
    def disk_works(self, count):
        for _ in range(min(count, len(self.queue))):
            kind, *rest = self.queue.popleft()
            if kind == "add":
                self.ids += 1
                self.disk[self.ids] = rest[0]
                self.told.append(("add", Row(self.ids, rest[0], rest[1], None)))
            elif kind == "delete":
                self.disk.pop(rest[0], None)
            elif kind == "drop":
                gone = set(sorted(self.disk)[: rest[0]])
                for row in gone:
                    del self.disk[row]
                self.dropped |= gone
                self.told.append(("drop", gone))
            else:
                after = rest[0]
                rows = [row for row in sorted(self.disk) if row > after][: LIMITS.page_rows_max]
                full = len(rows) == LIMITS.page_rows_max
                page = [Row(row, self.disk[row], 1, None) for row in rows]
                self.told.append(("read", page, rows[-1] if full else self.ids))

    @rule(count=st.integers(1, 12))
    def shell_hears(self, count):
        for _ in range(min(count, len(self.told))):
            kind, *rest = self.told.popleft()
            getattr(self.lanes, kind)(*rest)
        self.ask_for_a_page()

    def ask_for_a_page(self):
        after = self.lanes.start_reading()
        if after is not None:
            self.queue.append(("page", after))

    @rule(live_only=st.booleans(), window=st.integers(1, WINDOW))
    def send(self, live_only, window=WINDOW):
        while len(self.in_flight) < window and (row := self.lanes.next(live_only=live_only)) is not None:
            # Order: nothing of this stream that is younger was handed out before, unless a loss has undone that.
            assert row.id > self.handed.get(row.stream, 0), "out of order, or twice"
            self.handed[row.stream] = row.id
            self.in_flight.append(row)
        self.ask_for_a_page()

    @precondition(lambda self: self.in_flight)
    @rule(index=st.integers(0, WINDOW - 1))
    def confirm(self, index):
        row = self.in_flight.pop(index % len(self.in_flight))
        self.confirmed[row.id] += 1
        assert self.confirmed[row.id] == 1
        self.queue.append(("delete", row.id))

    @rule()
    def link_is_cut(self):
        for row in reversed(self.in_flight):
            earlier = [each for each in (*self.in_flight, row) if each.stream == row.stream]
            self.handed[row.stream] = min(each.id for each in earlier) - 1
        self.lanes.put_back(self.in_flight)
        self.in_flight = []

    @rule(count=st.integers(1, 3))
    def drop_oldest(self, count):
        self.queue.append(("drop", count))

    @rule()
    def restart(self):
        """What the disk has done stays, what it was asked for is lost, and so is all memory."""
        self.queue.clear()
        self.told.clear()
        self.in_flight = []
        left = {stream: row for row, stream in sorted(self.disk.items())}
        for row in self.disk:  # a confirmation that was not stored: it is sent once more
            self.confirmed.pop(row, None)
        self.handed = {
            stream: min(row for row, other in self.disk.items() if other == stream) - 1 for stream in set(left)
        } | {stream: row for stream, row in self.handed.items() if stream not in left}
        self.lanes = Backlog(LIMITS, left)

    @invariant()
    def memory_is_bounded(self):
        pages = LIMITS.page_rows_max + LIMITS.page_rows_max // 2
        assert len(self.lanes) + len(self.in_flight) <= LIMITS.live_rows_max + pages + WINDOW

    def teardown(self):
        for _ in range(10_000):
            self.disk_works(100)
            self.shell_hears(100)
            self.send(live_only=False)
            while self.in_flight:
                self.confirm(0)
            if not (self.queue or self.told or self.lanes):
                break
        assert not self.disk, "something was never sent"
        assert not self.lanes
        assert set(self.confirmed) | self.dropped == set(range(1, self.ids + 1))


Lanes.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLanes = Lanes.TestCase


def test_while_both_lanes_wait_the_live_one_gets_its_share():
    lanes = Backlog(BacklogLimits(live_share=4), {"old": 50})
    assert lanes.start_reading() == 0
    lanes.read([Row(number, "old", 1, None) for number in range(1, 51)], 50)
    for number in range(51, 91):
        lanes.add(Row(number, "new", 1, None))
    lanes.add(Row(91, "old", 1, None))
    first = [lanes.next().stream for _ in range(25)]
    assert first == ["new"] * 4 + ["old"] + (["new"] * 4 + ["old"]) * 4
    assert lanes.next(live_only=True).stream == "new"
    assert lanes.streams == 1


def test_a_stream_that_is_drained_is_live_again():
    lanes = Backlog(BacklogLimits(live_rows_max=0), {"s": 1})
    lanes.start_reading()
    lanes.read([Row(1, "s", 1, None)], 1)
    assert lanes.next().id == 1
    assert (lanes.streams, bool(lanes)) == (0, False)
    lanes.add(Row(7, "s", 1, None))
    assert (lanes.streams, lanes.start_reading()) == (1, 6)
    lanes.failed()
    assert lanes.start_reading() == 6


def test_rows_of_a_stream_in_memory_go_before_its_rows_on_disk():
    lanes = Backlog(BacklogLimits(live_rows_max=8, live_share=1))
    for number in range(1, 10):
        lanes.add(Row(number, "s", 1, None))
    assert lanes.start_reading() == 8
    lanes.read([Row(9, "s", 1, None)], 9)
    assert [lanes.next().id for _ in range(9)] == list(range(1, 10))


def test_what_two_cuts_gave_back_keeps_its_order():
    lanes = Backlog(BacklogLimits())
    for number in range(1, 7):
        lanes.add(Row(number, "s", 1, None))
    lanes.put_back([lanes.next() for _ in range(4)])
    lanes.put_back([lanes.next() for _ in range(2)])
    assert [lanes.next().id for _ in range(6)] == list(range(1, 7))


def test_refusals_that_never_end_do_not_hold_a_backlog_of_their_topic():
    lanes = Backlog(LIMITS, {"a": 1})
    lanes.start_reading()
    lanes.read([Row(1, "a", 1, None)], 1)
    handed = []
    for _ in range(8):
        lanes.add_unstored(Row(UNSTORED, "a", 1, None))
        lanes.add_unstored(Row(UNSTORED, "a", 1, None))
        handed.append(lanes.next().id)
    assert handed[LIMITS.live_share] == 1
