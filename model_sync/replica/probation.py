"""The judgement on a version on trial, from the host's counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from model_sync.replica.state import ReplicaLimits
from nearcast.serving.statistics import quantile_of


@dataclass(slots=True, kw_only=True)
class Probation:
    """What the host had counted when the trial began, and what has come since.

    Attributes:
        heard: whether the host answered the last time it was asked.
        asked: new requests so far.
    """

    requests: int = 0
    errors: int = 0
    latency: Mapping[str, int] = field(default_factory=dict)
    compared: int = 0
    disagreed: int = 0
    heard: bool = True
    asked: int = 0

    def judge(
        self,
        requests: int,
        errors: int,
        limits: ReplicaLimits,
        *,
        latency: Mapping[str, int] | None = None,
        reference: Mapping[str, int] | None = None,
        compared: int = 0,
        disagreed: int = 0,
        disagreement_max: float = 1.0,
    ) -> str:
        """Why the version failed, or "" so far. The arguments are the host's counters now.

        Each fault asks for a share and a number: one bad request of three condemns nothing, nor do five of a thousand.

        Args:
            requests: of the version.
            errors: the failed ones.
            limits: from where on a fault is one.
            latency: answers of the version by bucket of their duration.
            reference: the same of the version that it replaces, over all its life.
            compared: shadowed inputs, of which `disagreed` were answered otherwise by the reference.
            disagreed: see `compared`.
            disagreement_max: share of the compared inputs that may be answered otherwise; 1 = any.
        """
        if requests < self.requests or errors < self.errors:
            self.requests = self.errors = self.compared = self.disagreed = 0  # the host was restarted
            self.latency = {}
        self.asked, failed = requests - self.requests, errors - self.errors
        if failed >= limits.errors_min and failed >= limits.error_share_max * self.asked:
            return f"{failed} of {self.asked} requests failed during its probation."
        compared, disagreed = compared - self.compared, disagreed - self.disagreed
        allowed = min(disagreement_max, limits.disagreement_share_max)
        if compared >= limits.compared_min and disagreed > allowed * compared:
            return f"{disagreed} of {compared} inputs got another answer than before, allowed are {allowed:.0%}."
        new = {key: count - self.latency.get(key, 0) for key, count in (latency or {}).items()}
        return _judge_latency(new, reference or {}, limits)


def _judge_latency(new: Mapping[str, int], reference: Mapping[str, int], limits: ReplicaLimits) -> str:
    if min(sum(new.values()), sum(reference.values())) < limits.answers_min:
        return ""
    p99_us, before_us = quantile_of(new, 0.99), quantile_of(reference, 0.99)
    if p99_us <= max(limits.p99_factor_max * before_us, before_us + limits.p99_slack_us):
        return ""
    return f"its p99 is {p99_us / 1000:.1f} ms, that of the version before was {before_us / 1000:.1f} ms."
