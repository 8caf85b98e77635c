"""What the nodes report: the last word of each, the sums over all, and the trials that these numbers judge.

A report speaks for the identity of its connection and for nobody else. Everything here is in memory: after a restart of
the controller each node's next report is where counting begins, and the test of a running trial begins anew.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from model_sync.controller.config import SyncLimits
from model_sync.rollout.document import ChannelDocument, Rollout
from model_sync.rollout.gates import trying
from model_sync.rollout.report import FOLLOWING, ModelReport, ReleaseReport, SyncReport, counted_since
from model_sync.rollout.trial import Trial, TrialLimits, Verdict
from nearcast.errors import Code, MeshError
from nearcast.serving.statistics import quantile_of

EPOCHS_KEPT = 8
RELEASES_MAX = 4096
"""Releases whose sums are kept; the oldest go."""
REASONS_MAX = 8


@dataclass(slots=True)
class _Node:
    report: SyncReport
    size_bytes: int
    heard: float
    retired: deque[str] = field(default_factory=lambda: deque(maxlen=EPOCHS_KEPT))


@dataclass(slots=True)
class _Sum:
    requests: int = 0
    errors: int = 0
    compared: int = 0
    disagreed: int = 0
    latency: Counter[str] = field(default_factory=Counter)

    def add(self, counted: ReleaseReport) -> None:
        self.requests += counted.requests
        self.errors += counted.errors
        self.compared += counted.compared
        self.disagreed += counted.disagreed
        self.latency.update(counted.latency)


@dataclass(slots=True)
class _Running:
    key: tuple[str, int, int]
    trial: Trial
    verdict: Verdict = field(default_factory=Verdict)
    is_stale: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A trial that has to end."""

    channel: str
    model: str
    release: int
    reason: str


