"""What a router believes about its targets. Claims come from reports; own measurements outrank them.

Times are seconds here. `VersionState` keeps its part of the sums ready (`base50`, `base95`, `cost`), so that a decision
only adds what depends on the request and on the present load.
"""

from __future__ import annotations

from nearcast.handler import Served
from nearcast.load import Tier, VersionReport
from router.policy.breaker import Breaker
from router.policy.config import PolicyConfig
from router.policy.window import Window

_LARGE_BYTES = 64 * 1024
_RTT_GAIN_UP = 0.125
_RTT_GAIN_DOWN = 0.3
_JITTER_GAIN = 0.25
_LOAD_GAIN = 0.3
_ERROR_GAIN = 0.3
_RATE_GAIN = 0.2
_SAMPLES_MIN = 8
_SAMPLE_PAUSE_S = 0.0005
_CLOUD_RTT_FACTOR = 10.0
_CLAIM_MAX_S = 60.0
_FLOOR_S = 1e-6


class TargetState:
    """One target: its link, its load, its connection.

    `own` counts open attempts of this router; `others` estimates the requests of everyone else; `load` is their sum.
    """

    __slots__ = (
        "breaker", "breakers", "config", "domain", "draining", "gone", "hot_above", "jitter_s", "load", "name",
        "others", "own", "penalty_s", "pushed_back_until", "reported_at", "rtt_measured", "rtt_s", "s_per_byte",
        "slots", "tier", "versions",
    )  # fmt: skip

    def __init__(self, name: str, tier: Tier, domain: str, config: PolicyConfig) -> None:
        self.name = name
        self.tier: Tier = tier
        self.domain = domain or name
        self.config = config
        self.rtt_s = 0.0
        self.s_per_byte = 0.0
        self.penalty_s = 0.0
        if tier != "local":
            self.rtt_s = config.rtt_seed_ms / 1e3 * (_CLOUD_RTT_FACTOR if tier == "cloud" else 1.0)
            self.s_per_byte = 1.0 / config.bytes_per_s_seed
            self.penalty_s = (config.cloud_penalty_ms if tier == "cloud" else config.peer_penalty_ms) / 1e3
        self.jitter_s = self.rtt_s / 4.0
        self.rtt_measured = False
        self.slots = 1
        self.own = 0
        self.others = 0.0
        self.load = 0.0
        self.hot_above = float("inf")
        self.draining = False
        self.gone = False
        self.reported_at: float | None = None
        self.pushed_back_until = 0.0
        self.breaker = make_breaker(config, failures_max=2**31)
        self.breakers: dict[str, Breaker] = {}
        self.versions: dict[tuple[str, str], VersionState] = {}

    def observe_rtt(self, sample_s: float) -> None:
        """Take a round trip of a small message (Jacobson's mean and mean deviation)."""
        if not self.rtt_measured:
            self.rtt_measured = True
            self.rtt_s, self.jitter_s = sample_s, sample_s / 4.0
            return
        error = sample_s - self.rtt_s
        # Down faster than up: a handshake or a stall must not make deadlines look impossible for long.
        self.rtt_s += (_RTT_GAIN_UP if error > 0.0 else _RTT_GAIN_DOWN) * error
        self.jitter_s += _JITTER_GAIN * (abs(error) - self.jitter_s)

    def observe_transfer(self, sample_s: float, size_bytes: int) -> None:
        """Take the network time of one exchange: a small one tells the round trip, a large one the rate.

        The first word belongs to a probe: the first requests may have waited for the connection to be made.
        """
        if not self.rtt_measured and self.tier != "local":
            return
        if size_bytes < _LARGE_BYTES:
            self.observe_rtt(sample_s)
        elif self.tier != "local":
            self.s_per_byte += _RATE_GAIN * (max(0.0, sample_s - self.rtt_s) / size_bytes - self.s_per_byte)

    def observe_others(self, sample: float) -> None:
        """Take the load that others put on this target."""
        self.others += _LOAD_GAIN * (sample - self.others)
        self.load = self.own + self.others

    def spread_factor(self, now: float) -> float:
        """How much wider the spread is taken because the report is old; 1 = fresh. Never ends dispatch."""
        if self.reported_at is None:
            return 2.0
        age_s = max(0.0, now - self.reported_at)
        return 1.0 + min(age_s * 1e3 / self.config.stale_ms, self.config.stale_widening_max)

    def breaker_of(self, model: str) -> Breaker:
        """The breaker of one model here."""
        breaker = self.breakers.get(model)
        if breaker is None:
            breaker = self.breakers[model] = make_breaker(self.config, failures_max=self.config.breaker_failures)
        return breaker


