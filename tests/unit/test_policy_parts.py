"""The small machines inside the policy, each alone."""

from __future__ import annotations

import pytest

from router.policy.breaker import Breaker
from router.policy.budget import TokenBudget
from router.policy.generator import SplitMix
from router.policy.hedge import BrownOut, Hedger, hedge_delay_s
from router.policy.sequences import Sequences
from router.policy.split import assign, sticky_key
from router.policy.window import Window


def make_breaker(**changes: float) -> Breaker:
    values = {"failures_max": 3, "open_s": 0.25, "open_max_s": 1.0, "trials_max": 1} | changes
    return Breaker(**values)  # type: ignore[arg-type]


class TestBreaker:
    def test_opens_after_consecutive_failures_only(self) -> None:
        breaker = make_breaker()
        for _ in range(5):
            breaker.fail(0.0, trial=True)
            breaker.fail(0.0, trial=True)
            breaker.succeed()
        assert breaker.state == "closed"
        for _ in range(3):
            breaker.fail(0.0, trial=True)
        assert breaker.state == "open"
        assert not breaker.admits(0.1)

    def test_half_open_admits_one_trial_and_closes_on_success(self) -> None:
        breaker = make_breaker()
        breaker.open(0.0)
        assert breaker.admits(0.25)
        assert breaker.start_trial()
        assert not breaker.admits(0.26)
        breaker.end_trial()
        breaker.succeed()
        assert breaker.state == "closed"

    def test_relapse_doubles_the_time_up_to_the_bound(self) -> None:
        breaker = make_breaker()
        now, waits = 0.0, []
        breaker.open(now)
        for _ in range(5):
            waits.append(breaker.until - now)
            now = breaker.until
            assert breaker.admits(now)
            breaker.fail(now, trial=True)
        assert waits == [0.25, 0.5, 1.0, 1.0, 1.0]

    def test_many_lost_calls_of_one_connection_count_once(self) -> None:
        breaker = make_breaker()
        for _ in range(8):
            breaker.open(0.0)
        assert breaker.until == 0.25

    def test_an_answered_probe_ends_the_wait(self) -> None:
        breaker = make_breaker()
        breaker.open(0.0)
        breaker.probe_succeeded()
        assert breaker.state == "half_open"
        assert breaker.admits(0.01)


class TestBudget:
    def test_reserve_serves_a_dying_node(self) -> None:
        budget = TokenBudget(share=0.05, burst=16)
        assert [budget.spend(0.0) for _ in range(17)] == [True] * 16 + [False]

    def test_requests_and_time_earn(self) -> None:
        budget = TokenBudget(share=0.05, burst=2, per_s=1.0)
        assert budget.spend(0.0)
        assert budget.spend(0.0)
        assert not budget.spend(0.5)
        assert budget.spend(1.01)
        for _ in range(20):
            budget.earn()
        assert budget.spend(1.01)


class TestHedging:
    def test_brownout_freezes_and_thaws(self) -> None:
        gate = BrownOut(share_max=0.2, smoothing=0.03)
        for i in range(200):
            gate.note(float(i % 20 == 0))
        assert not gate.frozen
        for _ in range(10):
            gate.note(1.0)
        assert gate.frozen
        for _ in range(50):
            gate.note(0.0)
        assert not gate.frozen

    def test_a_frozen_gate_spends_no_token(self) -> None:
        hedger = Hedger(share=0.05, burst=2, brownout_share=0.2, brownout_smoothing=1.0)
        hedger.gate("cloud").note(1.0)
        assert not hedger.take(0.0, "cloud")
        assert hedger.budget.tokens == 2
        assert hedger.take(0.0, "peer")

    def test_few_tokens_are_kept_for_the_latest(self) -> None:
        hedger = Hedger(share=0.05, burst=2, brownout_share=0.2, brownout_smoothing=0.03)
        waits = [hedger.patience]
        while hedger.take(0.0, "peer"):
            waits.append(hedger.patience)
        assert waits == [1.0, 1.125, 1.5]
        delay_s = hedge_delay_s(0.02, 0.05, 0.2, minimum_s=0.001, patience=hedger.patience)
        assert delay_s == pytest.approx(0.03)

    @pytest.mark.parametrize(
        ("t95", "second", "limit", "expected"),
        [(0.02, 0.05, 0.2, 0.02), (0.18, 0.05, 0.2, 0.15), (0.02, 0.3, 0.2, None), (0.0001, 0.05, 0.2, 0.001)],
    )
    def test_delay(self, t95: float, second: float, limit: float, expected: float | None) -> None:
        assert hedge_delay_s(t95, second, limit, minimum_s=0.001) == (
            None if expected is None else pytest.approx(expected)
        )


class TestSplit:
    def test_known_values_hold_in_every_router(self) -> None:
        # A change here would move every client of every running rollout to another version.
        drawn = "".join("x" if assign("salt-1", "local", f"p:device-{i}", 0.3) else "." for i in range(40))
        assert drawn == "....xx.x..x......x.xx....x..xxxx...xx..."

    def test_ends(self) -> None:
        assert not any(assign("s", "t", str(i), 0.0) for i in range(100))
        assert all(assign("s", "t", str(i), 1.0) for i in range(100))

    def test_fields_cannot_be_shifted_into_each_other(self) -> None:
        pairs = [(assign("ab", "c", f"{i}", 0.5), assign("a", "bc", f"{i}", 0.5)) for i in range(200)]
        assert any(a != b for a, b in pairs)

    def test_sticky_key_order(self) -> None:
        assert sticky_key(sequence="7", principal="p", request_id="r", nonce="n") == "s:7"
        assert sticky_key(sequence="", principal="p", request_id="r", nonce="n") == "p:p"
        assert sticky_key(sequence="", principal="", request_id="r", nonce="n") == "r:r"
        assert sticky_key(sequence="", principal="", request_id="", nonce="n") == "n:n"


def test_window_forgets_by_count_and_age() -> None:
    window = Window(size=4, age_max_s=10.0)
    for i in range(6):
        window.add(float(i), float(i))
    assert len(window) == 4
    assert window.quantile(0.0) == 2.0
    assert window.quantile(0.95) == 5.0
    window.prune(14.5)
    assert len(window) == 1
    window.prune(100.0)
    assert window.quantile(0.5) == 0.0


def test_sequences_are_bounded_and_forget_the_oldest() -> None:
    sequences = Sequences(2)
    sequences.bind("t", "m", "1", "a", "1")
    sequences.bind("t", "m", "2", "a", "1")
    assert sequences.get("t", "m", "1") == ("a", "1")
    sequences.bind("t", "m", "3", "b", "1")
    assert sequences.get("t", "m", "2") is None
    assert sequences.get("other", "m", "1") is None
    assert len(sequences) == 2


def test_generator_is_uniform_and_seeded() -> None:
    values = [SplitMix(7).random() for _ in range(3)]
    assert values[0] == values[1]
    generator = SplitMix(7)
    drawn = [generator.random() for _ in range(10_000)]
    assert all(0.0 <= value < 1.0 for value in drawn)
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.01
