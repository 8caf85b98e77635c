"""The candidates of one model version as columns of numbers, ready to be scored.

A row is one `VersionState`; what depends on the size of the request is kept once per size class. Targets settle their
rows when they learn something, so that a decision only adds what depends on the request and on the present load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from router.policy.score import INFINITY

if TYPE_CHECKING:
    from router.policy.state import VersionState

SIZE_CLASSES = 5
SMALL_BYTES = 4096
_SMALLEST_BITS = 10
_BITS_PER_CLASS = 3


def size_class(size_bytes: int) -> int:
    """Class of a request's size: below 4 KiB, 32 KiB, 256 KiB, 2 MiB, and above."""
    if size_bytes < SMALL_BYTES:
        return 0
    found = (size_bytes.bit_length() - _SMALLEST_BITS) // _BITS_PER_CLASS
    return found if found < SIZE_CLASSES else SIZE_CLASSES - 1


class Columns:
    """What depends on the size class: seconds of an idle target without the transfer. `prior_s`: the fleet's median."""

    __slots__ = ("base50", "base95", "cost", "prior_s")

    def __init__(self, count: int) -> None:
        self.base50 = [INFINITY] * count
        self.base95 = [INFINITY] * count
        self.cost = [INFINITY] * count
        self.prior_s = 0.0


class Candidates:
    """All targets that hold one version. `queues` is the fleet's and changes with every send and reply."""

    __slots__ = (
        "classes", "costs", "crowding", "crowding95", "drain", "hot_above", "looseness", "never", "places", "queues",
        "s_per_byte", "slots", "special", "versions",
    )  # fmt: skip

    def __init__(self, queues: list[float], versions: list[VersionState], now: float) -> None:
        count = len(versions)
        self.queues = queues
        self.versions = versions
        self.places = [version.target.place for version in versions]
        self.drain = [0.0] * count
        self.crowding = [0.0] * count
        self.crowding95 = [0.0] * count
        self.s_per_byte = [0.0] * count
        self.hot_above = [INFINITY] * count
        self.never = (INFINITY,) * count
        self.slots = [1.0] * count
        self.costs = [INFINITY] * count
        self.classes: dict[int, Columns] = {}
        self.special: dict[int, VersionState] = {}
        self.looseness = 1.0
        for row, version in enumerate(versions):
            version.candidates = self
            version.row = row
        self.columns(now, 0)

    def columns(self, now: float, size_class: int) -> Columns:
        """The columns of one size class; made when the first request of that size comes."""
        found = self.classes.get(size_class)
        if found is None:
            found = self.classes[size_class] = Columns(len(self.versions))
            for version in self.versions:
                version.settle(now)
        return found

    def take(self, version: VersionState) -> None:
        """What is known about the target of `version`, or whether it is usable, has changed."""
        row, target = version.row, version.target
        self.hot_above[row] = target.hot_above
        self.slots[row] = target.slots
        if not version.plain:
            self.special[row] = version
        elif row in self.special:
            del self.special[row]

    def refresh(self, now: float, forgive: float) -> None:
        """Apply what changes without events; errors keep `forgive` of their weight."""
        for kind, columns in self.classes.items():
            known = sorted(v.services[kind].p50_s for v in self.versions if kind in v.services)
            columns.prior_s = known[len(known) // 2] if known else 0.0
        stale = 0
        for version in self.versions:
            version.error *= forgive
            version.prune(now)
            version.settle(now)
            stale += version.is_stale(now)
        self.looseness = 1.0 + stale / len(self.versions)

    def renew(self, now: float) -> None:
        """Bring the rows up to date whose usability is a matter of time: cold, pushed back, half open, ..."""
        for version in list(self.special.values()):
            if version.delay(now) != version.delay_s:
                version.settle(now)

    def without(self, base: list[float], keep: Callable[[VersionState], bool]) -> list[float]:
        """The column `base` in which only the candidates to `keep` are finite."""
        return [value if keep(version) else INFINITY for value, version in zip(base, self.versions, strict=True)]
