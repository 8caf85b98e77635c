"""Who routes in virtual time: the live policy, driven as `router.exchange` drives it, or a plain balancer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec

from nearcast.errors import Code
from nearcast.handler import Served
from nearcast.load import NodeReport
from router.policy.config import PolicyConfig
from router.policy.events import ABANDONED, Attempt, Outcome
from router.policy.facts import Reject, RequestFacts, Send
from router.policy.policy import Policy
from simulations.contract import Baseline
from simulations.mesh import Answered, Done, Flight, Mesh
from simulations.scenario import NodeSpec
from simulations.workload import Request


class Driver(ABC):
    """Answers requests. `done` hears once how each ended; at its deadline at the latest."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.world = mesh.world

    @abstractmethod
    def request(self, request: Request, done: Done) -> None:
        """A request comes in now."""

    def hear_report(self, node: NodeSpec, report: NodeReport, rtt_s: float, *, connecting: bool) -> None:
        """A node answered a probe."""
        return

    def hear_silence(self, node: NodeSpec) -> None:
        """A node does not answer probes."""
        return


class PolicyDriver(Driver):
    """`router.policy.Policy`: decide, send, hedge, retry, cancel the loser, report what happened."""

    def __init__(self, mesh: Mesh, config: PolicyConfig | None = None) -> None:
        super().__init__(mesh)
        self.policy = Policy(config or PolicyConfig(), self.world.stream("policy").getrandbits(63))
        for node in mesh.nodes.values():
            self.policy.add_target(self.world.now, node.spec.name, node.spec.tier)

    def request(self, request: Request, done: Done) -> None:
        decision = self.policy.decide(self.world.now, request.facts)
        if isinstance(decision, Reject):
            self.world.record("reject", request.number, decision.reason)
            done(decision.code, decision.retry_after_ms)
            return
        _Exchange(self, request, done).send(decision, "first")

    def hear_report(self, node: NodeSpec, report: NodeReport, rtt_s: float, *, connecting: bool) -> None:
        now = self.world.now
        if node.tier != "local":
            self.policy.on_probe(now, node.name, rtt_s, connecting=connecting)
        self.policy.on_report(now, node.name, report)

    def hear_silence(self, node: NodeSpec) -> None:
        self.policy.on_probe(self.world.now, node.name, None)


class _Exchange:
    """One request and its attempts; the first answer wins, the others are cancelled."""

    __slots__ = (
        "_done", "_driver", "_ends", "_facts", "_failure", "_hedge", "_main", "_policy", "_request", "_tried", "_world",
    )  # fmt: skip

    def __init__(self, driver: PolicyDriver, request: Request, done: Done) -> None:
        self._driver = driver
        self._world = driver.world
        self._policy = driver.policy
        self._request = request
        self._facts = request.facts
        self._done: Done | None = done
        self._tried: list[str] = []
        self._main: tuple[Attempt, Flight] | None = None
        self._hedge: tuple[Attempt, Flight] | None = None
        self._failure: tuple[Attempt, Outcome] | None = None
        remaining_s = request.facts.remaining_s
        self._ends = float("inf") if remaining_s is None else self._world.now + remaining_s
        if remaining_s is not None:
            self._world.after(remaining_s, self._expire)

    def send(self, send: Send, kind: str) -> None:
        """Carry out a decision."""
        self._main = self._leave(send, kind, self._hear)
        if send.hedge_after_s is not None:
            self._world.after(send.hedge_after_s, self._fire, self._main[0])

    def _leave(self, send: Send, kind: str, heard: Answered) -> tuple[Attempt, Flight]:
        attempt = self._policy.on_sent(self._world.now, self._facts, send, kind)
        self._tried.append(send.target)
        return attempt, self._driver.mesh.send(self._request, send.target, kind, self._ends, heard)

    def _fire(self, attempt: Attempt) -> None:
        """The hedge delay is over."""
        if self._done is None or self._main is None or self._main[0] is not attempt:
            return
        copy = self._policy.hedge(self._world.now, self._remaining(), attempt, self._tried)
        if copy is not None:
            self._hedge = self._leave(copy, "hedge", self._hear_hedge)

    def _hear(
        self, flight: Flight, served: Served | None, code: Code | None, retry_ms: int | None, *, sent: bool, told: bool
    ) -> None:
        assert self._main is not None
        attempt, _ = self._main
        self._main = None
        outcome = Outcome(code=code, sent=sent, retry_after_ms=retry_ms, served=served, told=told)
        self._policy.on_reply(self._world.now, attempt, outcome)
        if code is None:
            self._finish(None, None)
        else:
            self._failure = attempt, outcome
            if self._hedge is None:
                self._again()

    def _hear_hedge(
        self, flight: Flight, served: Served | None, code: Code | None, retry_ms: int | None, *, sent: bool, told: bool
    ) -> None:
        assert self._hedge is not None
        attempt, _ = self._hedge
        self._hedge = None
        outcome = Outcome(code=code, sent=sent, retry_after_ms=retry_ms, served=served, told=told)
        self._policy.on_reply(self._world.now, attempt, outcome)
        if code is None:
            self._finish(None, None)
        elif self._main is None:
            self._again()

    def _again(self) -> None:
        assert self._failure is not None
        attempt, outcome = self._failure
        send = self._policy.retry(self._world.now, self._remaining(), attempt, outcome, self._tried)
        if send is None:
            self._finish(outcome.code, outcome.retry_after_ms)
        else:
            self.send(send, "retry")

    def _expire(self) -> None:
        """The deadline is over: the client has hung up."""
        if self._done is None:
            return
        for open_ in (self._main, self._hedge):
            if open_ is not None:
                open_[1].cancel()
                self._policy.on_reply(self._world.now, open_[0], Outcome(code=Code.DEADLINE))
        self._main = self._hedge = None
        self._finish(Code.DEADLINE, None)

    def _finish(self, code: Code | None, retry_ms: int | None) -> None:
        done, self._done = self._done, None
        for open_ in (self._main, self._hedge):
            if open_ is not None:
                self._policy.on_reply(self._world.now, open_[0], ABANDONED)
                open_[1].cancel()
        self._main = self._hedge = None
        if done is not None:
            done(code, retry_ms)

    def _remaining(self) -> RequestFacts:
        return msgspec.structs.replace(self._facts, remaining_s=max(0.0, self._ends - self._world.now))


