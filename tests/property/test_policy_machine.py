"""What holds for the policy whatever happens: random calls, and after each of them

P2, P3 hedges and retries within their budgets over any window; P12 half-open breakers let few through; nothing goes to
who left, drains or is lost; what is in flight is what is outstanding.
"""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport, Residency, Tier, VersionReport
from router.policy import Attempt, Outcome, Policy, PolicyConfig, Reject, RequestFacts, Send

NAMES = ("local", "peer-1", "peer-2", "cloud-1", "cloud-2")
CODES = (
    None, None, None, None, Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE, Code.OVERLOADED, Code.CANCELLED,
    Code.VERSION_MISMATCH, Code.INVALID_REQUEST,
)  # fmt: skip
NEARLY = 1e-6


def tier_of(name: str) -> Tier:
    return "local" if name == "local" else "peer" if name.startswith("peer") else "cloud"


@st.composite
def make_report(draw: st.DrawFn) -> NodeReport:
    p50_us = draw(st.floats(0, 50_000))
    residency: Residency = draw(st.sampled_from(["hot", "hot", "hot", "loading", "cold"]))
    versions = tuple(
        VersionReport(
            model="m",
            version=version,
            residency=residency,
            eta_ms=20.0,
            service_p50_us=p50_us,
            service_p95_us=p50_us * draw(st.floats(0, 8)),
            quality=draw(st.sampled_from([1.0, 0.5])),
            price=draw(st.sampled_from([0.0, 2.0])),
        )
        for version in draw(st.lists(st.sampled_from(["1", "2"]), unique=True))
    )
    return NodeReport(
        node="x",
        role="edge",
        slots=draw(st.integers(-1, 8)),
        in_flight=draw(st.integers(-5, 50)),
        draining=draw(st.sampled_from([False, False, False, True])),
        versions=versions,
    )


requests = st.builds(
    RequestFacts,
    model=st.just("m"),
    version=st.sampled_from(["1", "2", ""]),
    fallbacks=st.sampled_from([(), ("1",)]),
    size_bytes=st.sampled_from([0, 600, 600_000]),
    remaining_s=st.one_of(st.none(), st.floats(0, 1)),
    stateful=st.booleans(),
    idempotent=st.booleans(),
    priority=st.integers(0, 3),
    sequence=st.sampled_from(["", "", "1", "2"]),
    tenant=st.sampled_from(["local", "other"]),
    quality_min=st.sampled_from([0.0, 0.0, 0.7]),
    price_max=st.sampled_from([None, None, 1.0]),
)


class Window:
    """Spent and earned: over any window, spent <= burst + earned."""

    def __init__(self, burst: float) -> None:
        self.burst = burst
        self.balance = self.least = 0.0

    def earn(self, tokens: float) -> None:
        self.balance -= tokens
        self.least = min(self.least, self.balance)

    def spend(self) -> None:
        self.balance += 1.0
        assert self.balance - self.least <= self.burst + NEARLY


