"""The choice among candidates: constraints first, then cost, then power of two among near ties.

A full scan of expected completion times; two random choices would mostly sample far targets in a tiered fleet.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from router.policy.candidates import Candidates, size_class
from router.policy.config import PolicyConfig
from router.policy.facts import RequestFacts, Terms
from router.policy.score import INFINITY, draw, score
from router.policy.state import EJECTIONS, VersionState


class Choice(msgspec.Struct, frozen=True, gc=False):
    """What a scan found; times in seconds."""

    version: VersionState
    t95_s: float
    wait_s: float
    second: VersionState | None
    second_t95_s: float


class Chooser:
    """Scans candidates. `random` draws from [0, 1) and comes from a seeded generator."""

    __slots__ = ("_random", "_tie_fraction", "_tie_s", "_toll")

    def __init__(self, config: PolicyConfig, random: Callable[[], float]) -> None:
        self._random = random
        self.configure(config)

    def configure(self, config: PolicyConfig) -> None:
        """Go on with other parameters."""
        self._tie_fraction = config.tie_fraction
        self._tie_s = config.tie_ms / 1e3
        self._toll = config.queue_toll

    def pick(
        self,
        now: float,
        table: Candidates,
        facts: RequestFacts,
        limit_s: float,
        keep: Callable[[VersionState], bool] | None = None,
    ) -> Choice | None:
        """The best candidate whose 95th percentile fits `limit_s`; None if there is none. `keep` leaves others out.

        The hot path of the whole mesh: a decision may cost 5 µs at 8 candidates.
        """
        size = facts.size_bytes
        kind = size_class(size)
        columns = table.classes.get(kind) or table.columns(now, kind)
        if table.special:
            table.renew(now)
        base95, cost, costs = columns.base95, columns.cost, table.costs
        if facts.price_max is not None or facts.quality_min > 0.0:
            keep = _within(facts, keep)
        if keep is not None:
            base95 = table.without(base95, keep)
        queues, places, drain, crowding = table.queues, table.places, table.drain, table.crowding
        crowding95, s_per_byte, toll = table.crowding95, table.s_per_byte, self._toll
        best, second, skipped_hot = score(
            size, limit_s, toll, queues, places, base95, cost, drain, crowding, crowding95, s_per_byte,
            table.hot_above, costs,
        )  # fmt: skip
        if best < 0:
            if not skipped_hot:
                return None
            best, second, _ = score(
                size, limit_s, toll, queues, places, base95, cost, drain, crowding, crowding95, s_per_byte,
                table.never, costs,
            )  # fmt: skip
        chosen = best
        if second >= 0:
            least = costs[best]
            bound = least + (least * self._tie_fraction + self._tie_s) * table.looseness
            if costs[second] <= bound:
                chosen = draw(costs, bound, queues, places, table.slots, self._random(), self._random())
                if chosen != best:
                    second = best
        t95_s, wait_s = _t95(table, base95, chosen, size)
        versions = table.versions
        if second < 0:
            return Choice(versions[chosen], t95_s, wait_s, None, 0.0)
        return Choice(versions[chosen], t95_s, wait_s, versions[second], _t95(table, base95, second, size)[0])

    def pick_late(
        self,
        now: float,
        table: Candidates,
        facts: RequestFacts,
        limit_s: float,
        keep: Callable[[VersionState], bool] | None = None,
        *,
        panic: bool = False,
    ) -> Choice | None:
        """The candidate with the smallest median whose median fits `limit_s`: better than refusing.

        With `panic` who was set aside counts, too: that exists to choose another target, and there is none.
        """
        kind = size_class(facts.size_bytes)
        columns = table.classes.get(kind) or table.columns(now, kind)
        table.renew(now)
        keep = _within(facts, keep)
        base50 = table.without(columns.base50, keep)
        if panic:
            for row, version in table.special.items():
                if keep(version) and version.obstacle(now)[0] in EJECTIONS:
                    base50[row] = version.base50
        best, _, _ = score(
            facts.size_bytes, limit_s, 0.0, table.queues, table.places, base50, base50, table.drain, table.crowding,
            table.crowding, table.s_per_byte, table.never, table.costs,
        )  # fmt: skip
        if best < 0:
            return None
        version = table.versions[best]
        return Choice(version, table.costs[best], wait_s(version), None, 0.0)


def _t95(table: Candidates, base95: list[float], row: int, size_bytes: int) -> tuple[float, float]:
    """95th percentile of one candidate's answer, and how much of it is waiting: what `score` compared."""
    queue = table.queues[table.places[row]]
    t95_s = base95[row] + size_bytes * table.s_per_byte[row]
    if queue <= 0.0:
        return t95_s, 0.0
    wait_s = queue * table.drain[row]
    return t95_s + wait_s + table.crowding95[row], wait_s


