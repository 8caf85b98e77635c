"""Routing leases: what a client is told so that it can call the nodes itself. Pure; `lessor` holds the sockets.

The order of a lease is the policy's own judgement. Between two reports ten thousand clients would all be told the same
best target; so each lease that is given out is credited to its first target, as the policy credits its own requests.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated
from zlib import crc32

import msgspec

from nearcast.errors import MeshError
from nearcast.load import NodeReport, VersionReport
from nearcast.runtime import parse_address
from nearcast.runtime.address import UNIX_PREFIX, format_address, is_loopback
from nearcast.wire.lease import Lease, LeaseQuestion, LeaseTarget
from router.policy import Policy, PolicyConfig, Reject, RequestFacts, Send, Terms
from router.policy.hedge import hedge_delay_s
from router.policy.target import TargetState

Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]

_RANKS = {"chosen": 0, "feasible": 0, "hot": 1, "late_at_p95": 2, "infeasible": 3}
"""Candidates that a lease may name, by the policy's verdict: the first rank that has any is drawn from."""
_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, never bound
_SIZE_MIN_BYTES = 1024
_RETRY_BURST_MIN = 4.0
_COST_MIN_MS = 0.01
_STEPS_PER_E = 5.0


class LeaseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How leases are given.

    Attributes:
        ttl_ms: how long one holds.
        refresh_share: after this share of it the client should ask again.
        targets_max: targets of one lease.
        lessees_max: clients whose first target is remembered; the one that was silent longest is forgotten first.
        lessee_load_min: requests in flight that a client stands for, if the loads of the targets suggest less.
        lessee_load_max: and if they suggest more.
        keep_fraction: a client keeps its first target while no other is better by more than this fraction;
        move_share: beyond that, this share of those that ask moves at a time.
        ranking_ms: how long one judgement of the policy serves clients with the same question.
        rankings_max: questions whose judgement is remembered.
    """

    ttl_ms: Annotated[int, msgspec.Meta(ge=100, le=60_000)] = 1000
    refresh_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.6
    targets_max: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8
    lessees_max: Count = 65_536
    lessee_load_min: Positive = 0.01
    lessee_load_max: Positive = 64.0
    keep_fraction: Annotated[float, msgspec.Meta(ge=0)] = 0.25
    move_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    ranking_ms: Annotated[float, msgspec.Meta(ge=0)] = 50.0
    rankings_max: Count = 256


class Announced(msgspec.Struct, frozen=True):
    """What a target said about itself, and the mesh address at which it is reached; "" = it is this very server."""

    report: NodeReport
    mesh_address: str = ""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One target as the policy judged it. `mark` tells two judgements apart where the difference matters."""

    target: LeaseTarget
    rank: int
    cost_ms: float
    drain_ms: float
    is_loopback: bool
    mark: str


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """One judgement of the policy, good for every client with the same question."""

    made_at: float
    facts: RequestFacts
    version: str
    stateful: bool
    candidates: tuple[Candidate, ...]
    load: float


class _Lessee(msgspec.Struct):
    first: str
    silent_at: float