class SingleDriver(Driver):
    """Sends each request to one node, and once more to another if the first failed or refused; hears all reports."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._held: dict[str, set[str]] = {}

    @abstractmethod
    def choose(self, request: Request, names: Sequence[str]) -> str:
        """The node for a request, out of at least one."""

    def sent(self, name: str) -> None:
        """A request leaves."""
        return

    def replied(self, name: str, latency_s: float, served: Served | None, code: Code | None) -> None:
        """A request is over."""
        return

    def request(self, request: Request, done: Done) -> None:
        _Single(self, request, done).send(self.reachable(request.facts.model), "first")

    def hear_report(self, node: NodeSpec, report: NodeReport, rtt_s: float, *, connecting: bool) -> None:
        for version in report.versions:
            holders = self._held.setdefault(version.model, set())
            (holders.add if version.residency == "hot" or version.eta_ms > 0 else holders.discard)(node.name)

    def reachable(self, model: str) -> list[str]:
        """Nodes that hold the model, or bring it in, and are connected; all of them if none is."""
        held = self._held.get(model, ())
        return [name for name, link in self.mesh.links.items() if name in held and not link.is_lost] or list(
            self.mesh.links
        )


class BaselineDriver(SingleDriver):
    """A published balancer."""

    def __init__(self, mesh: Mesh, make: type[Baseline]) -> None:
        super().__init__(mesh)
        self.baseline = make(self.world.stream("policy"))

    def choose(self, request: Request, names: Sequence[str]) -> str:
        now = self.world.now
        name = self.baseline.choose(now, request.facts, names)
        for probed in self.baseline.probe(now, names):
            self.mesh.links[probed].there(0.5, 100, self._look, probed, now)
        return name

    def sent(self, name: str) -> None:
        self.baseline.on_sent(self.world.now, name)

    def replied(self, name: str, latency_s: float, served: Served | None, code: Code | None) -> None:
        self.baseline.on_reply(self.world.now, name, latency_s, served, code)

    def hear_report(self, node: NodeSpec, report: NodeReport, rtt_s: float, *, connecting: bool) -> None:
        super().hear_report(node, report, rtt_s, connecting=connecting)
        self.baseline.on_report(self.world.now, node.name, report, rtt_s)

    def _look(self, name: str, started: float) -> None:
        self.mesh.links[name].back(0.5, self._hear_probe, name, started, self.mesh.nodes[name].report())

    def _hear_probe(self, name: str, started: float, report: NodeReport) -> None:
        self.baseline.on_report(self.world.now, name, report, self.world.now - started)


class _Single:
    """One request of a `SingleDriver`."""

    __slots__ = ("_done", "_driver", "_ends", "_flight", "_request", "_tried")

    def __init__(self, driver: SingleDriver, request: Request, done: Done) -> None:
        self._driver = driver
        self._request = request
        self._done: Done | None = done
        self._flight: Flight | None = None
        self._tried = ""
        remaining_s = request.facts.remaining_s
        self._ends = float("inf") if remaining_s is None else driver.world.now + remaining_s
        if remaining_s is not None:
            driver.world.after(remaining_s, self._expire)

    def send(self, names: Sequence[str], kind: str) -> None:
        """Choose and send."""
        name = self._driver.choose(self._request, names)
        self._driver.sent(name)
        self._flight = self._driver.mesh.send(self._request, name, kind, self._ends, self._hear)

    def _hear(
        self, flight: Flight, served: Served | None, code: Code | None, retry_ms: int | None, *, sent: bool, told: bool
    ) -> None:
        self._flight = None
        self._driver.replied(flight.name, self._driver.world.now - flight.sent_at, served, code)
        if code is not None and not self._tried:
            self._tried = flight.name
            others = [name for name in self._driver.reachable(self._request.facts.model) if name != flight.name]
            if others:
                self.send(others, "retry")
                return
        self._finish(code, retry_ms)

    def _expire(self) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.cancel()
            self._driver.replied(flight.name, self._driver.world.now - flight.sent_at, None, Code.DEADLINE)
            self._finish(Code.DEADLINE, None)

    def _finish(self, code: Code | None, retry_ms: int | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(code, retry_ms)