def _within(facts: RequestFacts, keep: Callable[[VersionState], bool] | None) -> Callable[[VersionState], bool]:
    """Also within the price and the quality that the request asks for."""
    price_max = INFINITY if facts.price_max is None else facts.price_max
    quality_min = facts.quality_min

    def within(version: VersionState) -> bool:
        fits = version.price <= price_max and version.quality >= quality_min
        return fits and (keep is None or keep(version))

    return within


def wait_s(version: VersionState) -> float:
    """Expected queue wait of one more request, in seconds."""
    queue = version.target.queue
    return queue * version.drain_s if queue > 0.0 else 0.0


def judge(now: float, version: VersionState, size_bytes: int, limit_s: float, chosen: str) -> Terms:
    """The terms of one candidate, for people: by the same scoring that decides."""
    target, table, row = version.target, version.candidates, version.row
    toll = target.config.queue_toll
    if table is None or table.versions[row] is not version:
        table, row = Candidates(target.queues, [version], now), 0
    kind = size_class(size_bytes)
    columns = table.classes.get(kind) or table.columns(now, kind)
    obstacle, delay_s = version.obstacle(now)

    def total(base95: list[float], cost: list[float], crowding95: list[float], limit_s: float, toll: float) -> float:
        """What `score` says of this row alone."""
        costs = [INFINITY]
        one = slice(row, row + 1)
        score(
            size_bytes, limit_s, toll, table.queues, table.places[one], base95[one], cost[one], table.drain[one],
            crowding95[one] if cost is base95 else table.crowding[one], crowding95[one], table.s_per_byte[one],
            table.never[one], costs,
        )  # fmt: skip
        return costs[0]

    t50 = total(columns.base50, columns.base50, table.crowding, INFINITY, 0.0)
    t95 = total(columns.base95, columns.base95, table.crowding95, INFINITY, 0.0)
    cost = total(columns.base95, columns.cost, table.crowding95, limit_s, toll)
    if obstacle:
        verdict = obstacle
    elif cost < INFINITY:
        verdict = "hot" if target.queue > table.hot_above[row] else "feasible"
    else:
        verdict = "late_at_p95" if t50 <= limit_s else "infeasible"
    transfer_s = size_bytes * target.s_per_byte
    queued_s = wait_s(version) + (version.crowding_s if target.queue > 0.0 else 0.0)
    return Terms(
        target=target.name,
        tier=target.tier,
        version=version.version,
        rtt_ms=target.rtt_s * 1e3,
        transfer_ms=transfer_s * 1e3,
        wait_ms=(queued_s + delay_s) * 1e3,
        service_ms=(version.base50 - target.rtt_s) * 1e3,
        t50_ms=t50 * 1e3,
        t95_ms=t95 * 1e3,
        cost_ms=total(columns.base50, columns.cost, table.crowding, INFINITY, toll) * 1e3,
        load=target.load,
        verdict="chosen" if target.name == chosen else verdict,
        in_flight=target.own,
        slots=target.slots,
        error=version.error,
        price=version.price,
        quality=version.quality,
        report_age_ms=None if target.reported_at is None else max(0.0, now - target.reported_at) * 1e3,
    )