class Reports:
    """The last report of each node, at most `nodes_max` of them and `reports_bytes_max` in all."""

    def __init__(self, trial: TrialLimits, limits: SyncLimits) -> None:
        self._trial_limits = trial
        self._limits = limits
        self._nodes: dict[str, _Node] = {}
        self._size_bytes = 0
        self._sums: dict[tuple[str, str, int], _Sum] = {}
        self._running: dict[tuple[str, str], _Running] = {}

    def take(self, now: float, report: SyncReport, size_bytes: int) -> bool:
        """Take a report over, unless it is a repeated or an older one; `now` in monotonic seconds.

        Raises:
            MeshError: OVERLOADED if there is no room.
        """
        node = report.node
        known = self._nodes.get(node)
        if known is None:
            self._add(now, report, size_bytes)
            return True
        if report.epoch == known.report.epoch:
            if report.sequence <= known.report.sequence:
                return False
        elif report.epoch in known.retired:
            return False
        else:
            known.retired.append(known.report.epoch)
        self._require_room(size_bytes - known.size_bytes)
        self._size_bytes += size_bytes - known.size_bytes
        before, known.report, known.size_bytes, known.heard = known.report, report, size_bytes, now
        self._count(node, before, report)
        return True

    def forget(self, node: str) -> None:
        """The node was removed from the mesh."""
        known = self._nodes.pop(node, None)
        if known is not None:
            self._size_bytes -= known.size_bytes

    def follow(self, channel: str, document: ChannelDocument | None) -> None:
        """Judge the trials of this document from now on, and no others of its channel."""
        running = {key: one for key, one in self._running.items() if key[0] != channel}
        for rollout in document.rollouts if document is not None else ():
            if document is None or rollout.candidate is None:
                continue
            place = (channel, rollout.model)
            key = (rollout.salt, rollout.stable.release, rollout.candidate.release)
            old = self._running.get(place)
            if old is not None and old.key == key:
                running[place] = old
                continue
            trial = Trial(self._trial_limits, intent=document.intent, disagreement_max=rollout.disagreement_max)
            running[place] = _Running(key, trial)
        self._running = running

    def judge(self) -> list[Stop]:
        """The trials about which something new is known and that must stop."""
        stops = []
        for (channel, model), running in self._running.items():
            if not running.is_stale:
                continue
            running.is_stale = False
            candidate = running.key[2]
            reports = [one for one in self._about(channel, model) if one.state != FOLLOWING]
            tries = (trying(one, candidate, running.trial.intent) for one in reports)
            running.verdict = running.trial.judge(tries, len(reports))
            if running.verdict.reason:
                stops.append(Stop(channel=channel, model=model, release=candidate, reason=running.verdict.reason))
        return stops

    def names(self, now: float) -> set[str]:
        """The nodes that have reported lately."""
        return {name for name, node in self._nodes.items() if now - node.heard <= self._limits.report_ttl_s}

    def describe(self, channel: str, rollout: Rollout) -> dict[str, Any]:
        """One model of a channel as the fleet reports it, for `GET /v1/channels/{channel}/status`."""
        reports = list(self._about(channel, rollout.model))
        holders = [one for one in reports if one.state != FOLLOWING]
        candidate = rollout.candidate.release if rollout.candidate is not None else None
        running = self._running.get((channel, rollout.model))
        picked = [release for release in (rollout.stable.release, candidate) if release is not None]
        quarantined = Counter(release for one in reports for release in one.quarantined)
        return {
            "model": rollout.model,
            "stable": rollout.stable.release,
            "candidate": candidate,
            "wave": rollout.wave,
            "share": rollout.share,
            "rollback": rollout.rollback,
            "reason": rollout.reason,
            "by": rollout.by,
            "at": rollout.at,
            "following": sum(node.report.channel == channel for node in self._nodes.values()),
            "intents": dict(Counter(str(one.intent) for one in reports)),
            "states": dict(Counter(one.state for one in reports)),
            "stable_nodes": dict(Counter(str(one.stable or "none") for one in holders)),
            "candidate_nodes": sum(one.candidate is not None and one.candidate == candidate for one in holders),
            "received_bytes": sum(one.received_bytes for one in reports),
            "releases": {str(release): self._describe_release((channel, rollout.model, release)) for release in picked},
            "trial": msgspec.to_builtins(running.verdict) if running is not None else None,
            "quarantined": [
                {"release": release, "nodes": count, "reasons": _reasons(reports, release)}
                for release, count in sorted(quarantined.items())
            ],
            "errors": dict(Counter(one.error for one in reports if one.error).most_common(REASONS_MAX)),
        }

    def _describe_release(self, key: tuple[str, str, int]) -> dict[str, Any]:
        one = self._sums.get(key, _Sum())
        return {
            "requests": one.requests,
            "errors": one.errors,
            "p50_ms": round(quantile_of(one.latency, 0.5) / 1000, 3),
            "p99_ms": round(quantile_of(one.latency, 0.99) / 1000, 3),
            "compared": one.compared,
            "disagreed": one.disagreed,
        }

    def _about(self, channel: str, model: str) -> Iterator[ModelReport]:
        for node in self._nodes.values():
            if node.report.channel == channel:
                yield from (one for one in node.report.models if one.model == model)

    def _add(self, now: float, report: SyncReport, size_bytes: int) -> None:
        if len(self._nodes) >= self._limits.nodes_max:
            for name in self._nodes.keys() - self.names(now):
                self.forget(name)
        if len(self._nodes) >= self._limits.nodes_max:
            raise MeshError(Code.OVERLOADED, f"{self._limits.nodes_max} nodes report already, which is the bound.")
        self._require_room(size_bytes)
        self._size_bytes += size_bytes
        self._nodes[report.node] = _Node(report, size_bytes, now)
        for model in report.models:
            self._mark(report.channel, model.model)
            for release in model.releases:
                self._sum(report.channel, model.model, release.release).add(counted_since(None, release))

    def _require_room(self, more_bytes: int) -> None:
        if self._size_bytes + more_bytes > self._limits.reports_bytes_max:
            raise MeshError(
                Code.OVERLOADED, f"The reports of all nodes may have {self._limits.reports_bytes_max} bytes together."
            )

    def _count(self, node: str, before: SyncReport, report: SyncReport) -> None:
        known = {one.model: {release.release: release for release in one.releases} for one in before.models}
        for model in report.models:
            self._mark(report.channel, model.model)
            then = known.get(model.model, {})
            new: dict[int, ReleaseReport] = {}
            for release in model.releases:
                base = then.get(release.release)
                if base is not None and before.epoch != report.epoch and release.requests < base.requests:
                    base = None  # the host began anew; an agent that did, beside the same host, counts on
                new[release.release] = counted_since(base, release)
                self._sum(report.channel, model.model, release.release).add(new[release.release])
            running = self._running.get((report.channel, model.model))
            if running is not None:
                _, stable, candidate = running.key
                running.trial.observe(
                    node,
                    new.get(candidate, ReleaseReport(release=candidate)),
                    new.get(stable, ReleaseReport(release=stable)),
                    then.get(stable, ReleaseReport(release=stable)),
                )

    def _mark(self, channel: str, model: str) -> None:
        running = self._running.get((channel, model))
        if running is not None:
            running.is_stale = True

    def _sum(self, channel: str, model: str, release: int) -> _Sum:
        key = (channel, model, release)
        found = self._sums.get(key)
        if found is None:
            if len(self._sums) >= RELEASES_MAX:
                del self._sums[next(iter(self._sums))]
            found = self._sums[key] = _Sum()
        return found


def read_report(data: bytes, node: str, signature: str, certificate: bytes) -> SyncReport:
    """A report, once it is sure that the owner of the connection's certificate (DER) says this of itself.

    Raises:
        MeshError: UNAUTHENTICATED if its key did not sign exactly these bytes, INVALID_REQUEST if they are malformed,
            FORBIDDEN if they are about another node.
    """
    key = x509.load_der_x509_certificate(certificate).public_key()
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        key.verify(base64.b64decode(signature, validate=True), data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise MeshError(
            Code.UNAUTHENTICATED, "The report is not signed by the key of this connection's certificate."
        ) from error
    try:
        report = msgspec.json.decode(data, type=SyncReport)
    except msgspec.DecodeError as error:
        raise MeshError(Code.INVALID_REQUEST, f"The report does not fit: {error}.") from error
    if report.node != node:
        raise MeshError(Code.FORBIDDEN, f"The node {node} reports about {report.node!r}; each speaks for itself.")
    return report


def _reasons(reports: list[ModelReport], release: int) -> list[str]:
    given = Counter(one.reasons.get(str(release), "") for one in reports if release in one.quarantined)
    return [reason for reason, _ in given.most_common(REASONS_MAX) if reason]
