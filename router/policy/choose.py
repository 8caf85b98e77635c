"""The choice among candidates: constraints first, then cost, then power of two among near ties.

A full scan of expected completion times; two random choices would mostly sample far targets in a tiered fleet. The
guard against hot targets is Prequal's (Wydrowski et al., NSDI 2024), applied within a tier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from router.policy.config import PolicyConfig
from router.policy.facts import Terms
from router.policy.state import VersionState

_INFINITY = float("inf")


class Choice(NamedTuple):
    """What a scan found; times in seconds."""

    version: VersionState
    t95_s: float
    wait_s: float
    second: VersionState | None
    second_t95_s: float


class Chooser:
    """Scans candidates. `random` draws from [0, 1) and comes from a seeded generator."""

    __slots__ = ("_random", "_tie_factor", "_tie_s")

    def __init__(self, config: PolicyConfig, random: Callable[[], float]) -> None:
        self._random = random
        self._tie_factor = 1.0 + config.tie_fraction
        self._tie_s = config.tie_ms / 1e3

    def pick(
        self, now: float, candidates: Sequence[VersionState], size_bytes: int, limit_s: float, *, guard: bool = True
    ) -> Choice | None:
        """The best candidate whose 95th percentile fits `limit_s`; None if there is none.

        The loop is the hot path of the whole mesh: a decision may cost 10 µs at 8 candidates.
        """
        usable: list[VersionState] = []
        costs: list[float] = []
        t95s: list[float] = []
        best = runner_up = _INFINITY
        best_at = runner_up_at = -1
        skipped_hot = False
        for version in candidates:
            target = version.target
            extra = size_bytes * target.s_per_byte
            load = target.load
            waiting = load + 1.0 - target.slots
            if waiting > 0.0:
                extra += waiting * version.drain_s
            if not version.plain:
                obstacle, delay_s = version.obstacle(now)
                if obstacle:
                    continue
                extra += delay_s
            t95 = version.base95 + extra
            if t95 > limit_s:
                continue
            if guard and load > target.hot_above:
                skipped_hot = True
                continue
            cost = version.cost + extra
            if cost < best:
                runner_up, runner_up_at = best, best_at
                best, best_at = cost, len(usable)
            elif cost < runner_up:
                runner_up, runner_up_at = cost, len(usable)
            usable.append(version)
            costs.append(cost)
            t95s.append(t95)
        if not usable:
            return self.pick(now, candidates, size_bytes, limit_s, guard=False) if skipped_hot else None
        chosen_at = best_at
        bound = best * self._tie_factor + self._tie_s
        if runner_up <= bound:
            chosen_at = self._draw(usable, costs, bound)
        second_at = best_at if chosen_at != best_at else runner_up_at
        chosen = usable[chosen_at]
        second = usable[second_at] if second_at >= 0 else None
        return Choice(chosen, t95s[chosen_at], wait_s(chosen), second, t95s[second_at] if second is not None else 0.0)

    def pick_late(
        self, now: float, candidates: Sequence[VersionState], size_bytes: int, limit_s: float, *, panic: bool
    ) -> Choice | None:
        """The candidate with the smallest median whose median fits `limit_s`: better than refusing.

        With `panic` an open model breaker is ignored: it exists to choose another target, and there is none.
        """
        best: VersionState | None = None
        best_t50 = limit_s
        for version in candidates:
            obstacle, delay_s = version.obstacle(now)
            if obstacle and not (panic and obstacle == "breaker_open"):
                continue
            t50 = (
                version.base50
                + size_bytes * version.target.s_per_byte
                + wait_s(version)
                + (0.0 if obstacle else delay_s)
            )
            if t50 <= best_t50:
                best, best_t50 = version, t50
        return None if best is None else Choice(best, best_t50, wait_s(best), None, 0.0)

    def _draw(self, usable: list[VersionState], costs: list[float], bound: float) -> int:
        """Two of the near ties at random, the less loaded of them: nobody herds on a stale minimum."""
        ties = [i for i, cost in enumerate(costs) if cost <= bound]
        count = len(ties)
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        if second >= first:
            second += 1
        a, b = usable[ties[first]].target, usable[ties[second]].target
        return ties[first] if a.load * b.slots <= b.load * a.slots else ties[second]


def wait_s(version: VersionState) -> float:
    """Expected queue wait of one more request, in seconds."""
    target = version.target
    waiting = target.load + 1.0 - target.slots
    return waiting * version.drain_s if waiting > 0.0 else 0.0


def judge(now: float, version: VersionState, size_bytes: int, limit_s: float, chosen: str) -> Terms:
    """The terms of one candidate, for people."""
    target = version.target
    transfer = size_bytes * target.s_per_byte
    wait = wait_s(version)
    obstacle, delay_s = version.obstacle(now)
    t50 = version.base50 + transfer + wait + delay_s
    t95 = version.base95 + transfer + wait + delay_s
    if obstacle:
        verdict = obstacle
    elif t95 <= limit_s:
        verdict = "hot" if target.load > target.hot_above else "feasible"
    else:
        verdict = "late_at_p95" if t50 <= limit_s else "infeasible"
    return Terms(
        target=target.name,
        tier=target.tier,
        version=version.version,
        rtt_ms=target.rtt_s * 1e3,
        transfer_ms=transfer * 1e3,
        wait_ms=wait * 1e3,
        service_ms=(version.base50 - target.rtt_s) * 1e3,
        t50_ms=t50 * 1e3,
        t95_ms=t95 * 1e3,
        cost_ms=(version.cost + transfer + wait) * 1e3,
        load=target.load,
        verdict="chosen" if target.name == chosen else verdict,
    )
