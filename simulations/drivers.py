"""Who sends requests in virtual time: the live policy, and the baseline it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from nearcast.errors import Code
from nearcast.handler import Served
from router.policy.config import PolicyConfig
from router.policy.events import ABANDONED, Attempt, Outcome
from router.policy.facts import Reject, RequestFacts, Send
from router.policy.policy import Policy
from simulations.fleet import MODEL, Node
from simulations.world import World

REPORT_PERIOD_S = 0.25
REQUEST_SIZE_BYTES = 600


class Driver(Protocol):
    """Sends one request when asked. `done` hears once: the latency in seconds, or None for a refusal or failure."""

    hedges: int

    def request(self, done: Callable[[float | None], None]) -> None:
        """Send now."""
        ...


class RoundRobin:
    """Each node in turn, whatever it says."""

    def __init__(self, world: World, nodes: Mapping[str, Node]) -> None:
        self._world = world
        self._nodes = list(nodes.values())
        self._turn = 0
        self.hedges = 0

    def request(self, done: Callable[[float | None], None]) -> None:
        node = self._nodes[self._turn % len(self._nodes)]
        self._turn += 1
        began = self._world.now
        back = node.spec.rtt_s / 2

        def finish(served: Served | None) -> None:
            self._world.after(back, lambda: done(None if served is None else self._world.now - began))

        def arrive() -> None:
            node.submit(finish)

        self._world.after(node.spec.rtt_s / 2, arrive)


class PolicyDriver:
    """`router.policy.Policy` driven like live: decide, send, hedge, cancel the loser; a report each 250 ms."""

    def __init__(self, world: World, nodes: Mapping[str, Node], *, deadline_s: float | None, until_s: float) -> None:
        self._world = world
        self._nodes = nodes
        self._deadline_s = deadline_s
        self._until_s = until_s
        self._policy = Policy(PolicyConfig(), world.stream("policy").getrandbits(63))
        self.hedges = 0
        for node in nodes.values():
            self._policy.add_target(world.now, node.spec.name, node.spec.tier)
            self._policy.on_probe(world.now, node.spec.name, node.spec.rtt_s)
            self._policy.on_report(world.now, node.spec.name, node.report())
            self._report_later(node)

    def request(self, done: Callable[[float | None], None]) -> None:
        now = self._world.now
        facts = RequestFacts(model=MODEL, size_bytes=REQUEST_SIZE_BYTES, remaining_s=self._deadline_s)
        decision = self._policy.decide(now, facts)
        if isinstance(decision, Reject):
            self._world.record("reject", decision.reason)
            done(None)
            return
        _Exchange(self._world, self._policy, self._nodes, facts, done, self._count_hedge).start(decision)

    def _count_hedge(self) -> None:
        self.hedges += 1

    def _report_later(self, node: Node) -> None:
        if self._world.now > self._until_s:
            return
        report = node.report()
        self._world.after(node.spec.rtt_s / 2, lambda: self._policy.on_report(self._world.now, node.spec.name, report))
        self._world.after(REPORT_PERIOD_S, lambda: self._report_later(node))


class _Exchange:
    """One request and its attempts; the first answer wins, the others are cancelled."""

    def __init__(
        self,
        world: World,
        policy: Policy,
        nodes: Mapping[str, Node],
        facts: RequestFacts,
        done: Callable[[float | None], None],
        on_hedge: Callable[[], None],
    ) -> None:
        self._world = world
        self._policy = policy
        self._nodes = nodes
        self._facts = facts
        self._done = done
        self._on_hedge = on_hedge
        self._began = world.now
        self._open: dict[int, tuple[Attempt, Callable[[], None]]] = {}
        self._answered = False

    def start(self, decision: Send) -> None:
        attempt = self._send(decision, "first")
        if decision.hedge_after_s is not None:
            self._world.after(decision.hedge_after_s, lambda: self._hedge(attempt))

    def _send(self, decision: Send, kind: str) -> Attempt:
        node = self._nodes[decision.target]
        attempt = self._policy.on_sent(self._world.now, self._facts, decision, kind)
        self._world.record(kind, decision.target)
        cancel: list[Callable[[], None]] = []
        back = node.spec.rtt_s / 2

        def arrive() -> None:
            cancel.append(node.submit(lambda served: self._world.after(back, lambda: self._reply(attempt, served))))

        def withdraw() -> None:
            self._world.after(back, lambda: cancel[0]() if cancel else None)

        self._world.after(node.spec.rtt_s / 2, arrive)
        self._open[id(attempt)] = (attempt, withdraw)
        return attempt

    def _hedge(self, first: Attempt) -> None:
        if self._answered:
            return
        facts = self._facts
        if facts.remaining_s is not None:
            elapsed = self._world.now - self._began
            facts = RequestFacts(
                model=facts.model, size_bytes=facts.size_bytes, remaining_s=facts.remaining_s - elapsed
            )
        copy = self._policy.hedge(self._world.now, facts, first)
        if copy is not None:
            self._on_hedge()
            self._send(copy, "hedge")

    def _reply(self, attempt: Attempt, served: Served | None) -> None:
        self._open.pop(id(attempt), None)
        outcome = Outcome(served=served) if served is not None else Outcome(code=Code.OVERLOADED)
        self._policy.on_reply(self._world.now, attempt, outcome)
        if self._answered:
            return
        if served is None and self._open:
            return
        self._answered = True
        for other, withdraw in self._open.values():
            self._policy.on_reply(self._world.now, other, ABANDONED)
            withdraw()
        self._open.clear()
        self._done(None if served is None else self._world.now - self._began)