class VersionState:
    """One version of a model on one target."""

    __slots__ = (
        "base50", "base95", "breaker", "cost", "drain_s", "error", "load_s", "model", "number", "p50_claim_s",
        "p95_claim_s", "plain", "ready_at", "residency", "sampled_at", "settled_at", "stateful", "target",
        "unserved_until", "version", "window",
    )  # fmt: skip

    def __init__(self, target: TargetState, model: str, version: str) -> None:
        config = target.config
        self.target = target
        self.model = model
        self.version = version
        self.number = int(version) if version.isdecimal() else 0
        self.residency = "hot"
        self.ready_at = 0.0
        self.load_s = 0.0
        self.unserved_until = 0.0
        self.stateful = False
        self.p50_claim_s = 0.0
        self.p95_claim_s = 0.0
        self.drain_s = 0.0
        self.error = 0.0
        self.window = Window(size=config.window_size, age_max_s=config.window_age_ms_max / 1e3)
        self.breaker = target.breaker_of(model)
        self.plain = True
        self.sampled_at = self.settled_at = float("-inf")
        self.base50 = self.base95 = self.cost = 0.0

    def claim(self, now: float, report: VersionReport) -> None:
        """Take what the target says; values are bounded, whatever it says."""
        self.residency = report.residency
        eta_s = min(max(report.eta_ms, 0.0) / 1e3, _CLAIM_MAX_S)
        self.ready_at = now + eta_s
        # A cold version that says how long it takes is loaded by the first request, whenever that comes.
        self.load_s = eta_s if report.residency == "cold" else 0.0
        self.stateful = report.stateful == "hidden"
        self.p50_claim_s = min(max(report.service_p50_us, 0.0) / 1e6, _CLAIM_MAX_S)
        self.p95_claim_s = min(max(report.service_p95_us, 0.0) / 1e6, _CLAIM_MAX_S)
        if self.residency == "hot":
            self.unserved_until = 0.0

    def observe(self, now: float, latency_s: float, served: Served | None, size_bytes: int, load_at_send: int) -> None:
        """Take an answered request: service time, queue, network time and the load of others."""
        target = self.target
        if served is None or not (served.compute_us or served.queue_us):
            self.sample(now, max(latency_s - target.rtt_s, _FLOOR_S))
        else:
            self.sample(now, min(served.compute_us / 1e6, latency_s))
            target.observe_transfer(max(latency_s - (served.queue_us + served.compute_us) / 1e6, _FLOOR_S), size_bytes)
            target.observe_others(max(0.0, float(served.in_flight - load_at_send)))
            waiting = served.in_flight + 1 - target.slots
            if waiting > 0:
                # How fast the queue really moves: batching and other models' runs are in here.
                self.drain_s += _RATE_GAIN * (served.queue_us / 1e6 / waiting - self.drain_s)
        self.error *= 1.0 - _ERROR_GAIN

    def sample(self, now: float, service_s: float) -> None:
        """Take one service time; at high rates a full window takes only some of them."""
        if now - self.sampled_at >= _SAMPLE_PAUSE_S or len(self.window) < self.target.config.window_size:
            self.sampled_at = now
            self.window.add(now, service_s)

    def observe_fault(self) -> None:
        """Take a failure. Latencies of failures are not samples: who fails fast must not look fast."""
        self.error += _ERROR_GAIN * (1.0 - self.error)

    def service(self) -> tuple[float, float]:
        """Median and 95th percentile of the model time in seconds: measured here, else claimed, else a guess."""
        if len(self.window) >= _SAMPLES_MIN:
            return self.window.quantile(0.5), self.window.quantile(0.95)
        seed_s = self.target.config.service_seed_ms / 1e3
        p50 = self.p50_claim_s or self.window.quantile(0.5) or seed_s
        return p50, max(self.p95_claim_s, p50 * 2.0)

    def settle(self, now: float) -> None:
        """Bring the prepared sums up to date."""
        self.settled_at = now
        target, config = self.target, self.target.config
        p50, p95 = self.service()
        if self.drain_s <= 0.0:
            self.drain_s = p50 / target.slots
        spread = (p95 - p50 + 2.0 * target.jitter_s) * target.spread_factor(now)
        self.base50 = target.rtt_s + p50
        self.base95 = self.base50 + spread
        self.cost = (
            self.base50 + config.tail_weight * spread + target.penalty_s + self.error * config.error_penalty_ms / 1e3
        )
        self.plain = (
            not target.draining
            and not target.gone
            and self.residency == "hot"
            and now >= target.pushed_back_until
            and now >= self.unserved_until
            and self.breaker.state == "closed"
            and target.breaker.state == "closed"
        )

    def obstacle(self, now: float) -> tuple[str, float]:
        """Why this is no ordinary candidate: a reason code and seconds to wait; ("", wait) = usable after `wait`."""
        target = self.target
        if target.gone or target.draining:
            return ("draining" if target.draining else "gone"), 0.0
        if not target.breaker.admits(now):
            return "connection_lost", max(0.0, target.breaker.until - now)
        if now < target.pushed_back_until:
            return "pushed_back", target.pushed_back_until - now
        if now < self.unserved_until:
            return "not_resident", self.unserved_until - now
        delay_s = 0.0 if self.residency == "hot" else self.load_s or max(0.0, self.ready_at - now)
        if self.residency != "hot" and not delay_s:
            return "not_resident", 0.0
        if not self.breaker.admits(now):
            return "breaker_open", max(0.0, self.breaker.until - now)
        return "", delay_s


def make_breaker(config: PolicyConfig, *, failures_max: int) -> Breaker:
    """A breaker with the configured times."""
    return Breaker(
        failures_max=failures_max,
        open_s=config.breaker_open_ms / 1e3,
        open_max_s=config.breaker_open_ms_max / 1e3,
        trials_max=config.breaker_trials,
    )
