"""What holds for the policy whatever happens."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport, Tier, VersionReport
from router.policy import Attempt, Outcome, Policy, PolicyConfig, RequestFacts, Send, assign
from router.policy.choose import judge, wait_s

NAMES = ("local", "peer-1", "peer-2", "cloud-1", "cloud-2")
CODES = (
    None, None, None, None, Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE, Code.OVERLOADED, Code.CANCELLED,
    Code.VERSION_MISMATCH, Code.INVALID_REQUEST,
)  # fmt: skip


def tier_of(name: str) -> Tier:
    return "local" if name == "local" else "peer" if name.startswith("peer") else "cloud"


reports = st.builds(
    lambda slots, in_flight, draining, p50, factor, residency, versions: NodeReport(
        node="x",
        role="edge",
        slots=slots,
        in_flight=in_flight,
        draining=draining,
        versions=tuple(
            VersionReport(
                model="m", version=v, residency=residency, eta_ms=20.0, service_p50_us=p50, service_p95_us=p50 * factor
            )
            for v in versions
        ),
    ),
    st.integers(-1, 8),
    st.integers(-5, 50),
    st.sampled_from([False, False, False, True]),
    st.floats(0, 50_000),
    st.floats(0, 8),
    st.sampled_from(["hot", "hot", "hot", "loading", "cold"]),
    st.lists(st.sampled_from(["1", "2"]), unique=True),
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
)


class PolicyMachine(RuleBasedStateMachine):
    """Random events; the in-flight sums, the budgets, the breakers and feasibility must always hold."""

    open_attempts: Bundle[tuple[RequestFacts, Attempt]] = Bundle("open_attempts")

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        self.config = PolicyConfig(hedge_burst=3, retry_burst=4, breaker_failures=2, sequences_max=2)
        self.policy = Policy(self.config, seed)
        self.now = 0.0
        self.open: set[int] = set()
        self.first = self.hedges = self.retries = 0
        for name in NAMES[:3]:
            self.policy.add_target(0.0, name, tier_of(name))

    @rule(seconds=st.floats(0, 3))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=st.sampled_from(NAMES))
    def add(self, name: str) -> None:
        self.policy.add_target(self.now, name, tier_of(name))

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        self.policy.remove_target(self.now, name)

    @rule(name=st.sampled_from(NAMES), report=reports)
    def report(self, name: str, report: NodeReport) -> None:
        self.policy.on_report(self.now, name, report)

    @rule(name=st.sampled_from(NAMES), rtt=st.one_of(st.none(), st.floats(0, 0.5)))
    def probe(self, name: str, rtt: float | None) -> None:
        self.policy.on_probe(self.now, name, rtt)

    @rule(target=open_attempts, facts=requests)
    def send(self, facts: RequestFacts) -> tuple[RequestFacts, Attempt]:
        decision = self.policy.decide(self.now, facts)
        if not isinstance(decision, Send):
            dummy = Attempt(None, 0.0, 0, "none", 0)  # type: ignore[arg-type]
            dummy.open = False
            return facts, dummy
        self.check_feasible(facts, decision)
        self.first += 1
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
        self.hedges += 1
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
            self.retries += 1
        return facts, self.opened(self.policy.on_sent(self.now, facts, again, "retry"))

    def opened(self, attempt: Attempt) -> Attempt:
        self.open.add(id(attempt))
        return attempt

    def check_feasible(self, facts: RequestFacts, send: Send) -> None:
        """Never to a target that cannot be in time while another can (a bound sequence has no choice)."""
        limit = math.inf if facts.remaining_s is None else facts.remaining_s - self.config.reserve_ms / 1e3
        versions = [v for t in self.policy.targets for v in t.versions.values() if v.version == send.version]
        chosen = next(v for v in versions if v.target.name == send.target)
        assert not chosen.target.gone
        assert not chosen.target.draining
        assert chosen.target.breaker.state != "open"
        verdicts = {v.target.name: judge(self.now, v, facts.size_bytes, limit, "").verdict for v in versions}
        if "feasible" in verdicts.values() and send.reason != "sequence" and wait_s(chosen) < 1.9:
            assert verdicts[send.target] in ("feasible", "hot")
        if send.reason in ("late", "sequence"):
            assert verdicts[send.target] != "infeasible"

    @invariant()
    def in_flight_is_what_is_open(self) -> None:
        assert sum(t.own for t in self.policy.targets) == self.policy.outstanding == len(self.open)
        assert all(t.own >= 0 and t.load >= t.own for t in self.policy.targets)

    @invariant()
    def budgets_hold(self) -> None:
        assert self.hedges <= self.config.hedge_burst + self.config.hedge_share * self.first
        earned = self.config.retry_share * self.first + self.config.retry_per_s * self.now
        assert self.retries <= self.config.retry_burst + earned + 1e-6

    @invariant()
    def half_open_lets_few_through(self) -> None:
        for target in self.policy.targets:
            assert 0 <= target.breaker.trials <= self.config.breaker_trials
            assert all(breaker.trials >= 0 for breaker in target.breakers.values())

    @invariant()
    def sums_are_finite(self) -> None:
        for target in self.policy.targets:
            assert all(math.isfinite(x) for x in (target.load, target.rtt_s, target.jitter_s, target.s_per_byte))
            for version in target.versions.values():
                assert 0 <= version.base50 <= version.base95 < math.inf
                assert math.isfinite(version.cost)


PolicyMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestPolicyMachine = PolicyMachine.TestCase


@given(
    failures=st.lists(st.booleans(), min_size=1, max_size=60),
    trials=st.integers(1, 3),
    gaps=st.lists(st.floats(0, 1), min_size=60, max_size=60),
)
def test_half_open_breaker_admits_at_most_its_trials(failures: list[bool], trials: int, gaps: list[float]) -> None:
    from router.policy.breaker import Breaker

    breaker = Breaker(failures_max=1, open_s=0.1, open_max_s=0.4, trials_max=trials)
    breaker.open(0.0)
    now, running = 0.0, 0
    for failed, gap in zip(failures, gaps, strict=False):
        now += gap
        while breaker.state != "closed" and breaker.admits(now):
            assert breaker.start_trial()
            running += 1
            assert breaker.trials <= trials
        if running:
            breaker.end_trial()
            running -= 1
            if failed:
                breaker.fail(now)
            else:
                breaker.succeed()
        if breaker.state == "closed":
            breaker.open(now)
        assert breaker.trials == running <= trials


def build(rtts_ms: list[float], loads: list[int], seed: int) -> Policy:
    policy = Policy(PolicyConfig(), seed)
    for i, (rtt_ms, load) in enumerate(zip(rtts_ms, loads, strict=True)):
        policy.add_target(0.0, f"t{i}", "peer")
        policy.on_report(
            0.0,
            f"t{i}",
            NodeReport(
                node=f"t{i}",
                role="edge",
                slots=2,
                in_flight=load,
                versions=(VersionReport(model="m", version="1", service_p50_us=2000, service_p95_us=4000),),
            ),
        )
        policy.on_probe(0.0, f"t{i}", rtt_ms / 1e3)
    return policy


def shares(policy: Policy, draws: int) -> list[float]:
    counts: dict[str, int] = {}
    facts = RequestFacts(model="m", version="1", remaining_s=5.0)
    for _ in range(draws):
        decision = policy.decide(0.0, facts)
        assert isinstance(decision, Send)
        counts[decision.target] = counts.get(decision.target, 0) + 1
    return [counts.get(f"t{i}", 0) / draws for i in range(len(policy.targets))]


@settings(max_examples=60, deadline=None)
@given(
    rtts=st.lists(st.floats(0.2, 20), min_size=2, max_size=6),
    extra=st.floats(0, 50),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_adding_round_trip_never_gains_requests(
    rtts: list[float], extra: float, seed: int, data: st.DataObject
) -> None:
    loads = data.draw(st.lists(st.integers(0, 3), min_size=len(rtts), max_size=len(rtts)))
    which = data.draw(st.integers(0, len(rtts) - 1))
    before = shares(build(rtts, loads, seed), 400)[which]
    slower = [rtt + extra if i == which else rtt for i, rtt in enumerate(rtts)]
    after = shares(build(slower, loads, seed), 400)[which]
    assert after <= before + 0.12  # five standard deviations of 400 draws


@given(seed=st.integers(0, 2**40), steps=st.lists(st.integers(0, 5), max_size=60))
def test_same_seed_and_events_give_the_same_decisions(seed: int, steps: list[int]) -> None:
    def replay() -> list[object]:
        policy = build([1.0, 1.0, 1.1, 9.0], [0, 0, 1, 0], seed)
        facts = RequestFacts(model="m", remaining_s=0.1)
        made: list[object] = []
        for i, step in enumerate(steps):
            decision = policy.decide(i * 1e-3, facts)
            made.append(decision)
            if isinstance(decision, Send):
                attempt = policy.on_sent(i * 1e-3, facts, decision)
                if step:
                    policy.on_reply(i * 1e-3 + step * 1e-3, attempt, Outcome(served=Served(compute_us=step * 900)))
        return made

    assert replay() == replay()


@given(
    salt=st.text(max_size=20),
    tenant=st.text(max_size=10),
    key=st.text(max_size=30),
    a=st.floats(0, 1),
    b=st.floats(0, 1),
)
def test_split_is_sticky_and_only_grows(salt: str, tenant: str, key: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert assign(salt, tenant, key, low) == assign(salt, tenant, key, low)
    assert assign(salt, tenant, key, high) or not assign(salt, tenant, key, low)


@settings(max_examples=30, deadline=None)
@given(salt=st.integers(0, 10**9), share=st.floats(0.02, 0.98))
def test_split_share_is_binomial(salt: int, share: float) -> None:
    draws = 4000
    hits = sum(assign(f"rollout-{salt}", "local", f"p:{i}", share) for i in range(draws))
    # Six standard deviations: one false alarm in five hundred million.
    assert abs(hits - draws * share) <= 6 * math.sqrt(draws * share * (1 - share)) + 1
