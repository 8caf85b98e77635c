"""What the end of an attempt teaches about its target, and about the version that it was for."""

from __future__ import annotations

from nearcast.errors import Code
from router.policy.config import PolicyConfig
from router.policy.events import FAULTS, MISPLACED, Attempt, Outcome
from router.policy.fleet import Fleet
from router.policy.health import Health
from router.policy.target import TargetState

_PUSHBACK_DEFAULT_MS = 20.0
_AWAY_DEFAULT_MS = 250.0
_MISPLACED_S = 1.0


class Learner:
    """Takes outcomes into a fleet.

    What a target says of one model holds for that model: each has a queue of its own, and what is loading or too slow
    says nothing about its neighbours. Only a broken connection is a matter of the whole target.
    """

    __slots__ = ("_fleet", "_health", "_pause_s_max")

    def __init__(self, config: PolicyConfig, fleet: Fleet, health: Health) -> None:
        self._fleet = fleet
        self._health = health
        self.configure(config)

    def configure(self, config: PolicyConfig) -> None:
        """Go on with other parameters."""
        self._pause_s_max = config.pushback_ms_max / 1e3

    def lose(self, now: float, target: TargetState) -> None:
        """The connection broke: nothing goes there until it has had time, or answers a probe."""
        if target.tier != "local":
            target.breaker.open(now)
            self._fleet.settle(now, target)

    def take_answer(self, now: float, attempt: Attempt, outcome: Outcome) -> None:
        """The target answered."""
        version = attempt.version
        target = version.target
        # What nobody waits for teaches how long it takes, and nothing else.
        counts = attempt.kind != "shadow"
        if counts:
            target.breaker.succeed()
            version.breaker.succeed()
        latency = max(0.0, now - attempt.sent_at)
        version.observe(now, latency, outcome.served, attempt.size_bytes, attempt.load_at_send)
        if counts:
            self._health.note(now, attempt, outcome)
            if attempt.trials or version.breaker.state != "closed":
                self._fleet.settle(now, target)

    def take_failure(self, now: float, attempt: Attempt, outcome: Outcome, code: Code) -> None:
        """It did not, or we gave the attempt up."""
        version = attempt.version
        target = version.target
        latency = max(0.0, now - attempt.sent_at)
        if code is Code.CANCELLED:
            if attempt.passed_delay:
                # The loser of a hedge took at least this long; without it a slow target would never look slow.
                version.sample(now, latency - target.rtt_s, attempt.size_bytes, 0.0)
            return
        if attempt.kind == "shadow":
            # Its failures must not set a target aside for users.
            return
        if code not in FAULTS or outcome.told:
            target.breaker.succeed()
        if code not in FAULTS:
            version.breaker.succeed()
        if code is Code.OVERLOADED:
            wait_s = self._pause_s(outcome, _PUSHBACK_DEFAULT_MS)
            # Who was refused for being in a hurry says nothing to those who have time.
            version.pushed_back_until = now + min(wait_s, attempt.remaining_s or wait_s)
        elif code in MISPLACED:
            version.unserved_until = now + _MISPLACED_S
        elif code is Code.UNAVAILABLE and target.tier != "local" and not (outcome.told and outcome.sent):
            version.observe_fault()
            if outcome.told:
                # It lives, and is without this model for now.
                version.unserved_until = now + self._pause_s(outcome, _AWAY_DEFAULT_MS)
            else:
                self.lose(now, target)
        elif code is Code.UNAVAILABLE or code is Code.INTERNAL or (code is Code.DEADLINE and latency > version.base95):
            # Unavailable, and told: a target that tells of somebody else's death, behind it, is not lost itself.
            version.observe_fault()
            version.breaker.fail(now, trial=version.breaker in attempt.trials)
        self._health.note(now, attempt, outcome)
        if version.breaker.state != "closed" or attempt.trials:
            self._fleet.settle(now, target)

    def _pause_s(self, outcome: Outcome, default_ms: float) -> float:
        """For how long the target wishes to be left alone, within bounds."""
        wait_ms = default_ms if outcome.retry_after_ms is None else outcome.retry_after_ms
        return min(wait_ms / 1e3, self._pause_s_max)
