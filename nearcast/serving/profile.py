"""What runs of one model cost on one machine, and the settings that follow.

Pure: `nearcast.serving.tuning` measures and keeps profiles, this decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from nearcast.store.manifest import Sha256

POINTS_MAX = 256
NEAR_TIE = 0.05
"""Settings this close are as good as each other; then the smaller one wins, which leaves more to others."""

Count = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
Microseconds = Annotated[float, msgspec.Meta(gt=0)]


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to run a version: threads of one engine run, rows of one batch at most."""

    threads: Count
    rows_max: Count


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One setting, measured while as many runs went on at once as the node allows. Times are of a whole run."""

    threads: Count
    rows: Count
    p50_us: Microseconds
    p95_us: Microseconds
    rows_per_s: Annotated[float, msgspec.Meta(gt=0)]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All points of one model file on one kind of machine.

    Attributes:
        model_sha256: of the model file.
        engine: what runs it, with its version: another one may be faster in other places.
        processor: the machine's, by name and count.
        concurrency: runs at the same time while this was measured.
        latency_budget_ms: the manifest's; no batch is chosen that takes longer.
    """

    schema: Literal[1] = 1
    model_sha256: Sha256
    engine: str
    engine_version: str
    processor: str
    concurrency: Count
    latency_budget_ms: Annotated[float, msgspec.Meta(gt=0)]
    points: Annotated[tuple[Point, ...], msgspec.Meta(min_length=1, max_length=POINTS_MAX)]

    def choose(self) -> Setting:
        """The setting for this machine under this concurrency."""
        threads = choose_threads(self.points)
        budget_us = self.latency_budget_ms * 1e3
        return Setting(threads=threads, rows_max=choose_rows(self.points, threads, budget_us=budget_us))


def choose_threads(points: Sequence[Point]) -> int:
    """The fewest threads whose single runs end about as soon as the soonest, by their 95th percentile.

    With several runs at once more threads often lose: they wait for each other's cores.
    """
    singles = [point for point in points if point.rows == 1] or list(points)
    soonest_us = min(point.p95_us for point in singles)
    return min(point.threads for point in singles if point.p95_us <= soonest_us * (1 + NEAR_TIE))


def choose_rows(points: Sequence[Point], threads: int, *, budget_us: float) -> int:
    """The fewest rows whose batches bring about as many rows a second as the best that stay within the budget."""
    mine = [point for point in points if point.threads == threads]
    fitting = [point for point in mine if point.rows == 1 or point.p95_us <= budget_us]
    if not fitting:
        return 1
    best = max(point.rows_per_s for point in fitting)
    return min(point.rows for point in fitting if point.rows_per_s >= best / (1 + NEAR_TIE))
