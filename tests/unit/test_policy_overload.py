"""Tiers, outliers, panic, limits and shares: the parts of the policy that hold when something is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policy import PolicyConfig
from router.policy.limiter import LIMIT_MAX, Limiter
from router.policy.outliers import Pace, scores, slow
from router.policy.panic import tiers_in_panic
from router.policy.tenants import RANKS, Share, Tenants
from router.policy.tiers import TierGate

CONFIG = PolicyConfig(tier_trip_ms=1000, tier_open_ms=500, tier_open_ms_max=2000, tier_trials=2, tier_start_ms=800)


def note(gate: TierGate, *, until: float, useless: bool, since: float = 0.0, per_s: int = 200) -> None:
    count = int((until - since) * per_s)
    assert [gate.note(since + i / per_s, useless=useless, trial=True) for i in range(count)]


def enter(share: Share, count: int, *, rank: int = 1) -> None:
    for _ in range(count):
        share.parts[rank].enter()


def tripped() -> TierGate:
    gate = TierGate(CONFIG)
    note(gate, until=1.5, useless=True)
    assert gate.obstacle(1.5) == "tier_open"
    return gate


class TestTierGate:
    def test_a_short_spell_of_late_answers_trips_nothing(self) -> None:
        gate = TierGate(CONFIG)
        note(gate, until=0.9, useless=True)
        assert gate.obstacle(0.9) == ""
        note(gate, since=0.9, until=1.5, useless=False)
        note(gate, since=1.5, until=2.2, useless=True)
        assert gate.quiet

    def test_answers_in_time_never_trip(self) -> None:
        gate = TierGate(CONFIG)
        note(gate, until=60.0, useless=False)
        assert gate.quiet

    def test_half_open_lets_no_more_than_its_trials_through(self) -> None:
        gate = tripped()
        assert gate.obstacle(gate.until) == ""
        assert gate.start_trial()
        assert gate.obstacle(gate.until) == ""
        assert gate.start_trial()
        assert gate.obstacle(gate.until) == "tier_open"
        gate.end_trial()
        assert gate.obstacle(gate.until) == ""

    def test_a_relapse_doubles_the_time_up_to_its_bound(self) -> None:
        gate = tripped()
        first = gate.until
        pauses = []
        for _ in range(4):
            now = gate.until
            assert gate.obstacle(now) == ""
            assert gate.note(now, useless=True, trial=True)
            pauses.append(gate.until - now)
        assert pauses == pytest.approx([1.0, 2.0, 2.0, 2.0])
        assert first < gate.until

    def test_it_fills_again_step_by_step(self) -> None:
        gate = tripped()
        now = gate.until
        assert gate.obstacle(now) == ""
        assert gate.note(now, useless=False, trial=True)
        assert [gate.start_trial() for _ in range(2)] == [True, True]
        assert gate.obstacle(now) == "tier_starting"
        assert gate.obstacle(now + 0.25) == ""
        assert [gate.start_trial() for _ in range(30)]
        assert gate.obstacle(now + 0.25) == "tier_starting"
        assert gate.obstacle(now + 0.8) == ""
        assert gate.quiet
        assert not gate.start_trial()


class TestOutliers:
    def test_one_of_three_is_measured_against_the_others(self) -> None:
        paces = [Pace(tier="peer", p50_s=s, best_s=s) for s in (0.010, 0.011, 0.080)]
        assert slow(paces, score_max=6.0, share_max=0.5) == [2]

    def test_a_tier_that_is_slow_as_a_whole_has_no_outlier(self) -> None:
        paces = [Pace(tier="cloud", p50_s=0.060, best_s=0.010)] * 4
        assert slow(paces, score_max=6.0, share_max=0.5) == []

    def test_one_or_two_are_measured_against_their_own_past(self) -> None:
        paces = [Pace(tier="local", p50_s=0.1, best_s=0.01), Pace(tier="cloud", p50_s=0.03, best_s=0.03)]
        assert slow(paces, score_max=6.0, share_max=0.5) == [0]
        assert slow(paces[:1], score_max=6.0, share_max=0.5) == []  # the only one is never set aside

    def test_different_machines_are_no_outliers(self) -> None:
        paces = [Pace(tier="peer", p50_s=s, best_s=s) for s in (0.010, 0.013, 0.020, 0.025)]
        assert max(scores(paces)) < 6.0

    @given(
        st.lists(
            st.builds(
                Pace,
                tier=st.sampled_from(["local", "peer", "cloud"]),
                p50_s=st.floats(1e-4, 10),
                best_s=st.floats(1e-4, 10),
                set_aside=st.booleans(),
            ),
            max_size=12,
        ),
        st.floats(0, 1),
    )
    def test_never_more_than_the_share(self, paces: list[Pace], share: float) -> None:
        found = slow(paces, score_max=0.1, share_max=share)
        aside = sum(p.set_aside for p in paces)
        assert len(set(found)) == len(found)
        assert aside + len(found) <= max(aside, int(share * len(paces)))


class TestPanic:
    def test_a_dead_edge_beside_a_whole_cloud_stays_set_aside(self) -> None:
        assert tiers_in_panic({"local": 0, "cloud": 4}, {"local": 1, "cloud": 4}) == frozenset()

    def test_less_than_half_of_the_only_tier(self) -> None:
        assert tiers_in_panic({"peer": 1}, {"peer": 3}) == {"peer"}
        assert tiers_in_panic({"peer": 2}, {"peer": 3}) == frozenset()

    @given(st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(0, 8), st.integers(1, 8))))
    def test_a_whole_fleet_never_panics_and_a_healthy_tier_never_does(self, counts: dict[str, tuple[int, int]]) -> None:
        total = {tier: max(pair) for tier, pair in counts.items()}
        healthy = {tier: pair[0] for tier, pair in counts.items()}
        assert all(healthy[tier] * 2 < total[tier] for tier in tiers_in_panic(healthy, total))
        assert tiers_in_panic(total, total) == frozenset()


class TestLimiter:
    def test_queues_that_eat_the_time_lower_it_to_the_slots(self) -> None:
        limiter = Limiter(0.02)
        for i in range(2000):
            limiter.observe(queued_s=0.5, ran_s=0.02, slack_s=0.05, in_flight=40 if i % 9 else 0, slots=4)
            limiter.adapt(4)
        assert limiter.limit == 4.0

    def test_queues_that_requests_can_afford_never_lower_it(self) -> None:
        limiter = Limiter(0.02)
        for i in range(200):
            limiter.observe(queued_s=0.04, ran_s=0.02, slack_s=0.05, in_flight=i % 20, slots=4)
            limiter.adapt(4)
        assert limiter.limit == LIMIT_MAX

    def test_it_grows_again_only_while_it_is_used(self) -> None:
        limiter = Limiter(0.02)
        for _ in range(300):
            limiter.observe(queued_s=0.5, ran_s=0.02, slack_s=0.05, in_flight=40, slots=4)
            limiter.observe(queued_s=0.0, ran_s=0.02, slack_s=0.05, in_flight=0, slots=4)
            limiter.adapt(4)
        low = limiter.limit
        for _ in range(100):
            limiter.observe(queued_s=0.0, ran_s=0.02, slack_s=0.05, in_flight=0, slots=4)
            limiter.adapt(4)
        assert limiter.limit == low
        for _ in range(100):
            limiter.observe(queued_s=0.0, ran_s=0.02, slack_s=0.05, in_flight=int(limiter.limit) - 1, slots=4)
            limiter.adapt(4)
        assert limiter.limit > low + 2

    @given(
        st.lists(st.tuples(st.floats(0, 10), st.floats(1e-6, 10), st.floats(0, 10), st.integers(0, 500)), max_size=60),
        st.integers(1, 64),
    )
    def test_it_stays_within_its_bounds(self, seen: list[tuple[float, float, float, int]], slots: int) -> None:
        limiter = Limiter(0.02)
        for queued_s, ran_s, slack_s, in_flight in seen:
            limiter.observe(queued_s=queued_s, ran_s=ran_s, slack_s=slack_s, in_flight=in_flight, slots=slots)
            limiter.adapt(slots)
            assert slots <= limiter.limit <= LIMIT_MAX


def tenants(**wanted: int) -> dict[str, Share]:
    """Tenants of one model who each want something of a rank."""
    book = Tenants(shares_max=8, idle_s=1.0)
    return {name: book.share("m", name, rank) for name, rank in wanted.items()}


class TestTenants:
    def test_who_is_alone_may_use_everything(self) -> None:
        share = tenants(a=1)["a"]
        enter(share, 50)
        assert not share.exceeded(1)

    def test_a_flood_is_beyond_its_share_as_soon_as_somebody_else_wants_something(self) -> None:
        book = Tenants(shares_max=8, idle_s=1.0)
        flood = book.share("m", "a", 1)
        enter(flood, 50)
        quiet = book.share("m", "b", 1)
        assert flood.exceeded(1)
        assert not quiet.exceeded(1)
        assert not book.share("other", "a", 1).exceeded(1)

    def test_a_flood_of_the_lowest_class_leaves_the_highest_of_the_same_tenant_alone(self) -> None:
        flood = tenants(a=0, b=3)["a"]
        enter(flood, 50, rank=3)
        enter(flood, 3, rank=0)
        assert [flood.exceeded(rank) for rank in range(4)] == [False, False, False, True]

    def test_a_lower_class_is_no_competitor_unless_everything_is_urgent(self) -> None:
        both = tenants(ordinary=1, batch=2)
        enter(both["ordinary"], 50, rank=1)
        enter(both["batch"], 10, rank=2)
        assert not both["ordinary"].exceeded(1)
        urgent = tenants(urgent=0, batch=2)
        enter(urgent["urgent"], 50, rank=0)
        enter(urgent["batch"], 10, rank=2)
        assert urgent["urgent"].exceeded(0)

    def test_who_wants_nothing_leaves_its_part(self) -> None:
        book = Tenants(shares_max=8, idle_s=1.0)
        flood, _ = book.share("m", "a", 1), book.share("m", "b", 1)
        enter(flood, 5)
        book.sweep(1.0)
        assert flood.exceeded(1)
        book.sweep(2.0)
        assert not flood.exceeded(1)

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, RANKS - 1), st.booleans()), max_size=40))
    def test_who_wants_what_is_counted_right(self, events: list[tuple[str, int, bool]]) -> None:
        book = Tenants(shares_max=8, idle_s=0.0)
        for now, (name, rank, sweeps) in enumerate(events):
            share = book.share("m", name, rank)
            if sweeps:
                book.sweep(float(now))
            crowd = share.crowd
            ranks = [each.rank for each in crowd.tenants.values()]
            assert crowd.wanting == [sum(r <= rank for r in ranks) for rank in range(RANKS)]

    @pytest.mark.parametrize("models", [1, 100_000])
    def test_a_flood_of_names_is_bounded(self, models: int) -> None:
        book = Tenants(shares_max=100, idle_s=1.0)
        parts = [book.share(f"m{i % models}", f"t{i}", 1).parts[1] for i in range(100_000)]
        assert len(book) <= 202
        for part in parts:
            part.enter()
            part.leave()
        book.sweep(1.0)
        book.sweep(2.0)
        assert len(book) == 0
