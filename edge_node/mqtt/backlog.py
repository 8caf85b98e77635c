"""Two lanes for rows that are on disk: what is new goes first, what could not be kept in memory follows. Pure.

A stream with a row on disk that is not in memory is *in the backlog* until the last such row was handed out; its new
rows queue behind on disk, so its order holds. Every other stream is *live*: its rows are handed out from memory, and
before the backlog's: `live_share` of them for each one of the backlog while both wait.

The disk is read in pages, in the order of the row ids. Its owner keeps one promise: a row is added here before a page
that may contain it arrives. So whatever a page brings is known, and a row that was live once is never taken again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
UNSTORED = 0
"""The id of what has no row on disk."""


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """One stored row. Ids grow in the order of the commits."""

    id: int
    stream: str
    size_bytes: int
    item: T


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogLimits:
    """Bounds of what is kept in memory.

    Attributes:
        live_rows_max, live_bytes_max: of live streams; a row beyond it puts its stream into the backlog.
        page_rows_max, page_bytes_max: read from disk at once; at most another half of it waits then.
        live_share: live rows for each row of the backlog while both wait.
    """

    live_rows_max: int = 1024
    live_bytes_max: int = 4 * 1024 * 1024
    page_rows_max: int = 128
    page_bytes_max: int = 1024 * 1024
    live_share: int = 4


@dataclass(slots=True)
class _Span:
    """The rows of a stream in the backlog: `first` came when memory was full, `last` is the newest so far."""

    first: int
    last: int


class Backlog(Generic[T]):
    """The lanes of one consumer of rows.

    Args:
        limits: bounds.
        left: the last row of each stream that a former life left on disk.
    """

    def __init__(self, limits: BacklogLimits, left: Mapping[str, int] | None = None) -> None:
        self._limits = limits
        self._spans = {stream: _Span(0, last) for stream, last in (left or {}).items()}
        self._last = max((left or {}).values(), default=0)
        self._cursor = 0
        self._returned: deque[Row[T]] = deque()
        self._live: deque[Row[T]] = deque()
        self._live_bytes = 0
        self._live_rows: Counter[str] = Counter()
        self._page: deque[Row[T]] = deque()
        self._page_rows: Counter[str] = Counter()
        self._reading = False
        self._turn = 0
        self.was_behind = False
        """Whether the row that was handed out last came from the backlog."""

    def __len__(self) -> int:
        """Rows in memory."""
        return len(self._returned) + len(self._live) + len(self._page)

    def __bool__(self) -> bool:
        """Whether anything waits, in memory or on disk."""
        return bool(self._spans) or len(self) > 0

    @property
    def has_page(self) -> bool:
        """Whether rows of the backlog are in memory."""
        return bool(self._page)

    @property
    def live_bytes(self) -> int:
        """What the rows of live streams take, and those that are in memory only."""
        return self._live_bytes

    @property
    def streams(self) -> int:
        """Streams in the backlog."""
        return len(self._spans)

    def add(self, row: Row[T]) -> None:
        """A row was committed. It is kept if its stream is live and there is room, else it will be read again."""
        span = self._spans.get(row.stream)
        if span is None and self._has_room(row.size_bytes):
            self._live_rows[row.stream] += 1
            self.add_unstored(row)
            return
        if span is not None:
            span.last = row.id
        else:
            if not self._spans and not self._reading:
                self._cursor = row.id - 1  # everything before it is, or was, in memory
            self._spans[row.stream] = _Span(row.id, row.id)
        self._last = row.id

    def add_unstored(self, row: Row[T]) -> None:
        """A row that is in memory only, outside of every order; its owner bounds how many there are."""
        self._live.append(row)
        self._live_bytes += row.size_bytes

    def next(self, *, live_only: bool = False) -> Row[T] | None:
        """Hand out the next row; None if none is in memory. With `live_only` the backlog has to wait."""
        self.was_behind = False
        if self._returned:
            return self._returned.popleft()
        ready = bool(self._page) and not live_only and self._page[0].stream not in self._live_rows
        if self._live and not (ready and self._turn >= self._limits.live_share):
            self._turn += ready
            return self._pop_live()
        return self._pop_page() if ready else None

    def put_back(self, rows: Iterable[Row[T]]) -> None:
        """Rows that were handed out have to be handed out again, in this order and before all others."""
        self._returned.extendleft(reversed(list(rows)))

    def start_reading(self) -> int | None:
        """The row behind which to read a page now; None if there is no need. `read` must follow."""
        if self._reading or self._cursor >= self._last or 2 * len(self._page) > self._limits.page_rows_max:
            return None
        self._reading = True
        return self._cursor

    def read(self, rows: Iterable[Row[T]], through: int) -> None:
        """A page arrived: `rows` are all there are behind the former cursor and up to `through`."""
        self._reading = False
        self._cursor = through
        for row in rows:
            span = self._spans.get(row.stream)
            if span is not None and row.id >= span.first:
                self._page.append(row)
                self._page_rows[row.stream] += 1
        if self._cursor >= self._last:  # streams whose rows were dropped from the disk end here too
            self._spans = {stream: span for stream, span in self._spans.items() if stream in self._page_rows}

    def failed(self) -> None:
        """The page could not be read."""
        self._reading = False

    def drop(self, rows: Collection[int]) -> None:
        """Rows are gone from the disk: none of them is handed out any more."""
        kept = [row for row in self._live if row.id not in rows]
        self._live, self._live_rows = deque(kept), Counter(row.stream for row in kept if row.id != UNSTORED)
        self._live_bytes = sum(row.size_bytes for row in kept)
        paged = [row for row in self._page if row.id not in rows]
        self._page, self._page_rows = deque(paged), Counter(row.stream for row in paged)
        self._returned = deque(row for row in self._returned if row.id not in rows)
        for stream, span in list(self._spans.items()):
            self._leave(stream, span)

    def _has_room(self, size_bytes: int) -> bool:
        limits = self._limits
        return len(self._live) < limits.live_rows_max and self._live_bytes + size_bytes <= limits.live_bytes_max

    def _pop_live(self) -> Row[T]:
        row = self._live.popleft()
        self._live_bytes -= row.size_bytes
        if row.id != UNSTORED:
            _decrement(self._live_rows, row.stream)
        return row

    def _pop_page(self) -> Row[T]:
        self._turn = 0
        self.was_behind = True
        row = self._page.popleft()
        _decrement(self._page_rows, row.stream)
        self._leave(row.stream, self._spans[row.stream])
        return row

    def _leave(self, stream: str, span: _Span) -> None:
        """A stream without rows that are only on disk is live again."""
        if span.last <= self._cursor and stream not in self._page_rows:
            del self._spans[stream]


def _decrement(counts: Counter[str], key: str) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
