"""One target as a router sees it: its link, its load, its connection. Times are seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nearcast.load import Tier
from router.policy.breaker import Breaker
from router.policy.config import PolicyConfig
from router.policy.score import INFINITY
from router.policy.tiers import TierGate

if TYPE_CHECKING:
    from router.policy.state import VersionState

_LARGE_BYTES = 64 * 1024
_RTT_GAIN_UP = 0.125
_RTT_GAIN_DOWN = 0.3
_JITTER_GAIN = 0.25
_LOAD_GAIN = 0.3
_RATE_GAIN = 0.2
_CLOUD_RTT_FACTOR = 10.0


class TargetState:
    """One target: its link, its load, its connection.

    `own` counts open attempts of this router, `others` estimates the requests of everyone else. `travelling` is how
    many of its own are on the way there or back and so in nobody's queue: Little's law on the round trip.
    """

    __slots__ = (
        "answered", "breaker", "breakers", "config", "domain", "draining", "forgive_s", "gate", "gone", "hot_above",
        "jitter_s", "name", "others", "own", "penalty_s", "place", "probed_at", "queues", "rate_per_s",
        "reported_at", "rtt_measured", "rtt_s", "s_per_byte", "slots", "tier", "travelling", "versions",
    )  # fmt: skip

    def __init__(
        self, name: str, tier: Tier, domain: str, config: PolicyConfig, queues: list[float], place: int
    ) -> None:
        self.name = name
        self.domain = domain or name
        self.queues = queues
        self.place = place
        self.place_in(tier, config)
        self.slots = 1
        self.own = 0
        self.others = 0.0
        self.answered = 0
        self.rate_per_s = 0.0
        self.travelling = 0.0
        self.hot_above = INFINITY
        self.draining = False
        self.gone = False
        self.reported_at: float | None = None
        self.gate: TierGate | None = None
        self.breaker = make_breaker(config, failures_max=2**31)
        self.breakers: dict[str, Breaker] = {}
        self.versions: dict[tuple[str, str], VersionState] = {}
        self.weigh()

    def place_in(self, tier: Tier, config: PolicyConfig) -> None:
        """Belong to a tier: of the way there nothing is known but a first guess."""
        self.tier: Tier = tier
        self.penalty_s = self.rtt_s = self.s_per_byte = 0.0
        self.configure(config)
        if tier != "local":
            self.rtt_s = config.rtt_seed_ms / 1e3 * (_CLOUD_RTT_FACTOR if tier == "cloud" else 1.0)
            self.s_per_byte = 1.0 / config.bytes_per_s_seed
        self.jitter_s = self.rtt_s / 4.0
        self.rtt_measured = False
        self.probed_at = -INFINITY

    def configure(self, config: PolicyConfig) -> None:
        """Go on with other parameters; what is known and measured stays."""
        self.config = config
        self.forgive_s = config.forgive_ms / 1e3
        if self.tier != "local":
            self.penalty_s = (config.cloud_penalty_ms if self.tier == "cloud" else config.peer_penalty_ms) / 1e3

    @property
    def load(self) -> float:
        """Requests believed to be on this target or on the way to and from it."""
        return self.own + max(0.0, self.others)

    @property
    def present(self) -> float:
        """Own requests believed to be at the target itself."""
        return max(0.0, self.own - self.travelling)

    @property
    def queue(self) -> float:
        """How many more requests than slots there are, one more included; negative = free slots."""
        return self.queues[self.place]

    def weigh(self) -> None:
        """Bring `queue` up to date: a request was sent or is over, or the load was seen."""
        load = self.own - self.travelling
        if load < 0.0:
            load = 0.0
        if self.others > 0.0:
            load += self.others
        self.queues[self.place] = load + 1.0 - self.slots

    def enter(self) -> float:
        """A request of ours leaves for it. Returns `present` of before."""
        present = self.own - self.travelling
        self.own += 1
        self.weigh()
        return present if present > 0.0 else 0.0  # noqa: FURB136 - for each request, and twice as fast

    def count_rate(self, elapsed_s: float) -> None:
        """See how many answers came per second, and so how many of our requests are travelling."""
        self.rate_per_s += 0.5 * (self.answered / elapsed_s - self.rate_per_s)
        self.answered = 0
        self.travelling = self.rate_per_s * self.rtt_s
        self.weigh()

    def observe_probe(self, now: float, sample_s: float) -> None:
        """Take the round trip of a probe."""
        self.probed_at = now
        self.observe_rtt(sample_s)

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

    def observe_transfer(self, now: float, sample_s: float, size_bytes: int) -> None:
        """Take the network time of one exchange: a small one tells the round trip, a large one the rate.

        The first word belongs to a probe, because the first requests may have waited for the connection to be made;
        and where probes answer, a longer round trip is believed from them alone: who says less than its true model
        time must not pass it off as distance.
        """
        if self.tier == "local" or not self.rtt_measured:
            return
        if size_bytes >= _LARGE_BYTES:
            self.s_per_byte += _RATE_GAIN * (max(0.0, sample_s - self.rtt_s) / size_bytes - self.s_per_byte)
        elif sample_s < self.rtt_s or now - self.probed_at > self.config.stale_ms / 1e3:
            self.observe_rtt(sample_s)

    def observe_others(self, sample: float) -> None:
        """Take the load that others put on this target."""
        self.others += _LOAD_GAIN * (sample - self.others)

    def spread_factor(self, now: float) -> float:
        """How much wider the spread is taken because the report is old; 1 = fresh. Never ends dispatch."""
        if self.reported_at is None:
            return 2.0
        age = (now - self.reported_at) * 1e3 / self.config.stale_ms
        if age <= 0.0:
            return 1.0
        if age > self.config.stale_widening_max:
            age = self.config.stale_widening_max
        return 1.0 + age

    def breaker_of(self, model: str) -> Breaker:
        """The breaker of one model here."""
        breaker = self.breakers.get(model)
        if breaker is None:
            if len(self.breakers) >= self.config.versions_max:
                # Requests that others forward may name anything: those that we hold nothing of go first.
                held = {version.model for version in self.versions.values()}
                self.breakers = {name: known for name, known in self.breakers.items() if name in held}
            breaker = self.breakers[model] = make_breaker(self.config, failures_max=self.config.breaker_failures)
        return breaker


def make_breaker(config: PolicyConfig, *, failures_max: int) -> Breaker:
    """A breaker with the configured times."""
    return Breaker(
        failures_max=failures_max,
        open_s=config.breaker_open_ms / 1e3,
        open_max_s=config.breaker_open_ms_max / 1e3,
        trials_max=config.breaker_trials,
    )
