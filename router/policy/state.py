"""What a router believes about a version on a target. Claims come from reports; own measurements outrank them.

Times are seconds here. What is believed ends up in the columns of `Candidates`, one row per version and target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearcast.handler import Served
from nearcast.load import VersionReport, read_answer_load
from router.policy.candidates import size_class
from router.policy.score import INFINITY
from router.policy.service import Service
from router.policy.target import TargetState

if TYPE_CHECKING:
    from router.policy.candidates import Candidates, Columns
    from router.policy.facts import RequestFacts

EJECTIONS = frozenset({"away", "breaker_open", "slow", "tier_open", "tier_starting"})
"""Obstacles that exist to choose another target, and do not count where there is none."""
_ERROR_GAIN = 0.3
_DRAIN_GAIN = 0.1
_DRAIN_FACTOR_MAX = 10.0
_SAMPLE_PAUSE_S = 0.0005
_CLAIM_MAX_S = 60.0
_CLAIM_TRUST = 0.5
_FLOOR_S = 1e-6
_TELL_PAUSE_S = 0.02
_UTILIZATION_MAX = 100.0
_TAIL_FACTOR = 2.0
_ONE_CLASS: tuple[tuple[int, Columns | None], ...] = ((0, None),)


class VersionState:
    """One version of a model on one target."""

    __slots__ = (
        "base50", "base95", "breaker", "candidates", "claimed", "cost", "crowding95_s", "crowding_s", "delay_s",
        "drain_factor", "drain_s", "error", "forgiven", "load_s", "model", "number", "offer_s", "own",
        "p50_claim_s", "p95_claim_s", "panic", "plain", "price", "pushed_back_until", "quality", "ready_at",
        "relapses", "residency", "row", "sampled_at", "services", "settled_at", "slow_until", "smaller", "stateful",
        "target", "told_at", "unserved_until", "version", "wait_claim_s",
    )  # fmt: skip

    def __init__(self, target: TargetState, model: str, version: str) -> None:
        self.target = target
        self.model = model
        self.version = version
        self.number = int(version) if version.isdecimal() else 0
        self.residency = "hot"
        self.ready_at = 0.0
        self.load_s = 0.0
        self.pushed_back_until = 0.0
        self.unserved_until = 0.0
        self.stateful = False
        self.p50_claim_s = 0.0
        self.p95_claim_s = 0.0
        self.wait_claim_s = 0.0
        self.told_at = -INFINITY
        self.claimed: VersionReport | None = None
        self.price = 0.0
        self.quality = 1.0
        self.offer_s = (0.0, 0.0)
        self.smaller = ""
        self.drain_s = 0.0
        self.drain_factor = 1.0
        self.crowding_s = self.crowding95_s = 0.0
        self.error = 0.0
        self.services: dict[int, Service] = {}
        self.breaker = target.breaker_of(model)
        self.plain = True
        self.panic = False
        self.slow_until = 0.0
        self.relapses = 0
        self.delay_s = 0.0
        self.forgiven = False
        self.own = 0
        self.sampled_at = self.settled_at = -INFINITY
        self.base50 = self.base95 = self.cost = 0.0
        self.candidates: Candidates | None = None
        self.row = -1

    def claim(self, now: float, report: VersionReport) -> None:
        """Take what the target says; values are bounded, whatever it says."""
        self.claimed = report
        self.residency = report.residency
        eta_s = _claimed_s(report.eta_ms * 1e3)
        self.ready_at = now + eta_s
        # A cold version that says how long it takes is loaded by the first request, whenever that comes.
        self.load_s = eta_s if report.residency == "cold" else 0.0
        self.stateful = report.stateful == "hidden"
        self.p50_claim_s = _claimed_s(report.service_p50_us)
        self.p95_claim_s = _claimed_s(report.service_p95_us)
        self.wait_claim_s = _claimed_s(report.batch_wait_us)
        self.told_at = now
        self.price = max(0.0, report.price)
        self.quality = min(1.0, max(0.0, report.quality))
        self.smaller = report.smaller
        if self.residency == "hot":
            self.unserved_until = 0.0

    def observe(self, now: float, latency_s: float, served: Served | None, size_bytes: int, present: float) -> None:
        """Take an answered request, sent when `present` of ours were believed to be there.

        The sample is the whole latency less the way and the queue, not what the target says it took.
        """
        target = self.target
        if served is not None and served.load and now - self.told_at >= _TELL_PAUSE_S:
            self.hear(now, served, present)
        away_s = target.rtt_s + size_bytes * target.s_per_byte
        if served is None or not (served.compute_us or served.queue_us):
            waited = present + max(0.0, target.others) + 1.0 - target.slots
            self.sample(now, latency_s - away_s - (waited * self.drain_s if waited > 0.0 else 0.0), size_bytes, waited)
        else:
            queued_s = served.queue_us / 1e6
            waiting = served.in_flight + 1 - target.slots
            if target.rtt_measured or target.tier == "local":
                self.sample(now, latency_s - away_s - (queued_s if waiting > 0 else 0.0), size_bytes, waiting)
            else:
                # The first requests may have waited for the connection to be made.
                self.sample(now, min(served.compute_us / 1e6, latency_s), size_bytes, waiting)
            if target.rtt_measured and target.tier != "local":
                away_s = latency_s - queued_s - served.compute_us / 1e6
                target.observe_transfer(now, max(away_s, _FLOOR_S), size_bytes)
            target.observe_others(served.in_flight - present)
            if waiting > 0 and self.drain_s > 0.0:
                # How fast the queue really moves: batching and other models' runs are in here.
                seen = self.drain_factor * queued_s / waiting / self.drain_s
                factor = self.drain_factor + _DRAIN_GAIN * (min(seen, _DRAIN_FACTOR_MAX) - self.drain_factor)
                self.drain_factor = max(1.0 / _DRAIN_FACTOR_MAX, factor)
        self.error *= 1.0 - _ERROR_GAIN

    def hear(self, now: float, served: Served, present: float) -> None:
        """Take what an answer says about its server: claims like those of a report."""
        self.told_at = now
        load = read_answer_load(served.load)
        if load.service_p50_us:
            self.p50_claim_s = _claimed_s(load.service_p50_us)
            self.p95_claim_s = _claimed_s(load.service_p95_us)
        self.wait_claim_s = _claimed_s(load.batch_wait_us)
        if load.utilization and not (served.compute_us or served.queue_us):
            # Not one of ours, which says the load that it met.
            target = self.target
            target.observe_others(min(load.utilization, _UTILIZATION_MAX) * target.slots - present)

    def sample(self, now: float, service_s: float, size_bytes: int, waiting: float) -> None:
        """Take one service time of when `waiting` more were there than slots; at high rates only some of them."""
        if now - self.sampled_at < _SAMPLE_PAUSE_S:
            return
        kind = size_class(size_bytes)
        service = self.services.get(kind)
        if service is None:
            service = self.services[kind] = Service(self.target.config)
        if service_s < _FLOOR_S:
            service_s = _FLOOR_S
        if service.add(now, service_s, waiting):
            self.settled_at = -INFINITY
        self.sampled_at = now

    def observe_fault(self) -> None:
        """Take a failure. Latencies of failures are not samples: who fails fast must not look fast."""
        self.error += _ERROR_GAIN * (1.0 - self.error)

    def prune(self, now: float) -> None:
        """Forget samples that are too old."""
        for service in self.services.values():
            service.free.prune(now)
            service.busy.prune(now)

    def estimate(self, now: float, kind: int, prior_s: float, elapsed_s: float) -> tuple[float, float]:
        """Median and 95th percentile of the model time: measured here, else claimed, else the fleet's, else a guess."""
        service = self.services.get(kind) or self._similar(kind)
        if service is None or not service.estimate(elapsed_s):
            p50 = self.p50_claim_s
            if p50 > 0.0:
                # Nobody is believed to be more than twice as fast as what others were measured at.
                p50 = max(p50, prior_s * _CLAIM_TRUST)
            else:
                p50 = prior_s or self.target.config.service_seed_ms / 1e3
            p95 = max(self.p95_claim_s, p50 * _TAIL_FACTOR)
            return p50 + self.wait_claim_s / 2.0, p95 + self.wait_claim_s + 2.0 * self.target.jitter_s
        p50, p95 = service.p50_s, service.p95_s
        if p50 < prior_s * _CLAIM_TRUST and len(service.free.ordered) < len(service.busy.ordered):
            # Measured less a queue that only the target has seen: a claim like any other.
            p50 = prior_s * _CLAIM_TRUST
            p95 = max(p95, p50)
        unsure = service.guessed or p50 > service.floor_s
        if unsure and self.own == 0 and now - self.sampled_at > self.target.forgive_s:
            # Nobody has seen it for a while: let one request see whether it is still that slow.
            idle_s, forgive_s = now - self.sampled_at, self.target.forgive_s
            keep = 0.5 ** (idle_s / forgive_s - 1.0)
            forgiven = service.floor_s + (p50 - service.floor_s) * keep
            # A spread that was measured stays as wide as that; one that was guessed is forgiven as well.
            spread_s = (p95 - p50) * keep if service.guessed else (p95 / p50 - 1.0) * forgiven
            p50, p95 = forgiven, forgiven + spread_s
            self.forgiven = True
        return p50, p95

    def _similar(self, kind: int) -> Service | None:
        """What was measured for the nearest size; None = nothing."""
        near = min(self.services, key=lambda other: (abs(other - kind), other), default=None)
        return None if near is None else self.services[near]

    def settle(self, now: float) -> None:
        """Bring this row up to date."""
        target, config, table = self.target, self.target.config, self.candidates
        self.plain = (
            not target.draining
            and not target.gone
            and self.residency == "hot"
            and now >= self.pushed_back_until
            and now >= self.unserved_until
            and self.breaker.state == "closed"
            and target.breaker.state == "closed"
            and now >= self.slow_until
            and (target.gate is None or target.gate.quiet)
        )
        self.delay_s = 0.0 if self.plain else self.delay(now)
        self.offer_s = (
            self.price * config.price_weight_ms / 1e3,
            (1.0 - self.quality) * config.quality_weight_ms / 1e3,
        )
        self.measure(now)
        if table is not None:
            table.take(self)

    def measure(self, now: float) -> None:
        """Bring up to date what answers and time alone change. Whatever else happens settles the whole row."""
        elapsed_s = now - self.settled_at
        if elapsed_s > 1.0:
            elapsed_s = 1.0
        self.settled_at = now
        self.forgiven = False
        target, table, row, delay_s = self.target, self.candidates, self.row, self.delay_s
        price_s, quality_s = self.offer_s
        # One failure is no pattern: who fails one in a hundred would lose its place for seconds each time.
        excess = self.error - _ERROR_GAIN
        error_s = excess * target.config.error_penalty_ms / 1e3 if excess > 0.0 else 0.0
        handicap_s = target.penalty_s + error_s + price_s + quality_s
        widening, tail_weight = target.spread_factor(now), target.config.tail_weight
        for kind, columns in _ONE_CLASS if table is None else table.classes.items():
            p50, p95 = self.estimate(now, kind, columns.prior_s if columns is not None else 0.0, elapsed_s)
            base50 = target.rtt_s + p50
            spread_s = (p95 - p50) * widening
            cost = base50 + tail_weight * spread_s + handicap_s
            if kind == 0:
                self.base50, self.base95, self.cost = base50, base50 + spread_s, cost
                self.drain_s = p50 / target.slots * self.drain_factor
            if columns is not None:
                columns.base50[row] = base50 + delay_s
                columns.base95[row] = base50 + spread_s + delay_s
                columns.cost[row] = cost + delay_s
        service = self.services.get(0)
        self.crowding_s, self.crowding95_s = service.crowding_s() if service is not None else (0.0, 0.0)
        if table is not None:
            table.drain[row] = self.drain_s
            table.crowding[row] = self.crowding_s
            table.crowding95[row] = self.crowding95_s
            table.s_per_byte[row] = target.s_per_byte

    def delay(self, now: float) -> float:
        """Seconds until a request could begin here; infinite if none may be sent now."""
        obstacle, delay_s = self.obstacle(now)
        return INFINITY if obstacle else delay_s

    def offers(self, facts: RequestFacts) -> bool:
        """Whether the quality is enough and the price is not too high."""
        return self.quality >= facts.quality_min and (facts.price_max is None or self.price <= facts.price_max)

    def is_stale(self, now: float) -> bool:
        """Whether neither a report nor an answer has told anything for a while."""
        heard_at = max(self.sampled_at, -INFINITY if self.target.reported_at is None else self.target.reported_at)
        return now - heard_at > self.target.config.stale_ms / 1e3

    def obstacle(self, now: float) -> tuple[str, float]:
        """Why this is no ordinary candidate: a reason code and seconds to wait; ("", wait) = usable after `wait`."""
        target = self.target
        if target.gone or target.draining:
            return ("draining" if target.draining else "gone"), 0.0
        if not target.breaker.admits(now):
            return "connection_lost", max(0.0, target.breaker.until - now)
        if now < self.pushed_back_until:
            return "pushed_back", self.pushed_back_until - now
        delay_s = 0.0 if self.residency == "hot" else self.load_s or max(0.0, self.ready_at - now)
        if self.residency != "hot" and not delay_s:
            return "not_resident", 0.0
        if now < self.unserved_until:
            return "away", self.unserved_until - now
        if not self.panic:
            if not self.breaker.admits(now):
                return "breaker_open", max(0.0, self.breaker.until - now)
            if now < self.slow_until:
                return "slow", self.slow_until - now
        if target.gate is not None and (closed := target.gate.obstacle(now)):
            return closed, max(0.0, target.gate.until - now)
        return "", delay_s


def _claimed_s(claim_us: float) -> float:
    return min(max(claim_us, 0.0) / 1e6, _CLAIM_MAX_S)
