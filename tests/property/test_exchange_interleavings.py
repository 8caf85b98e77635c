"""Every order in which a few things can happen to two requests at two targets, played through the real parts.

Bounded model checking without a model: after each sequence of events the real `Exchange` and `Policy` are played from
the start, and the next event is each of those that are possible then. Sends end with an answer, a fault or a lost
connection, hedge delays pass, clients leave, breakers open and try again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse, Served
from nearcast.load import NodeReport, VersionReport
from nearcast.wire.response import TensorResponse
from router.exchange import Exchange
from router.policy import Policy, PolicyConfig, Reject, RequestFacts, Send
from router.statistics import RouterStatistics
from router.timers import Timers

DEPTH = 4
REQUESTS = 2
TURNS = 6
FACTS = RequestFacts(model="m", version="1", remaining_s=2.0)
ANSWER = TensorResponse(model="m", version="1", outputs={"y": np.zeros(1)}, served=Served(compute_us=900))
ENDS = {
    "answer": None,
    "fault": MeshError(Code.INTERNAL, "A fault."),
    "loss": MeshError(Code.UNAVAILABLE, "The connection broke."),
    "refusal": MeshError(Code.OVERLOADED, "Busy.", retry_after_ms=5),
}


class ManualTimers(Timers):
    """Rings when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.due: list[Callable[[], None]] = []

    def call_at(self, when: float, callback: Callable[[], None]) -> None:
        self.due.append(callback)


class World:
    """Two targets with a slot each, and what has been done so far."""

    def __init__(self) -> None:
        self.now = 0.0
        config = PolicyConfig(breaker_failures=1, hedge_burst=2, retry_burst=2, breaker_open_ms=50)
        self.policy = Policy(config, seed=1)
        version = VersionReport(model="m", version="1", service_p50_us=1000, service_p95_us=2000)
        for name in ("a", "b"):
            self.policy.add_target(0.0, name, "peer")
            self.policy.on_report(0.0, name, NodeReport(node=name, role="edge", versions=(version,)))
            self.policy.on_probe(0.0, name, 0.001)
        self.timers = ManualTimers()
        self.requests: list[asyncio.Task[InferResponse] | None] = []
        self.left: set[int] = set()
        self.calls: list[tuple[int, asyncio.Future[InferResponse]]] = []
        self.waited = False

    def possible(self) -> list[tuple[str, int]]:
        """What can happen next."""
        events = [("start", len(self.requests))] if len(self.requests) < REQUESTS else []
        events += [("ring", i) for i in range(len(self.timers.due))]
        events += [(end, i) for i, (_, call) in enumerate(self.calls) if not call.done() for end in ENDS]
        events += [("leave", i) for i, task in enumerate(self.requests) if task is not None and not task.done()]
        return events if self.waited else [*events, ("wait", 0)]

    async def do(self, event: str, which: int) -> None:
        """Let one thing happen, and everything that follows at once."""
        self.now += 0.001
        if event == "start":
            self._start(which)
        elif event == "ring":
            self.timers.due.pop(which)()
        elif event == "leave":
            task = self.requests[which]
            assert task is not None
            self.left.add(which)
            task.cancel()
        elif event == "wait":
            self.waited = True
            self.now += 0.06
        else:
            call, error = self.calls[which][1], ENDS[event]
            if error is None:
                call.set_result(ANSWER)
            else:
                call.set_exception(error)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        self.check()
        if event == "answer":
            task = self.requests[self.calls[which][0]]
            assert task is not None
            assert task.done(), "the first answer wins"

    def _start(self, which: int) -> None:
        decision = self.policy.decide(self.now, FACTS)
        if isinstance(decision, Reject):
            self.requests.append(None)
            return

        def call(send: Send) -> asyncio.Future[InferResponse]:
            made: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()
            self.calls.append((which, made))
            return made

        exchange = Exchange(self.policy, lambda: self.now, call, FACTS, self.now + 2.0, RouterStatistics(), self.timers)
        self.requests.append(asyncio.get_running_loop().create_task(exchange.run(decision)))

    def check(self) -> None:
        """What is outstanding is in flight, and nothing is in flight for a request that is over."""
        open_calls = [which for which, call in self.calls if not call.done()]
        assert self.policy.outstanding == len(open_calls)
        assert sum(target.own for target in self.policy.targets) == len(open_calls)
        for which, task in enumerate(self.requests):
            calls = open_calls.count(which)
            assert calls == 0 if task is None or task.done() else 1 <= calls <= 2
            if task is not None and task.done() and which not in self.left:
                assert not task.cancelled(), "only its client ends a request without a word"
        for target in self.policy.targets:
            breakers = (target.breaker, *target.breakers.values())
            assert all(0 <= breaker.trials <= len(open_calls) for breaker in breakers)

    async def finish(self) -> None:
        """Answer what is open; nothing is left."""
        while open_calls := [i for i, (_, call) in enumerate(self.calls) if not call.done()]:
            await self.do("answer", open_calls[0])
        tasks = [task for task in self.requests if task is not None]
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, InferResponse | MeshError | asyncio.CancelledError)
        assert self.policy.outstanding == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def explore() -> int:
    """Play every sequence of at most `DEPTH` events; returns how many there were."""
    played = 0
    stack: list[tuple[tuple[str, int], ...]] = [()]
    while stack:
        sequence = stack.pop()
        world = World()
        for event in sequence:
            await world.do(*event)
        if len(sequence) < DEPTH:
            stack += [(*sequence, event) for event in world.possible()]
        await world.finish()
        played += 1
    return played


def test_no_order_of_events_loses_or_leaks_a_request() -> None:
    assert asyncio.run(explore()) > 500