def size_class(size_bytes: int) -> int:
    """`size_bytes` rounded up to three leading bits, at least 1 KiB."""
    if size_bytes <= _SIZE_MIN_BYTES:
        return _SIZE_MIN_BYTES
    step = 1 << (size_bytes.bit_length() - 3)
    return -(-size_bytes // step) * step


def deadline_class(deadline_ms: int) -> int:
    """`deadline_ms` rounded down to three leading bits; 0 = none."""
    step = 1 << max(0, deadline_ms.bit_length() - 3)
    return deadline_ms // step * step


def reachable_address(said: str, mesh_address: str) -> str:
    """Where clients reach a node that says `said`, "" if they cannot.

    A node that listens on all addresses is reached at the host of its mesh listener. One that listens on loopback is
    out of reach unless it is on this machine.
    """
    if not said or said.startswith(UNIX_PREFIX):
        return ""
    try:
        host, port = parse_address(said)
        mesh_host = parse_address(mesh_address).host
    except MeshError:
        return ""
    if host in _WILDCARDS:
        return format_address(mesh_host, port)
    return "" if is_loopback(host) and not is_loopback(mesh_host) else said


def rank(policy: Policy, now: float, facts: RequestFacts, announced: Iterable[Announced]) -> Ranking:
    """The policy's judgement of the targets that clients can reach.

    Raises:
        MeshError: as an inference with these facts would be refused.
    """
    # A lease is demand like a request, and is refused like one; to explain alone would leave no trace.
    decision = policy.decide(now, facts)
    if isinstance(decision, Send):
        decision = policy.decide(now, facts, explain=True)
    if isinstance(decision, Reject):
        raise MeshError(decision.code, decision.message, retry_after_ms=decision.retry_after_ms)
    known = {item.report.node: item for item in announced}
    states = {state.name: state for state in policy.targets}
    # A stand-in answers only where a router puts it in place: such a client goes on through us.
    terms = () if decision.model else decision.terms
    candidates = [
        _candidate(judged, facts, states[judged.target], known[judged.target])
        for judged in terms
        if judged.version == decision.version and judged.verdict in _RANKS and judged.target in known
    ]
    held = [_held(known[c.target.name].report, facts.model, decision.version) for c in candidates]
    return Ranking(
        made_at=now,
        facts=facts,
        version=decision.version,
        stateful=facts.stateful or any(entry.stateful == "hidden" for entry in held),
        candidates=tuple(c for c in candidates if c.target.tier == "local" or c.target.address),
        load=sum(state.load for state in states.values()),
    )


def _candidate(terms: Terms, facts: RequestFacts, state: TargetState, announced: Announced) -> Candidate:
    report = announced.report
    held = _held(report, facts.model, terms.version)
    address = reachable_address(report.client_address, announced.mesh_address) if announced.mesh_address else ""
    target = LeaseTarget(
        name=terms.target,
        tier=state.tier,
        domain=state.domain,
        address=address,
        tls=report.client_tls,
        server_name=terms.target if report.client_tls else "",
        t50_ms=terms.t50_ms - terms.wait_ms,
        t95_ms=terms.t95_ms - terms.wait_ms,
        rtt_ms=min(terms.rtt_ms, terms.t50_ms - terms.wait_ms),
        bytes_per_ms=facts.size_bytes / terms.transfer_ms if terms.transfer_ms > 0.0 else 0.0,
        load=terms.load,
        slots=state.slots,
        quality=held.quality,
        price=held.price,
    )
    verdict = _RANKS[terms.verdict]
    fill = round(4.0 * terms.load / state.slots)
    # Widened by the report's age, the 95th percentile moves all the time.
    times = f"{_step(target.t50_ms)} {_step(target.t95_ms) // 3}"
    return Candidate(
        target=target,
        rank=verdict,
        cost_ms=terms.cost_ms,
        drain_ms=max(terms.service_ms, 0.0) / state.slots,
        is_loopback=bool(address) and is_loopback(parse_address(address).host),
        mark=f"{terms.target} {address} {report.client_tls} {verdict} {fill} {times}",
    )


def _held(report: NodeReport, model: str, version: str) -> VersionReport:
    found = (entry for entry in report.versions if (entry.model, entry.version) == (model, version))
    return next(found, VersionReport(model=model, version=version))


class Leases:
    """Who leads whom: the lessees of one server, and the order that the next one gets.

    Args:
        config: bounds.
        policy: its parameters, for the budgets and the near ties.
        draw: numbers in [0, 1) from a seeded generator.
    """

    def __init__(self, config: LeaseConfig, policy: PolicyConfig, draw: Callable[[], float]) -> None:
        self._config = config
        self._policy = policy
        self._draw = draw
        self._lessees: OrderedDict[str, _Lessee] = OrderedDict()
        self._leads: dict[str, int] = {}
        self._load_each = config.lessee_load_min

    @property
    def live(self) -> int:
        """Clients that hold a lease, or held one a moment ago."""
        return len(self._lessees)

    @property
    def leads(self) -> dict[str, int]:
        """How many of them have which first target."""
        return dict(self._leads)

    def learn(self, load: float) -> None:
        """Take the load on all targets together: what a client stands for on average."""
        each = load / max(1, len(self._lessees))
        self._load_each = min(max(each, self._config.lessee_load_min), self._config.lessee_load_max)

    def grant(self, now: float, ranking: Ranking, question: LeaseQuestion, lease_id: str, *, nearby: bool) -> Lease:
        """The lease of one client.

        Args:
            now: monotonic seconds.
            ranking: the policy's judgement.
            question: what the client asked.
            lease_id: of a client that holds none yet.
            nearby: whether loopback is the same for the client as for us.
        """
        self._forget_silent(now)
        held = self._lessees.get(question.lease_id) if question.lease_id else None
        lease_id = question.lease_id if held is not None else lease_id
        former = self._release(lease_id)
        ordered = self.order([c for c in ranking.candidates if nearby or not c.is_loopback], lease_id, former)
        if ordered:
            self._lead(now, lease_id, ordered[0].target.name)
        share = 1 << len(self._lessees).bit_length() >> 1
        etag = _etag([ranking.version, str(share), *(c.mark for c in ordered)])
        config = self._config
        refresh_ms = int(config.ttl_ms * config.refresh_share)
        if held is not None and etag == question.etag:
            return Lease(
                lease_id=lease_id, etag=etag, ttl_ms=config.ttl_ms, refresh_after_ms=refresh_ms, unchanged=True
            )
        policy, facts = self._policy, ranking.facts
        return Lease(
            lease_id=lease_id,
            etag=etag,
            ttl_ms=config.ttl_ms,
            refresh_after_ms=refresh_ms,
            targets=tuple(self._named(candidate) for candidate in ordered),
            version=ranking.version,
            stateful=ranking.stateful,
            size_bytes=facts.size_bytes,
            deadline_ms=0 if facts.remaining_s is None else round(facts.remaining_s * 1e3),
            reserve_ms=policy.reserve_ms,
            hedge_after_ms=0.0 if ranking.stateful else self._hedge_after_ms(ordered, facts.remaining_s),
            hedge_share=policy.hedge_share,
            # What may be saved up is divided: a crowd of clients must not save up a crowd of bursts.
            hedge_burst=max(1.0, policy.hedge_burst / max(1, share)),
            retry_share=policy.retry_share,
            retry_burst=max(_RETRY_BURST_MIN, policy.retry_burst / max(1, share)),
            retry_per_s=policy.retry_per_s,
            attempts_max=policy.attempts_max,
        )

    def order(self, candidates: Sequence[Candidate], lease_id: str, former: str = "") -> list[Candidate]:
        """Candidates as one more client should try them; `former` is the first one that it was given before.

        The first one is the cheapest, as the policy reckons cost, with the clients that were sent there before; among
        near ties two are drawn and the emptier one is taken, so that nobody herds on a stale minimum. A client leaves a
        target that has become slower, but is still in time, by a draw: one report must not move everybody. The others
        follow by cost; each client has its own order of near ties, and keeps it.
        """
        if not candidates:
            return []
        rank_best = min(c.rank for c in candidates)
        costs = {c.target.name: c.cost_ms + self._extra_ms(c) for c in candidates}
        peers = [c for c in candidates if c.rank == rank_best]
        best = min(costs[c.target.name] for c in peers)
        first = next((c for c in peers if c.target.name == former), None)
        keep = best * (1.0 + self._config.keep_fraction) + self._policy.tie_ms
        if first is None or (costs[former] > keep and self._draw() < self._config.move_share):
            bound = best * (1.0 + self._policy.tie_fraction) + self._policy.tie_ms
            first = self._drawn([c for c in peers if costs[c.target.name] <= bound])
        others = [c for c in candidates if c is not first]
        if len(others) > 1:
            others.sort(key=lambda c: (c.rank, _step(costs[c.target.name]), crc32((lease_id + c.target.name).encode())))
        return [first, *others][: self._config.targets_max]

    def _drawn(self, ties: Sequence[Candidate]) -> Candidate:
        if len(ties) == 1:
            return ties[0]
        one = int(self._draw() * len(ties))
        other = int(self._draw() * (len(ties) - 1))
        other += other >= one
        a, b = ties[one], ties[other]
        return a if self._load(a) * b.target.slots <= self._load(b) * a.target.slots else b

    def _load(self, candidate: Candidate) -> float:
        """The load that was reported, or that of the clients that were sent there since, whichever is more."""
        target = candidate.target
        return max(target.load, self._leads.get(target.name, 0) * self._load_each)

    def _extra_ms(self, candidate: Candidate) -> float:
        """Queue wait by load that the policy does not know of yet."""
        return self._wait_ms(candidate, self._load(candidate)) - self._wait_ms(candidate, candidate.target.load)

    def _wait_ms(self, candidate: Candidate, load: float) -> float:
        return max(0.0, load + 1.0 - candidate.target.slots) * candidate.drain_ms

    def _named(self, candidate: Candidate) -> LeaseTarget:
        return msgspec.structs.replace(candidate.target, load=self._load(candidate))

    def _hedge_after_ms(self, ordered: Sequence[Candidate], remaining_s: float | None) -> float:
        if len(ordered) < 2:
            return 0.0
        first = ordered[0]
        away = (c for c in ordered[1:] if c.target.domain != first.target.domain)
        second = next(away, ordered[1])
        limit_s = float("inf") if remaining_s is None else remaining_s - self._policy.reserve_ms / 1e3
        minimum_s = self._policy.hedge_delay_ms_min / 1e3
        t95_s, second_t95_s = ((c.target.t95_ms + self._wait_ms(c, self._load(c))) / 1e3 for c in (first, second))
        delay_s = hedge_delay_s(t95_s, second_t95_s, limit_s, minimum_s=minimum_s)
        return 0.0 if delay_s is None else delay_s * 1e3

    def _lead(self, now: float, lease_id: str, name: str) -> None:
        # Twice the time: a client whose renewal is late goes on calling.
        self._lessees[lease_id] = _Lessee(name, now + 2.0 * self._config.ttl_ms / 1e3)
        self._leads[name] = self._leads.get(name, 0) + 1
        if len(self._lessees) > self._config.lessees_max:
            self._release(next(iter(self._lessees)))

    def _release(self, lease_id: str) -> str:
        """Forget a client; the name of its first target, "" if it is not known."""
        lessee = self._lessees.pop(lease_id, None)
        if lessee is None:
            return ""
        left = self._leads[lessee.first] - 1
        if left:
            self._leads[lessee.first] = left
        else:
            del self._leads[lessee.first]
        return lessee.first

    def _forget_silent(self, now: float) -> None:
        while self._lessees:
            lease_id, lessee = next(iter(self._lessees.items()))
            if lessee.silent_at > now:
                return
            self._release(lease_id)


def _step(cost_ms: float) -> int:
    """Costs of one step are near enough to be called equal."""
    return round(math.log(max(cost_ms, _COST_MIN_MS)) * _STEPS_PER_E)


def _etag(marks: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(marks).encode(), digest_size=8).hexdigest()
