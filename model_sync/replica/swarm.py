"""Which chunk to ask of whom, when many nodes want one payload at once.

Sources only claim. Every chunk is checked against its known digest when it arrives, so a lying source costs time, never
content. Chunks that few hold come first (B. Cohen, "Incentives build robustness in BitTorrent", 2003); the origin gives
first copies, in turns that every node computes for itself, and whatever the others fail to give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

from nearcast.store.manifest import CHUNK_SIZE_BYTES

PEERS_MAX = 48
"""Peers to join to one swarm: with fewer, some nodes know no holder that has room when few hold anything yet."""
TICK_S = 0.1
"""Who drives a swarm asks for the next requests after every event, and at least this often."""


class Kind(StrEnum):
    """What a source is. Mirrors hold everything, as the origin does, but nobody spares them."""

    ORIGIN = "origin"
    MIRROR = "mirror"
    PEER = "peer"


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask `source` for one chunk; answer `arrived`, `corrupt`, `lost` or `busy`."""

    source: str
    chunk: int


@dataclass(frozen=True, slots=True)
class Look:
    """Ask `source` which chunks it holds; answer `holds`, `absent` or `lost`."""

    source: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Give up a request for a chunk; its answer would be ignored."""

    source: str
    chunk: int


Request: TypeAlias = Ask | Look | Drop


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmLimits:
    """Bounds of one download.

    Attributes:
        sources_max: sources known at a time; more are ignored.
        requests_max: chunks asked for at a time; half as many, down to requests_min, after each that timed out, as the
            bound that counts may be this node's own link.
        source_requests_max, origin_requests_max: of one peer or mirror, of the origin.
        request_timeout_s: for one chunk, and for the answer to a look.
        look_s, look_s_max: pause between two looks at one source, longer each time that nothing was new, and its bound;
            look_patience times as long while as many chunks are under way as the origin gives at a time.
        looks_max: looks at a time.
        rest_s, absent_s: mean pause after a source was busy, and after it did not know the payload at all.
        ban_base_s, ban_max_s: a source that fails is left alone for base · 2^n, a liar as if it had failed `LIE` times.
        origin_bytes: copies of one payload that all nodes together ask of the origin at once, in bytes; at least one.
        patience_s, wait_max_s: between the turns at the origin for a chunk that nobody holds, and the longest wait.
        hearing_s, heard_min: at the start the origin is spared until so many peers said what they hold, but no longer.
        stall_s: without any chunk for this long, the origin is asked for whatever is missing.
        failures_max: failures of peers on one chunk after which the origin is asked for it.
        copies_max: requests for one chunk at a time; more than one only at the end, for what is late.
        late_factor: a request is late after this many times the usual duration.
    """

    sources_max: int = 64
    requests_max: int = 10
    requests_min: int = 2
    source_requests_max: int = 2
    origin_requests_max: int = 4
    request_timeout_s: float = 20.0
    look_s: float = 0.2
    look_s_max: float = 5.0
    look_patience: float = 4.0
    looks_max: int = 8
    rest_s: float = 0.2
    absent_s: float = 2.0
    ban_base_s: float = 2.0
    ban_max_s: float = 60.0
    origin_bytes: int = 20 * 1024**2
    patience_s: float = 2.0
    wait_max_s: float = 10.0
    hearing_s: float = 0.5
    heard_min: int = 4
    stall_s: float = 5.0
    failures_max: int = 2
    copies_max: int = 2
    late_factor: float = 2.0


LIE = 3
"""A chunk that is not the promised one counts as this many failures."""


@dataclass(slots=True)
class _Source:
    kind: Kind
    holds: int = 0
    heard_at: float | None = None
    looked_at: float | None = None
    looks_in_vain: int = 0
    asked: dict[int, float] = field(default_factory=dict)
    rests_until: float = 0.0
    banned_until: float = 0.0
    failures: int = 0
    rate: float = 0.0
    is_absent: bool = False


class Swarm:
    """One download. Instants are monotonic seconds; a set of chunks is an int whose bit `i` stands for chunk `i`.

    `held` is what is here; `in_flight` counts the requests for chunks, duplicates included.

    Args:
        now: the start.
        chunks: how many the payload has; size_bytes: its size.
        held: chunks that are here and verified already.
        turns: for each chunk, how many other nodes come before this one at the origin (`turns.turns_of`).
        draw: uniform numbers in [0, 1), for ties.
    """

    def __init__(
        self,
        now: float,
        chunks: int,
        size_bytes: int,
        *,
        held: int = 0,
        turns: tuple[int, ...] = (),
        limits: SwarmLimits | None = None,
        draw: Callable[[], float],
    ) -> None:
        self.held = held
        self.in_flight = 0
        self._all = (1 << chunks) - 1
        self._began = self._progress_at = self._expired_at = now
        self._limits = limits or SwarmLimits()
        self._draw = draw
        self._turns = turns or (0,) * chunks
        self._at_once = max(1, self._limits.origin_bytes // max(1, size_bytes))
        self._size_bytes = size_bytes
        self._sources: dict[str, _Source] = {}
        self._copies = [0] * chunks
        self._requested = [0] * chunks
        self._failures = [0] * chunks
        self._asked = self._doubted = 0
        self._rate = 0.0
        self._dropped: list[Drop] = []
        self._idle_at = -math.inf
        self._width = float(self._limits.requests_max)

    @property
    def is_complete(self) -> bool:
        """Whether every chunk is here."""
        return self.held == self._all

    @property
    def banned(self) -> dict[str, float]:
        """Until when the sources that failed are left alone; past instants are over."""
        return {name: source.banned_until for name, source in self._sources.items() if source.failures}

    # What happens.

    def join(self, name: str, kind: Kind) -> None:
        """There is a source. Origin and mirrors hold everything; a peer is asked what it holds."""
        if name in self._sources or len(self._sources) >= self._limits.sources_max:
            return
        self._idle_at = -math.inf
        self._sources[name] = _Source(kind=kind, holds=self._all if kind is not Kind.PEER else 0)

    def leave(self, name: str) -> None:
        """The source is gone; what it was asked for is asked of others."""
        source = self._sources.get(name)
        if source is not None:
            self._hold(source, 0)
            for chunk in list(source.asked):
                self._end(source, chunk)
            del self._sources[name]

    def holds(self, now: float, name: str, chunks: int) -> None:
        """A peer says what it holds."""
        source = self._sources.get(name)
        if source is not None and source.kind is Kind.PEER:
            source.looks_in_vain = source.looks_in_vain + 1 if chunks & self._all == source.holds else 0
            source.heard_at, source.looked_at, source.is_absent = now, None, False
            self._hold(source, chunks & self._all)

    def absent(self, now: float, name: str) -> None:
        """A peer does not know the payload; it may later."""
        source = self._sources.get(name)
        if source is not None and source.kind is Kind.PEER:
            source.heard_at, source.looked_at, source.is_absent = now, None, True
            source.rests_until = now + self._pause(self._limits.absent_s)
            self._hold(source, 0)
            for chunk in list(source.asked):
                self._end(source, chunk)

    def arrived(self, now: float, name: str, chunk: int) -> None:
        """A chunk came and has the right digest, whoever was asked for it."""
        source = self._sources.get(name)
        began = source.asked.get(chunk) if source is not None else None
        if source is not None and began is not None:
            rate = self._chunk_bytes(chunk) / max(1e-6, now - began)
            source.rate = rate if not source.rate else 0.7 * source.rate + 0.3 * rate
            self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate
            self._end(source, chunk)
        self._width = min(self._limits.requests_max, self._width + 1.0 / self._width)
        self.held |= 1 << chunk
        self._progress_at = now
        for other, late in self._sources.items():
            if chunk in late.asked:
                self._end(late, chunk)
                self._dropped.append(Drop(other, chunk))

    def corrupt(self, now: float, name: str, chunk: int) -> None:
        """A source sent something else for that chunk."""
        self._fail(now, name, chunk, weight=LIE)

    def lost(self, now: float, name: str, chunk: int | None = None) -> None:
        """A request for a chunk, or a look, broke or took too long."""
        self._fail(now, name, chunk, weight=1)

    def busy(self, now: float, name: str, chunk: int) -> None:
        """A source is well but has no room for this request now."""
        source = self._sources.get(name)
        if source is not None:
            self._end(source, chunk)
            source.rests_until = now + self._pause(self._limits.rest_s)

    # What to do.

    def next_requests(self, now: float) -> tuple[Request, ...]:
        """What to begin and what to give up, now."""
        self._expire(now)
        out: list[Request] = [*self._dropped]
        self._dropped.clear()
        if self.in_flight >= int(self._width):
            return tuple(out)
        if now - self._idle_at >= TICK_S / 2:
            out += self._asks(now)
        if self.in_flight < int(self._width):
            out += self._looks(now)
        return tuple(out)

    def _asks(self, now: float) -> list[Ask]:
        out: list[Ask] = []
        free = {name: source for name, source in self._sources.items() if self._is_free(now, source)}
        from_origin = self._origin_offer(now) if any(s.kind is Kind.ORIGIN for s in free.values()) else 0
        while self.in_flight < int(self._width):
            ask = self._next_ask(now, free, from_origin)
            if ask is None:
                self._idle_at = now  # only an event, or time, makes a difference
                break
            out.append(ask)
            source = free[ask.source]
            self._begin(now, source, ask.chunk)
            if not self._is_free(now, source):
                del free[ask.source]
        return out

    def _next_ask(self, now: float, free: dict[str, _Source], from_origin: int) -> Ask | None:
        missing = self._all & ~self.held
        if not missing & ~self._asked:
            return self._late_ask(now, free, missing)
        offered = 0
        for source in free.values():
            offered |= from_origin if source.kind is Kind.ORIGIN else source.holds
        idle = missing & ~self._asked & offered
        choice = min(_bits(idle), key=lambda chunk: (self._copies[chunk], self._draw()), default=None)
        return None if choice is None else Ask(self._best(free, choice), choice)

    def _late_ask(self, now: float, free: dict[str, _Source], missing: int) -> Ask | None:
        """The end game: a second source for what the first one is late with, so that one slow peer delays nobody."""
        if not self._rate:
            return None
        for chunk in _bits(missing):
            asked = {name: s.asked[chunk] for name, s in self._sources.items() if chunk in s.asked}
            late_s = max(TICK_S, self._limits.late_factor * self._chunk_bytes(chunk) / self._rate)
            if len(asked) >= self._limits.copies_max or now - min(asked.values()) < late_s:
                continue
            others = {
                name: source
                for name, source in free.items()
                if source.kind is not Kind.ORIGIN and source.holds >> chunk & 1 and name not in asked
            }
            if others:
                return Ask(self._best(others, chunk), chunk)
        return None

    def _best(self, free: dict[str, _Source], chunk: int) -> str:
        """The holder that promises to be the fastest; the origin only where there is no other."""
        hopeful = max((source.rate for source in self._sources.values()), default=0.0) or 1.0

        def cost(name: str) -> tuple[bool, float]:
            source = free[name]
            expected = (len(source.asked) + 1) / (source.rate or hopeful)
            return source.kind is Kind.ORIGIN, expected * (1.0 + self._draw())

        return min((name for name, source in free.items() if source.holds >> chunk & 1), key=cost)

    def _origin_offer(self, now: float) -> int:
        """Which missing chunks the origin may be asked for: all when it is alone, else first copies in turn."""
        limits = self._limits
        others = peers = heard = absent = offered = 0
        for source in self._sources.values():
            if source.kind is Kind.PEER:
                peers += 1
                heard += source.heard_at is not None
                absent += source.is_absent
            if source.kind is not Kind.ORIGIN and now >= source.banned_until:
                others += 1
                offered |= source.holds
        if not others or now - self._progress_at >= limits.stall_s:
            return self._all
        waited = now - self._began
        if waited < limits.hearing_s and heard < min(limits.heard_min, peers):
            return 0
        # Nodes that want another version, or none, take no turn.
        turn_s = limits.patience_s * (1 + peers - absent) / (1 + peers)
        allowed = self._doubted
        for chunk in _bits(self._all & ~self.held & ~offered):
            turn = max(0, self._turns[chunk] - self._at_once + 1)
            if waited >= min(limits.wait_max_s, turn * turn_s):
                allowed |= 1 << chunk
        return allowed

    def _looks(self, now: float) -> list[Look]:
        limits = self._limits
        room = limits.looks_max - sum(source.looked_at is not None for source in self._sources.values())
        due = [
            name
            for name, source in self._sources.items()
            if source.kind is Kind.PEER
            and source.looked_at is None
            and now >= max(source.banned_until, source.rests_until if source.is_absent else 0.0)
            and (source.heard_at is None or now - source.heard_at >= self._look_pause_s(source))
            and self._all & ~self.held & ~source.holds
        ]
        due.sort(key=lambda name: (self._sources[name].heard_at or 0.0, self._draw()))
        for name in due[: max(0, room)]:
            self._sources[name].looked_at = now
        return [Look(name) for name in due[: max(0, room)]]

    def _look_pause_s(self, source: _Source) -> float:
        limits = self._limits
        factor = 1.0 if self.in_flight < limits.origin_requests_max else limits.look_patience
        return min(limits.look_s_max, limits.look_s * factor * (1.0 + source.looks_in_vain / 8))

    # Accounts.

    def _is_free(self, now: float, source: _Source) -> bool:
        if now < source.banned_until or now < source.rests_until:
            return False
        is_origin = source.kind is Kind.ORIGIN
        bound = self._limits.origin_requests_max if is_origin else self._limits.source_requests_max
        return len(source.asked) < bound

    def _hold(self, source: _Source, chunks: int) -> None:
        if source.kind is Kind.PEER and source.holds != chunks:
            self._idle_at = -math.inf
            for chunk in _bits(source.holds ^ chunks):
                self._copies[chunk] += 1 if chunks >> chunk & 1 else -1
        source.holds = chunks

    def _begin(self, now: float, source: _Source, chunk: int) -> None:
        source.asked[chunk] = now
        self.in_flight += 1
        self._requested[chunk] += 1
        self._asked |= 1 << chunk

    def _end(self, source: _Source, chunk: int) -> None:
        if source.asked.pop(chunk, None) is None:
            return
        self.in_flight -= 1
        self._idle_at = -math.inf
        self._requested[chunk] -= 1
        if not self._requested[chunk]:
            self._asked &= ~(1 << chunk)

    def _fail(self, now: float, name: str, chunk: int | None, *, weight: int) -> None:
        """Leave a source alone for a bounded time; whatever else it was asked for goes to others."""
        source = self._sources.get(name)
        if source is None:
            return
        if chunk is not None and chunk in source.asked:
            self._end(source, chunk)
            if source.kind is Kind.PEER:
                self._failures[chunk] += 1
                if self._failures[chunk] >= self._limits.failures_max:
                    self._doubted |= 1 << chunk
        source.looked_at = None
        source.failures += weight
        limits = self._limits
        ban_s = min(limits.ban_max_s, limits.ban_base_s * 2.0 ** min(source.failures - 1, 16))
        source.banned_until = now + ban_s
        for other in list(source.asked):
            self._end(source, other)
            self._dropped.append(Drop(name, other))

    def _expire(self, now: float) -> None:
        bound = self._limits.request_timeout_s
        if now - self._expired_at < TICK_S / 2:
            return
        self._expired_at = now
        for name, source in self._sources.items():
            overdue = [chunk for chunk, since in source.asked.items() if now - since >= bound]
            for chunk in overdue:
                self._dropped.append(Drop(name, chunk))
                self._fail(now, name, chunk, weight=1)
                self._width = max(self._limits.requests_min, self._width / 2)
            if source.looked_at is not None and now - source.looked_at >= bound:
                self._fail(now, name, None, weight=1)

    def _chunk_bytes(self, chunk: int) -> int:
        return min(CHUNK_SIZE_BYTES, self._size_bytes - chunk * CHUNK_SIZE_BYTES)

    def _pause(self, mean_s: float) -> float:
        return mean_s * (0.5 + self._draw())


def _bits(chunks: int) -> Iterator[int]:
    while chunks:
        low = chunks & -chunks
        yield low.bit_length() - 1
        chunks ^= low
