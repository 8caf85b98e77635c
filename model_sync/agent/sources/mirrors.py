"""The configured sources of one worker, asked in order of health; bad or slow ones stand behind for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from model_sync.agent.install.fetch import Remote
from model_sync.agent.sources.source import RetryLaterError, Source, asked_pause_s
from model_sync.replica.mirrors import MirrorHealth
from nearcast.errors import MeshError


class SharedHealth:
    """What all workers of one agent know about its sources, by their place; safe from any thread."""

    def __init__(self, count: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._health = MirrorHealth(count)
        self._lock = threading.Lock()
        self._now = now

    def order(self) -> tuple[int, ...]:
        """As `MirrorHealth.order`, now."""
        with self._lock:
            return self._health.order(self._now())

    def pause_s(self) -> float:
        """As `MirrorHealth.pause_s`, now."""
        with self._lock:
            return self._health.pause_s(self._now())

    def failed(self, place: int, error: MeshError) -> None:
        """As `MirrorHealth.failed`, now."""
        with self._lock:
            self._health.failed(self._now(), place, retry_s=asked_pause_s(error))

    def served(self, place: int) -> None:
        """As `MirrorHealth.served`."""
        with self._lock:
            self._health.served(place)


class Mirrors(Source):
    """Several sources as a `Supply` of chunks, and as one source for small files, which keeps to the first that works.

    Args:
        sources: best first; one worker's own.
        health: shared with the other workers of the agent.
    """

    def __init__(self, sources: Sequence[Source], health: SharedHealth) -> None:
        self._sources = tuple(sources)
        self._health = health
        self._current = self._sources[0]
        self._given_up: set[Source] = set()

    # As a source: the metadata of one check should come from one place.

    @property
    def url(self) -> str:  # type: ignore[override]
        """The source that is asked at present."""
        return self._current.url

    def attempts(self) -> Iterator[Source]:
        """Each source in turn, as the one that is asked; the caller stops at the first that satisfies it.

        Raises:
            RetryLaterError: if all of them have asked for a pause.
        """
        order = self._health.order()
        if not order:
            raise self._paused()
        for place in order:
            self._current = self._sources[place]
            yield self._current

    def get(
        self, path: str, *, start: int = 0, end: int | None = None, timeout_s: float
    ) -> tuple[int, Iterator[bytes]]:
        """As `Source.get`, of the source that is asked at present."""
        return self._current.get(path, start=start, end=end, timeout_s=timeout_s)

    def abort(self) -> None:
        """As `Source.abort`, whichever runs."""
        for source in self._sources:
            source.abort()

    def close(self) -> None:
        """As `Source.close`, all of them."""
        for source in self._sources:
            source.close()

    # As a supply of chunks.

    def begin(self, remote: Remote) -> None:
        """As `Supply.begin`."""
        del remote
        if self._health.pause_s() > 0.0:
            raise self._paused()
        self._given_up.clear()

    def next(self, remote: Remote, missing: tuple[range, ...]) -> tuple[Source, range] | None:
        """As `Supply.next`: the best source, for the first run that is missing."""
        del remote
        for place in self._health.order():
            if self._sources[place] not in self._given_up:
                return self._sources[place], missing[0]
        return None

    def served(self, source: Source, remote: Remote | None = None) -> None:
        """As `Supply.served`."""
        del remote
        self._health.served(self._sources.index(source))

    def failed(self, source: Source, remote: Remote | None, error: MeshError, *, progress: bool = False) -> None:
        """As `Supply.failed`. Who broke off after right chunks is asked again: each time fewer are missing."""
        del remote
        self._health.failed(self._sources.index(source), error)
        if not progress:
            self._given_up.add(source)

    def is_last(self, source: Source) -> bool:
        """As `Supply.is_last`."""
        return all(other is source or other in self._given_up for other in self._sources)

    def _paused(self) -> RetryLaterError:
        pause_s = self._health.pause_s()
        return RetryLaterError(f"{self.url} asked to be left alone for {pause_s:.0f} s.", retry_s=pause_s)
