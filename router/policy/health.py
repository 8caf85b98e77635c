"""What is wrong with the fleet: late tiers, slow targets, too few healthy ones, limits. Nothing here runs per decision.

Answers are noted as they come, the rest is looked at when the fleet is refreshed; what follows from it is written into
the targets and versions, where the choice reads it.
"""

from __future__ import annotations

from router.policy.candidates import Candidates
from router.policy.config import PolicyConfig
from router.policy.events import FAULTS, Attempt, Outcome
from router.policy.fleet import Fleet
from router.policy.limiter import Limiter
from router.policy.outliers import Pace, slow
from router.policy.panic import tiers_in_panic
from router.policy.state import VersionState

_SAMPLES_MIN = 16
"""Fewer say more about the requests that happened to come than about the target: a few losers of hedges, say."""


class Health:
    """The judge of one fleet."""

    __slots__ = ("_config", "_fleet", "_looked_at", "_wait_max_s", "limiters")

    def __init__(self, config: PolicyConfig, fleet: Fleet) -> None:
        self._fleet = fleet
        self._looked_at = 0.0
        self.limiters: dict[str, Limiter] = {}
        self.configure(config)

    def configure(self, config: PolicyConfig) -> None:
        """Go on with other parameters."""
        self._config = config
        self._wait_max_s = config.queue_wait_ms_max / 1e3

    def note(self, now: float, attempt: Attempt, outcome: Outcome) -> None:
        """Take the end of an attempt that was not given up. Refusals and errors of the request say nothing here."""
        failed = outcome.code is not None
        if failed and outcome.code not in FAULTS:
            return
        version = attempt.version
        target = version.target
        served = outcome.served
        slack_s = self._wait_max_s
        if attempt.remaining_s is not None:
            left_s = attempt.remaining_s - version.base95
            if left_s < slack_s:
                slack_s = left_s if left_s > 0.0 else 0.0  # noqa: FURB136 - for each request, and twice as fast
        queued_s = 0.0
        if served is not None and served.queue_us:
            queued_s = served.queue_us / 1e6
        elif attempt.load_at_send + 1.0 > target.slots and not failed:
            # Nobody said how long it queued: what is beyond the usual.
            queued_s = max(0.0, now - attempt.sent_at - version.base95)
        gate = target.gate
        useless = failed or queued_s > slack_s
        if gate is not None and gate.note(now, useless=useless, trial=gate in attempt.trials):
            self._fleet.settle_tier(now, target.tier)
        limiter = self.limiters.get(target.name) if self.limiters else None
        if limiter is None:
            if queued_s <= slack_s or failed:
                return
            limiter = self.limiters[target.name] = Limiter(max(version.base50 - target.rtt_s, 1e-6))
        if not failed:
            met = served.in_flight if served is not None else int(target.present)
            ran_s = served.compute_us / 1e6 if served is not None else version.base50 - target.rtt_s
            limiter.observe(queued_s=queued_s, ran_s=ran_s, slack_s=slack_s, in_flight=met, slots=target.slots)

    def full(self, version: VersionState) -> bool:
        """Whether a target takes no more than it has: asked only of those without a free slot."""
        target = version.target
        limiter = self.limiters.get(target.name) if self.limiters else None
        # What is believed to be there: the limit was learnt from what requests found on arrival, without the way.
        return limiter is not None and target.queue + target.slots > limiter.limit

    def refresh(self, now: float) -> None:
        """Look at everything; called as often as one likes."""
        targets = self._fleet.targets
        for name, limiter in list(self.limiters.items()):
            if name in targets:
                limiter.adapt(targets[name].slots)
            else:
                del self.limiters[name]
        is_due = now - self._looked_at >= self._config.slow_ms / 1e3
        if is_due:
            self._looked_at = now
        for index in self._fleet.models.values():
            for table in index.versions.values():
                if is_due:
                    self._set_slow_aside(now, table)
                _declare_panic(now, table)

    def _set_slow_aside(self, now: float, table: Candidates) -> None:
        seen: list[VersionState] = []
        paces: list[Pace] = []
        for version in table.versions:
            service = version.services.get(0)
            if service is not None and service.best_s and len(service.free) + len(service.busy) >= _SAMPLES_MIN:
                seen.append(version)
                aside = now < version.slow_until
                p50_s = service.p50_s
                if len(service.busy) >= _SAMPLES_MIN:
                    # Who is slow is so under load, too. Few requests find a free slot then, and losers of hedges count
                    # among them: their median alone set a healthy node aside.
                    p50_s = min(p50_s, max(service.floor_s, service.busy.quantile(0.5)))
                paces.append(Pace(tier=version.target.tier, p50_s=p50_s, best_s=service.best_s, set_aside=aside))
        config = self._config
        found = slow(paces, score_max=config.slow_score_max, share_max=config.slow_share_max) if paces else []
        for at, version in enumerate(seen):
            if version.sampled_at < version.slow_until:
                # Who was set aside is judged again by what it does afterwards.
                continue
            if at in found:
                pause_s = config.slow_ms / 1e3 * 2.0**version.relapses
                version.slow_until = now + min(pause_s, config.slow_ms_max / 1e3)
                version.relapses = min(version.relapses + 1, 30)
                version.settle(now)
            else:
                version.relapses = max(0, version.relapses - 1)


def _declare_panic(now: float, table: Candidates) -> None:
    """Where too few targets are healthy, those that were set aside are candidates like the others."""
    special = table.special
    if not special:
        return
    aside = [version for version in special.values() if _is_set_aside(now, version)]
    if not aside:
        return
    total: dict[str, int] = {}
    healthy: dict[str, int] = {}
    for version in table.versions:
        tier = version.target.tier
        total[tier] = total.get(tier, 0) + 1
        is_there = version.target.breaker.state == "closed"
        healthy[tier] = healthy.get(tier, 0) + (version.plain or (is_there and not _is_set_aside(now, version)))
    panicking = tiers_in_panic(healthy, total)
    for version in aside:
        is_free = version.target.tier in panicking
        if version.panic != is_free:
            version.panic = is_free
            version.settle(now)


def _is_set_aside(now: float, version: VersionState) -> bool:
    return version.breaker.state == "open" or now < version.slow_until
