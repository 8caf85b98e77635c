"""One request on its way: the send, its hedge, its retries, and the accounting of each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse
from nearcast.telemetry import get_logger
from nearcast.transport.seam import CallError
from nearcast.wire.status import CODE
from router.policy import Attempt, Outcome, Policy, RequestFacts, Send
from router.policy.events import ABANDONED
from router.statistics import RouterStatistics
from router.timers import Timers

_log = get_logger(__name__)


class Exchange:
    """Carries out one decision. The first valid answer wins, the loser is cancelled.

    The first send runs in the caller's task: only a hedge, one request in twenty at most, costs a task of its own.

    Args:
        policy: told of every event, asked for hedges and retries.
        now: the monotonic clock.
        call: sends the request to a target; cancelling it resets the call.
        facts: of the request, as decided upon.
        deadline: monotonic instant; None = none.
        statistics: counts what happens.
        timers: wakes us when a hedge delay is over.
    """

    __slots__ = (
        "_attempt", "_call", "_cancelling", "_deadline", "_facts", "_hedge", "_last", "_now", "_parent", "_policy",
        "_racing", "_statistics", "_timers", "_tried", "_winner",
    )  # fmt: skip

    def __init__(
        self,
        policy: Policy,
        now: Callable[[], float],
        call: Callable[[Send], Awaitable[InferResponse]],
        facts: RequestFacts,
        deadline: float | None,
        statistics: RouterStatistics,
        timers: Timers,
    ) -> None:
        self._policy = policy
        self._now = now
        self._call = call
        self._facts = facts
        self._deadline = deadline
        self._statistics = statistics
        self._timers = timers
        self._tried: list[str] = []
        self._attempt: Attempt | None = None
        self._last: tuple[Attempt, Outcome] | None = None
        self._racing = False
        self._hedge: asyncio.Task[None] | None = None
        self._winner: InferResponse | None = None
        self._parent: asyncio.Task[object] | None = None
        self._cancelling = 0

    async def run(self, send: Send) -> InferResponse:
        """Answer the request.

        Raises:
            MeshError: of the last send, once no other is possible.
        """
        kind = "first"
        try:
            while True:
                try:
                    return await self._send(send, kind)
                except MeshError:
                    again = self._again()
                    if again is None:
                        raise
                    self._statistics.retries += 1
                    send, kind = again, "retry"
        finally:
            # A timer may hold us until its instant; it must not hold the request's tensors.
            self._call = _spent
            self._winner = None

    async def _send(self, send: Send, kind: str) -> InferResponse:
        now = self._now()
        attempt = self._attempt = self._policy.on_sent(now, self._facts, send, kind)
        self._tried.append(send.target)
        self._last = None
        if send.hedge_after_s is not None:
            self._parent = asyncio.current_task()
            self._cancelling = self._parent.cancelling() if self._parent is not None else 0
            self._racing = True
            self._timers.call_at(now + send.hedge_after_s, self._fire)
        try:
            response = await self._call(send)
        except asyncio.CancelledError:
            self._close(attempt, ABANDONED)
            if (winner := self._claim_victory()) is None:
                raise
            return winner
        except MeshError as error:
            self._close(attempt, read_outcome(error))
            if (winner := await self._wait_for_hedge()) is None:
                raise
            return winner
        except Exception as error:
            self._close(attempt, Outcome(Code.INTERNAL))
            raise MeshError(Code.INTERNAL, "The target failed in an unexpected way; try again.", sent=True) from error
        else:
            self._close(attempt, Outcome(served=response.served))
            return response
        finally:
            self._racing = False
            if self._hedge is not None:
                self._hedge.cancel()
                self._hedge = None

    def _close(self, attempt: Attempt, outcome: Outcome) -> None:
        self._policy.on_reply(self._now(), attempt, outcome)
        self._statistics.count(attempt.target, outcome.code)
        if outcome.code is not None:
            self._last = (attempt, outcome)

    def _again(self) -> Send | None:
        if self._last is None:
            return None
        attempt, outcome = self._last
        return self._policy.retry(self._now(), self._remaining(), attempt, outcome, self._tried)

    def _remaining(self) -> RequestFacts:
        if self._deadline is None:
            return self._facts
        return msgspec.structs.replace(self._facts, remaining_s=max(0.0, self._deadline - self._now()))

    # The hedge -------------------------------------------------------------------------------------------------------

    def _fire(self) -> None:
        """The hedge delay is over."""
        if not self._racing or self._attempt is None:
            return
        copy = self._policy.hedge(self._now(), self._remaining(), self._attempt, self._tried)
        if copy is not None:
            self._hedge = asyncio.get_running_loop().create_task(self._run_hedge(copy))

    async def _run_hedge(self, copy: Send) -> None:
        try:
            # Here and not where the task is made: a task that is cancelled before its first step never gets here.
            attempt = self._policy.on_sent(self._now(), self._facts, copy, "hedge")
        except KeyError:
            return
        self._statistics.hedges += 1
        self._tried.append(copy.target)
        try:
            response = await self._call(copy)
        except asyncio.CancelledError:
            self._policy.on_reply(self._now(), attempt, ABANDONED)
            raise
        except MeshError as error:
            # The first send is still on its way, or has failed and says why itself.
            self._policy.on_reply(self._now(), attempt, read_outcome(error))
            self._statistics.count(copy.target, error.code)
            return
        except Exception:  # noqa: BLE001 - nobody awaits this task; what broke is logged and counted
            self._policy.on_reply(self._now(), attempt, Outcome(Code.INTERNAL))
            self._statistics.count(copy.target, Code.INTERNAL)
            _log.exception("hedge_failed", target=copy.target)
            return
        self._policy.on_reply(self._now(), attempt, Outcome(served=response.served))
        self._statistics.count(copy.target, None)
        self._statistics.hedges_won += 1
        self._winner = response
        if self._racing and self._parent is not None:
            self._parent.cancel()

    def _claim_victory(self) -> InferResponse | None:
        """After a cancellation: the hedge's answer, if it was the hedge that cancelled us and nobody else did too."""
        if self._winner is None or self._parent is None:
            return None
        return self._winner if self._parent.uncancel() <= self._cancelling else None

    async def _wait_for_hedge(self) -> InferResponse | None:
        """After a failure: what the hedge that is on its way brings."""
        self._racing = False
        if self._hedge is not None:
            await asyncio.wait({self._hedge})
        return self._winner


def read_outcome(error: MeshError) -> Outcome:
    """What the policy learns from an error; a status that names our own code was sent by the target itself."""
    told = isinstance(error, CallError) and any(name == CODE for name, _ in error.trailers)
    return Outcome(error.code, error.sent, error.retry_after_ms, told=told)


async def _spent(_: Send) -> InferResponse:
    raise RuntimeError("this exchange is over")
