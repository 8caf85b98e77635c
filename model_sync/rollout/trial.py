"""One trial over the fleet: what the nodes report of candidate and stable, and whether that is a reason to stop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import numpy as np

from model_sync.rollout.gates import Trying, failed_gate
from model_sync.rollout.report import Count, ReleaseReport
from model_sync.rollout.sequential import STEPS, Array, base_rate, combine, evidence, evidence_above, threshold
from nearcast.serving.statistics import quantile_of, slower_than
from nearcast.store.pointer import Share

Effect = Annotated[float, msgspec.Meta(gt=0, lt=1)]


class TrialLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When the controller ends a trial by itself.

    Attributes:
        auto_stop: whether it does; otherwise it only says so.
        false_alarm: probability that the tests ever stop a candidate that is not worse, all three together.
        error_effect, latency_effect, disagreement_effect: differences of the shares that are worth finding.
        latency_factor: a request is slow if it takes more than this times the p99 of stable on the same node.
        latency_answers_min: answers of stable on a node before its p99 is known.
        failed_nodes: this many nodes must agree. Fewer can neither stop a rollout by their quarantine nor by what they
            count, whatever they report; in a fleet that is smaller, all of it.
        failed_share: of the nodes that tried the candidate, so many must have thrown it out.
    """

    auto_stop: bool = True
    false_alarm: Effect = 0.01
    error_effect: Effect = 0.005
    latency_effect: Effect = 0.01
    disagreement_effect: Effect = 0.02
    latency_factor: Annotated[float, msgspec.Meta(ge=1)] = 1.25
    latency_answers_min: Count = 500
    failed_nodes: Annotated[int, msgspec.Meta(ge=1)] = 2
    failed_share: Share = 0.1


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One test so far. `progress` towards its alarm is 1 at the alarm and may be negative; shares are of requests."""

    progress: float
    candidate_share: float
    candidate_requests: int
    stable_share: float
    stable_requests: int = 0


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The trial so far; `reason` to stop, or ""."""

    reason: str = ""
    findings: dict[str, Finding] = {}


@dataclass(slots=True)
class _Counts:
    """Requests and bad ones of candidate and stable: `block` since the last evidence, `total` of the trial."""

    block: Array = field(default_factory=lambda: np.zeros(4))
    total: Array = field(default_factory=lambda: np.zeros(4))
    rate: float = 0.0
    log_evidence: Array = field(default_factory=lambda: np.zeros(STEPS))

    def add(self, candidate: int, bad: int, stable: int, stable_bad: int, *, rate: float, effect: float) -> None:
        """Count, and turn the block into evidence once both have been asked: when that is depends on traffic alone.

        `rate` is what stable's share was before these requests; the one from before the block is bet on.
        """
        counts = (candidate, bad, stable, stable_bad)
        if not self.block.any():
            self.rate = rate
        self.block += counts
        self.total += counts
        if self.block[0] and self.block[2]:
            requests, failed, others, others_failed = self.block
            self.log_evidence += evidence(requests, failed, others, others_failed, self.rate, effect)
            self.block[:] = 0.0


class Trial:
    """One candidate against one stable release. `intent` is that of the document it began with.

    Args:
        disagreement_max: share of the shadowed inputs that may differ; 1 = differences are no fault.
    """

    def __init__(self, limits: TrialLimits, *, intent: int, disagreement_max: float = 1.0) -> None:
        self.intent = intent
        self._limits = limits
        self._bound = disagreement_max
        self._errors: dict[str, _Counts] = {}
        self._latency: dict[str, _Counts] = {}
        self._disagreement: dict[str, _Counts] = {}

    def observe(self, node: str, candidate: ReleaseReport, stable: ReleaseReport, history: ReleaseReport) -> None:
        """Take what a node counted since its last report; `history` is all that it had counted of stable before."""
        limits = self._limits
        rate = float(base_rate(history.requests, history.errors))
        self._errors.setdefault(node, _Counts()).add(
            candidate.requests, candidate.errors, stable.requests, stable.errors, rate=rate, effect=limits.error_effect
        )
        self._observe_latency(node, candidate.latency, stable.latency, history.latency)
        if self._bound < 1.0 and candidate.compared:
            compared, disagreed = candidate.compared, candidate.disagreed
            counts = self._disagreement.setdefault(node, _Counts())
            counts.total += (compared, disagreed, 0, 0)
            counts.log_evidence += evidence_above(compared, disagreed, self._bound, limits.disagreement_effect)

    def judge(self, nodes: Iterable[Trying], fleet: int) -> Verdict:
        """The verdict so far. `nodes` are the tries of all nodes of the channel, `fleet` how many nodes report."""
        limits = self._limits
        agree = max(1, min(limits.failed_nodes, fleet))
        reason = failed_gate(nodes, share_min=limits.failed_share, nodes_min=agree)
        alarm = threshold(limits.false_alarm)
        findings: dict[str, Finding] = {}
        for name, tests in (
            ("errors", self._errors),
            ("latency", self._latency),
            ("disagreement", self._disagreement),
        ):
            if not tests:
                continue
            log_evidence = float(combine(np.stack([counts.log_evidence for counts in tests.values()]), agree - 1))
            n, bad, stable_n, stable_bad = (
                int(one) for one in np.sum([counts.total for counts in tests.values()], axis=0)
            )
            finding = Finding(
                progress=round(log_evidence / alarm, 4),
                candidate_share=bad / max(1, n),
                candidate_requests=n,
                stable_share=self._bound if name == "disagreement" else stable_bad / max(1, stable_n),
                stable_requests=stable_n,
            )
            findings[name] = finding
            if log_evidence >= alarm and not reason:
                reason = _explain(name, finding)
        return Verdict(reason=reason, findings=findings)

    def _observe_latency(
        self, node: str, candidate: Mapping[str, int], stable: Mapping[str, int], history: Mapping[str, int]
    ) -> None:
        answers = sum(history.values())
        if answers < self._limits.latency_answers_min:
            return
        limit_us = quantile_of(history, 0.99) * self._limits.latency_factor
        slow, stable_slow, slow_before = (slower_than(one, limit_us) for one in (candidate, stable, history))
        self._latency.setdefault(node, _Counts()).add(
            sum(candidate.values()), slow, sum(stable.values()), stable_slow,
            rate=float(base_rate(answers, slow_before)), effect=self._limits.latency_effect,
        )  # fmt: skip


def _explain(name: str, finding: Finding) -> str:
    what = {
        "errors": "fail",
        "latency": "are slower than stable's p99 allows",
        "disagreement": "are answered otherwise",
    }
    against = "allowed are" if name == "disagreement" else "of stable"
    return (
        f"{finding.candidate_share:.2%} of {finding.candidate_requests} requests {what[name]}, "
        f"{against} {finding.stable_share:.2%}"
    )
