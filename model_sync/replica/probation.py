"""The judgement on a version on trial, from the host's counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model_sync.replica.events import Loaded, Sampled
from model_sync.replica.state import ReplicaLimits
from nearcast.serving.statistics import quantile_of


@dataclass(slots=True, kw_only=True)
class Probation:
    """What the host had counted when the trial `began`, and what has come since.

    Attributes:
        disagreement_max: share of the shadowed inputs that may be answered otherwise; 1 = any.
        heard: whether the host answered the last time it was asked.
        asked: new requests so far.
    """

    began: Loaded = field(default_factory=lambda: Loaded(0))
    disagreement_max: float = 1.0
    heard: bool = True
    asked: int = 0

    def judge(self, now: Sampled, limits: ReplicaLimits) -> str:
        """Why the version failed, or "" so far.

        Each fault asks for a share and a number: one bad request of three condemns nothing, nor do five of a thousand.
        """
        if now.requests < self.began.requests or now.errors < self.began.errors:
            self.began = Loaded(0)  # the host was restarted
        self.asked, failed = now.requests - self.began.requests, now.errors - self.began.errors
        if failed >= limits.errors_min and failed >= limits.error_share_max * self.asked:
            return f"{failed} of {self.asked} requests failed during its probation."
        compared, disagreed = now.compared - self.began.compared, now.disagreed - self.began.disagreed
        allowed = min(self.disagreement_max, limits.disagreement_share_max)
        if compared >= limits.compared_min and disagreed > allowed * compared:
            return f"{disagreed} of {compared} inputs got another answer than before, allowed are {allowed:.0%}."
        new = {key: count - self.began.latency.get(key, 0) for key, count in now.latency.items()}
        return _judge_latency(new, now.reference, limits)


def _judge_latency(new: Mapping[str, int], reference: Mapping[str, int], limits: ReplicaLimits) -> str:
    if min(sum(new.values()), sum(reference.values())) < limits.answers_min:
        return ""
    p99_us, before_us = quantile_of(new, 0.99), quantile_of(reference, 0.99)
    if p99_us <= max(limits.p99_factor_max * before_us, before_us + limits.p99_slack_us):
        return ""
    return f"its p99 is {p99_us / 1000:.1f} ms, that of the version before was {before_us / 1000:.1f} ms."
