"""Gives leases to the clients of one server: the socket's side of `lease`."""

from __future__ import annotations

import secrets
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import MeshError
from nearcast.metrics import Collector, Registry
from nearcast.runtime import parse_address
from nearcast.runtime.address import UNIX_PREFIX, is_loopback
from nearcast.transport.context import read_context
from nearcast.transport.seam import Call
from nearcast.wire.lease import Lease, LeaseQuestion
from router.lease import Announced, LeaseConfig, Leases, Ranking, deadline_class, rank, size_class
from router.policy import RequestFacts
from router.policy.generator import SplitMix
from router.router import Router

if TYPE_CHECKING:
    from prometheus_client import Metric


class Lessor(Collector):
    """Answers `nearcast.wire.v1.Routing/Lease`, and is the collector of what it counts.

    Args:
        router: whose policy judges.
        announced: what the targets said last, for each ranking anew.
        config: bounds.
        registry: where the metrics appear; None = nowhere.
        clock: its monotonic time must be the policy's.
    """

    def __init__(
        self,
        router: Router,
        announced: Callable[[], Iterable[Announced]],
        *,
        config: LeaseConfig | None = None,
        registry: Registry | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._router = router
        self._announced = announced
        self._config = config or LeaseConfig()
        self._clock = clock
        self._leases = Leases(self._config, router.policy.config, SplitMix(secrets.randbits(63)).random)
        self._rankings: OrderedDict[tuple[str, str, int, int, int, str], Ranking] = OrderedDict()
        self._asked: defaultdict[str, int] = defaultdict(int)
        if registry is not None:
            registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """How many asked, by what became of it, and who holds a lease now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        asked = CounterMetricFamily("nearcast_leases", "Lease requests by what became of them.", labels=["result"])
        for result, count in self._asked.items():
            asked.add_metric([result], count)
        yield asked
        yield GaugeMetricFamily("nearcast_lessees", "Clients that hold a lease.", self._leases.live)

    def grant(self, question: LeaseQuestion, call: Call) -> Lease:
        """The lease of one caller.

        Raises:
            MeshError: as an inference with this model, size and deadline would be refused.
        """
        now = self._clock.monotonic()
        context = read_context(
            call.metadata, {}, deadline=call.deadline, identity=call.identity, trusted=False, clock=self._clock
        )
        try:
            ranking = self._ranking(now, question, context.tenant)
        except MeshError as error:
            self._asked[str(error.code)] += 1
            raise
        lease = self._leases.grant(now, ranking, question, secrets.token_hex(8), nearby=_is_nearby(call.peer))
        self._asked["unchanged" if lease.unchanged else "granted"] += 1
        return lease

    def _ranking(self, now: float, question: LeaseQuestion, tenant: str) -> Ranking:
        size_bytes, deadline_ms = size_class(question.size_bytes), deadline_class(question.deadline_ms)
        key = (question.model, question.version, size_bytes, deadline_ms, question.priority, tenant)
        found = self._rankings.get(key)
        if found is not None and now - found.made_at < self._config.ranking_ms / 1e3:
            return found
        ranking = rank(self._router.policy, now, self._facts(*key), self._announced())
        self._leases.learn(ranking.load)
        self._rankings[key] = ranking
        self._rankings.move_to_end(key)
        if len(self._rankings) > self._config.rankings_max:
            self._rankings.popitem(last=False)
        return ranking

    def _facts(
        self, model: str, version: str, size_bytes: int, deadline_ms: int, priority: int, tenant: str
    ) -> RequestFacts:
        """A usual request. The candidate of a trial is left out: the nodes draw who gets it, request by request."""
        splits = self._router.splits
        split = splits.split(model)
        wanted = splits.alias(model, version) or version if version and not version.isdecimal() else version
        return RequestFacts(
            model=model,
            version=wanted or split.stable,
            pinned=bool(version),
            fallbacks=(split.last_good,) if split.last_good and not version else (),
            size_bytes=size_bytes,
            remaining_s=deadline_ms / 1e3 if deadline_ms else None,
            priority=priority,
            tenant=tenant,
        )


def _is_nearby(peer: str) -> bool:
    """Whether the caller is on this machine."""
    if peer.startswith(UNIX_PREFIX):
        return True
    try:
        return is_loopback(parse_address(peer).host)
    except MeshError:
        return False
