"""Who may come into memory and who must go: a state machine over the pure decisions, and each rule by an example."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nearcast.serving.memory import Alarm, Evict, Held, Key, Load, Memory, Reason, Refuse

BUDGET, PROTECT_S = 100, 10.0
ROUNDING_S = 1e-9
MODELS = tuple((name, release) for name in "abcdef" for release in (1, 2))


def held(name: str, size_bytes: int = 40, **fields: Any) -> Held:
    return Held(key=(name, 1), size_bytes=size_bytes, **{"used_at": 0.0, "since": 0.0} | fields)


def memory(**fields: Any) -> Memory:
    return Memory(**{"bytes_max": BUDGET, "protect_s": PROTECT_S, "reloads_max": 2} | fields)


def test_the_least_recently_used_goes_and_no_more_than_needed() -> None:
    residents = [held("a", 20, used_at=3.0), held("b", used_at=1.0), held("c", used_at=2.0)]
    assert memory().demand(20.0, ("d", 1), 40, residents, "request") == (Evict(("b", 1)), Load(("d", 1)))
    large = [held("a", 10, used_at=1.0), held("b", 80, used_at=2.0)]
    assert memory().demand(20.0, ("d", 1), 60, large, "request") == (Evict(("b", 1)), Load(("d", 1)))
    assert memory().demand(20.0, ("d", 1), 10, large, "request") == (Load(("d", 1)),)


def test_fallbacks_go_first_and_never_push() -> None:
    residents = [held("a", 50, used_at=1.0), held("b", 50, used_at=9.0, fallback=True)]
    assert memory().demand(20.0, ("c", 1), 40, residents, "start") == (Evict(("b", 1)), Load(("c", 1)))
    assert memory().demand(20.0, ("c", 1), 40, residents, "fallback") == (Refuse(("c", 1), "full", PROTECT_S),)


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"leases": 1}, Refuse(("c", 1), "in_use", 0.1)),
        ({"pinned": True}, Refuse(("c", 1), "too_large", None)),
        ({"since": 15.0}, Refuse(("c", 1), "recent", 5.0)),
    ],
)
def test_what_is_used_pinned_or_new_stays(fields: dict[str, Any], refusal: Refuse) -> None:
    assert memory().demand(20.0, ("c", 1), 40, [held("a", 90, **fields)], "request") == (refusal,)


def test_a_deployment_pushes_what_is_new_but_not_what_serves_its_own_model() -> None:
    residents = [held("a", 50, used_at=1.0), held("b", 50, used_at=2.0, since=20.0)]
    assert memory().demand(20.0, ("a", 2), 50, residents, "deploy") == (Evict(("b", 1)), Load(("a", 2)))


def test_two_models_that_fit_one_at_a_time_take_turns_slowly_and_are_counted() -> None:
    decide, now, resident, loads, alarms = memory(), 0.0, ("a", 1), 0, 0
    since = now
    while now < 120.0:
        now += 0.5
        other = ("b", 1) if resident == ("a", 1) else ("a", 1)
        at = Held(key=resident, size_bytes=90, used_at=now, since=since)
        for instruction in decide.demand(now, other, 90, [at], "request"):
            match instruction:
                case Load(key):
                    assert now - since >= PROTECT_S
                    resident, since, loads = key, now, loads + 1
                case Alarm(reloads):
                    assert reloads > 2
                    alarms += 1
    assert 2 <= loads <= 120 / PROTECT_S
    assert decide.counts["reloads"] == loads - 1
    assert decide.counts["alarms"] == alarms <= 2
    assert alarms >= 1


class MemoryMachine(RuleBasedStateMachine):
    """A shell that obeys at once. Sizes are fixed per version, so what was evicted can be wanted back."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.memory = memory()
        self.held: dict[Key, Held] = {}
        self.evicted: dict[Key, float] = {}

    @rule(seconds=st.floats(0, 2 * PROTECT_S))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=st.sampled_from(MODELS), leases=st.integers(0, 2), pinned=st.booleans(), fallback=st.booleans())
    def change(self, key: Key, leases: int, *, pinned: bool, fallback: bool) -> None:
        """A request comes or goes, an operator pins, a pointer moves."""
        if (each := self.held.get(key)) is not None:
            self.held[key] = Held(
                key=key,
                size_bytes=each.size_bytes,
                used_at=self.now,
                since=each.since,
                leases=leases,
                pinned=pinned and not fallback,
                fallback=fallback,
            )

    @rule(key=st.sampled_from(MODELS), reason=st.sampled_from(["deploy", "request", "start", "fallback"]))
    def demand(self, key: Key, reason: Reason) -> None:
        if key in self.held:
            return
        before = dict(self.held)
        size_bytes = 15 + 7 * MODELS.index(key)
        instructions = self.memory.demand(self.now, key, size_bytes, tuple(self.held.values()), reason)
        loads = [each for each in instructions if isinstance(each, Load)]
        refusals = [each for each in instructions if isinstance(each, Refuse)]
        assert len(loads) + len(refusals) == 1, "one answer"
        for each in instructions:
            if isinstance(each, Evict):
                self.evict(before[each.key], key, reason)
        if loads:
            self.held[key] = Held(key=key, size_bytes=size_bytes, used_at=self.now, since=self.now)
        else:
            assert self.held == before, "who is refused sends nobody away"
            self.refused(refusals[0], key, size_bytes, reason)

    def evict(self, gone: Held, key: Key, reason: Reason) -> None:
        assert not gone.leases, "complaint: unloaded under a request"
        assert not gone.pinned
        assert reason != "fallback"
        if not gone.fallback:
            assert reason in ("request", "deploy")
            if reason == "deploy":
                assert gone.key[0] != key[0], "what serves waits for its successor"
            else:
                assert self.now - gone.since >= PROTECT_S, "evicted its evictor"
                assert self.now - self.evicted.get(key, float("-inf")) >= PROTECT_S, "came back at another's cost"
        self.evicted[gone.key] = self.now
        del self.held[gone.key]

    def refused(self, refusal: Refuse, key: Key, size_bytes: int, reason: Reason) -> None:
        free = BUDGET - sum(each.size_bytes for each in self.held.values())
        assert size_bytes > free, "there was room"
        if refusal.obstacle == "recent":
            assert refusal.retry_after_s is not None
            assert 0 < refusal.retry_after_s <= PROTECT_S + ROUNDING_S
        if refusal.obstacle == "in_use" and reason == "request":
            movable = [e for e in self.held.values() if not (e.leases or e.pinned)]
            assert size_bytes > free + sum(each.size_bytes for each in movable)

    @invariant()
    def within_the_budget(self) -> None:
        assert sum(each.size_bytes for each in self.held.values()) <= BUDGET


TestMemoryMachine = MemoryMachine.TestCase
