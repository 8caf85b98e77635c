"""Which versions are in memory: a byte budget, the least recently used goes first, and nothing thrashes.

Pure: `(now, demand, what is held) -> instructions`. What is held is told anew each time, so no count can drift; only
who was sent away, and when, is remembered here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

Key: TypeAlias = tuple[str, int]
"""Model and release."""
Reason: TypeAlias = Literal["deploy", "request", "start", "fallback"]
"""Who wants a version: the pointer has changed to it, a request waits for it, the node fills up, it may be useful."""
Obstacle: TypeAlias = Literal["too_large", "in_use", "recent", "full"]
"""Never fits; what could go answers requests; somebody came or went too lately; others are worth as much."""

IN_USE_RETRY_S = 0.1
HISTORY_MAX = 1024
RELOAD_WINDOW_S = 60.0


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """A version that takes memory.

    Attributes:
        key: which one.
        size_bytes: what it takes.
        used_at: when a request last came, in monotonic seconds.
        since: when it became hot.
        leases: requests inside, requests waiting for it, open sequences, loading, draining. With one it stays.
        pinned: it never goes.
        fallback: no request comes here by default.
    """

    key: Key
    size_bytes: int
    used_at: float
    since: float
    leases: int = 0
    pinned: bool = False
    fallback: bool = False


class Load(msgspec.Struct, frozen=True):
    """Bring it into memory; there is room once the evictions before it are done."""

    key: Key


class Evict(msgspec.Struct, frozen=True):
    """Take it out of memory; nobody uses it."""

    key: Key


class Refuse(msgspec.Struct, frozen=True):
    """Not now. `retry_after_s` is when it may be different; None = never with this budget and these pins."""

    key: Key
    obstacle: Obstacle
    retry_after_s: float | None


class Alarm(msgspec.Struct, frozen=True):
    """So many versions came back within the last minute: the budget is too small for what is asked for."""

    reloads: int


Instruction: TypeAlias = Load | Evict | Refuse | Alarm


class Memory:
    """Decides who may come in and who must go.

    A request may send away what has been here for `protect_s`, and what was sent away comes back within `protect_s`
    into free room only. So of two models that fit one at a time each stays for a while, and none can evict its evictor.
    A deployment may send away anything that nobody uses; a start fills free room.

    Args:
        bytes_max: budget of everything held.
        protect_s: the window.
        reloads_max: how many may come back within a minute before there is an alarm.
    """

    def __init__(self, *, bytes_max: int, protect_s: float, reloads_max: int) -> None:
        self.bytes_max = bytes_max
        self._protect_s = protect_s
        self._reloads_max = reloads_max
        self._evicted: dict[Key, float] = {}
        self._reloads: deque[float] = deque(maxlen=HISTORY_MAX)
        self._alarmed_at = float("-inf")
        self.counts = {"loads": 0, "evictions": 0, "reloads": 0, "alarms": 0}
        self.refused: dict[Obstacle, int] = {}

    def demand(
        self, now: float, key: Key, size_bytes: int, held: Sequence[Held], reason: Reason
    ) -> tuple[Instruction, ...]:
        """What to do for a version that is wanted and not in memory: evictions and a `Load`, or one `Refuse`."""
        excess = sum(each.size_bytes for each in held) + size_bytes - self.bytes_max
        leaving: list[Held] = []
        if excess > 0:
            movable = [each for each in held if self._movable(now, key, each, reason)]
            leaving = _fewest(sorted(movable, key=_worth), excess)
            if sum(each.size_bytes for each in leaving) < excess:
                return (self._refuse(now, key, size_bytes, held, reason),)
        instructions: list[Instruction] = [Evict(each.key) for each in leaving]
        for each in leaving:
            self._remember(now, each.key)
        instructions += [Load(key), *self._count_load(now, key)]
        return tuple(instructions)

    def _movable(self, now: float, key: Key, each: Held, reason: Reason) -> bool:
        if each.leases or each.pinned:
            return False
        if reason == "fallback":
            return False
        if each.fallback:
            return True
        match reason:
            case "deploy":
                # What serves a model goes on serving it until its successor is there.
                return each.key[0] != key[0]
            case "request":
                return now >= self._unprotected_at(key, each)
            case _:
                return False

    def _unprotected_at(self, key: Key, each: Held) -> float:
        """When a request for `key` may send `each` away."""
        came = each.since + self._protect_s
        return max(came, self._evicted[key] + self._protect_s) if key in self._evicted else came

    def _refuse(self, now: float, key: Key, size_bytes: int, held: Sequence[Held], reason: Reason) -> Refuse:
        pinned_bytes = sum(each.size_bytes for each in held if each.pinned)
        refusal = Refuse(key, "in_use", IN_USE_RETRY_S)
        if size_bytes + pinned_bytes > self.bytes_max:
            refusal = Refuse(key, "too_large", None)
        elif reason in ("start", "fallback"):
            refusal = Refuse(key, "full", self._protect_s)
        elif reason == "request":
            times = [self._unprotected_at(key, e) for e in held if not (e.pinned or e.leases or e.fallback)]
            if later := [at - now for at in times if at > now]:
                refusal = Refuse(key, "recent", min(later))
        self.refused[refusal.obstacle] = self.refused.get(refusal.obstacle, 0) + 1
        return refusal

    def _remember(self, now: float, key: Key) -> None:
        self.counts["evictions"] += 1
        self._evicted.pop(key, None)
        self._evicted[key] = now
        if len(self._evicted) > HISTORY_MAX:
            del self._evicted[next(iter(self._evicted))]

    def _count_load(self, now: float, key: Key) -> tuple[Alarm, ...]:
        self.counts["loads"] += 1
        left = self._evicted.pop(key, None)
        if left is None or now - left > RELOAD_WINDOW_S:
            return ()
        self.counts["reloads"] += 1
        self._reloads.append(now)
        while self._reloads[0] < now - RELOAD_WINDOW_S:
            self._reloads.popleft()
        if len(self._reloads) <= self._reloads_max or now - self._alarmed_at < RELOAD_WINDOW_S:
            return ()
        self._alarmed_at = now
        self.counts["alarms"] += 1
        return (Alarm(len(self._reloads)),)


def _worth(each: Held) -> tuple[bool, float]:
    """Fallbacks go first, then what was not used for longest."""
    return not each.fallback, each.used_at


def _fewest(ordered: Sequence[Held], excess: int) -> list[Held]:
    """From the least worthy on until it is enough, without those that a later, larger one made needless."""
    taken: list[Held] = []
    for each in ordered:
        if excess <= 0:
            break
        taken.append(each)
        excess -= each.size_bytes
    for each in reversed(taken[:-1]):
        if excess + each.size_bytes <= 0:
            taken.remove(each)
            excess += each.size_bytes
    return taken