class PolicyMachine(RuleBasedStateMachine):
    """Random calls."""

    open_attempts: Bundle[tuple[RequestFacts, Attempt]] = Bundle("open_attempts")

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        self.config = PolicyConfig(hedge_burst=3, retry_burst=4, breaker_failures=2, sequences_max=2)
        self.policy = Policy(self.config, seed)
        self.now = 0.0
        self.open: set[int] = set()
        self.hedges, self.retries = Window(self.config.hedge_burst), Window(self.config.retry_burst)
        for name in NAMES[:3]:
            self.policy.add_target(0.0, name, tier_of(name))

    @rule(seconds=st.floats(0, 3))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.retries.earn(self.config.retry_per_s * seconds)

    @rule(name=st.sampled_from(NAMES))
    def add(self, name: str) -> None:
        self.policy.add_target(self.now, name, tier_of(name))

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        self.policy.remove_target(self.now, name)

    @rule(name=st.sampled_from(NAMES), report=make_report())
    def report(self, name: str, report: NodeReport) -> None:
        self.policy.on_report(self.now, name, report)

    @rule(name=st.sampled_from(NAMES), rtt=st.one_of(st.none(), st.floats(0, 0.5)))
    def probe(self, name: str, rtt: float | None) -> None:
        self.policy.on_probe(self.now, name, rtt)

    @rule(target=open_attempts, facts=requests)
    def send(self, facts: RequestFacts) -> tuple[RequestFacts, Attempt]:
        decision = self.policy.decide(self.now, facts, explain=True)
        if isinstance(decision, Reject):
            nothing = Attempt(None, 0.0, 0, "none", 0, None, None)  # type: ignore[arg-type]
            nothing.open = False
            return facts, nothing
        self.check_choice(decision)
        self.hedges.earn(self.config.hedge_share)
        self.retries.earn(self.config.retry_share)
        return facts, self.opened(self.policy.on_sent(self.now, facts, decision))

    @rule(target=open_attempts, pair=open_attempts)
    def hedge(self, pair: tuple[RequestFacts, Attempt]) -> tuple[RequestFacts, Attempt]:
        facts, attempt = pair
        copy = self.policy.hedge(self.now, facts, attempt) if attempt.open else None
        if copy is None:
            return pair
        assert copy.target != attempt.target
        assert copy.version == attempt.release
        assert facts.idempotent
        assert not facts.stateful
        assert not self.policy.hedger.gate(tier_of(attempt.target)).frozen
        self.hedges.spend()
        return facts, self.opened(self.policy.on_sent(self.now, facts, copy, "hedge"))

    @rule(
        target=open_attempts,
        pair=consumes(open_attempts),
        code=st.sampled_from(CODES),
        sent=st.booleans(),
        compute_us=st.integers(0, 90_000),
        in_flight=st.integers(-3, 30),
    )
    def reply(
        self, pair: tuple[RequestFacts, Attempt], code: Code | None, sent: bool, compute_us: int, in_flight: int
    ) -> tuple[RequestFacts, Attempt]:
        facts, attempt = pair
        if not attempt.open:
            return pair
        served = Served(compute_us=compute_us, queue_us=compute_us // 2, in_flight=in_flight) if code is None else None
        outcome = Outcome(code=code, sent=sent, served=served, retry_after_ms=50 if code is Code.OVERLOADED else None)
        self.policy.on_reply(self.now, attempt, outcome)
        self.policy.on_reply(self.now, attempt, outcome)
        self.open.discard(id(attempt))
        again = self.policy.retry(self.now, facts, attempt, outcome, (attempt.target,))
        if again is None:
            return pair
        assert again.target != attempt.target or (again.version != attempt.release and code is Code.VERSION_MISMATCH)
        if sent and facts.stateful:
            assert code is Code.VERSION_MISMATCH
        if code is not Code.VERSION_MISMATCH and not (code is Code.UNAVAILABLE and not sent):
            self.retries.spend()
        return facts, self.opened(self.policy.on_sent(self.now, facts, again, "retry"))

    def opened(self, attempt: Attempt) -> Attempt:
        self.open.add(id(attempt))
        return attempt

    def check_choice(self, decision: Send) -> None:
        assert any(terms.verdict == "chosen" for terms in decision.terms)
        target = next(target for target in self.policy.targets if target.name == decision.target)
        assert not target.gone
        assert not target.draining
        assert target.breaker.state != "open"

    @invariant()
    def in_flight_is_what_is_open(self) -> None:
        assert sum(t.own for t in self.policy.targets) == self.policy.outstanding == len(self.open)
        assert all(t.own >= 0 and t.load >= t.own for t in self.policy.targets)

    @invariant()
    def half_open_lets_few_through(self) -> None:
        for target in self.policy.targets:
            assert 0 <= target.breaker.trials <= self.config.breaker_trials
            assert all(breaker.trials >= 0 for breaker in target.breakers.values())

    @invariant()
    def who_is_ordinary_has_no_obstacle(self) -> None:
        """Answers do not look at obstacles again, so whatever makes one has to settle the row itself."""
        here = (target for target in self.policy.targets if not target.gone)
        for version in (version for target in here for version in target.versions.values()):
            assert not version.plain or version.obstacle(self.now) == ("", 0.0)

    @invariant()
    def sums_are_finite(self) -> None:
        for target in self.policy.targets:
            assert all(math.isfinite(x) for x in (target.load, target.rtt_s, target.jitter_s, target.s_per_byte))
            for version in target.versions.values():
                assert 0 <= version.base50 <= version.base95 < math.inf
                assert math.isfinite(version.cost)


PolicyMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=60, deadline=None)
TestPolicyMachine = PolicyMachine.TestCase
