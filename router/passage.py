"""One request that passes through as bytes: what `Exchange` is to coroutines, by callbacks.

The first send and its retries are calls of the channel itself, told of their end in the turn of the loop in which the
last bytes came. What is rare costs a task: a hedge, a node that cannot be asked so, an answer that is looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, RequestContext, Served
from nearcast.telemetry import get_logger
from nearcast.transport.passed import read_served
from nearcast.transport.seam import CallError, Fields, PassedCall, Reply, Responder
from nearcast.transport.statistics import Statistics
from nearcast.wire.response import WireResponse
from nearcast.wire.status import served_to_fields
from router.exchange import read_outcome
from router.policy import Attempt, Outcome, RequestFacts, Send
from router.policy.events import ABANDONED

if TYPE_CHECKING:
    from router.router import Router

_log = get_logger(__name__)
_LEFT = "The target has just left the mesh; try again."
_BROKEN = "The target failed in an unexpected way; try again."


class Passage:
    """Carries out one decision and answers the client's call. The first valid answer wins, the loser is cancelled.

    Args:
        router: whose request this is.
        request: kept until it is answered, to be sent again.
        context: its surroundings.
        facts: of the request, as decided upon.
        responder: the client's call.
        counts: counts what passes; None = nobody does.
        began: monotonic instant.
    """

    # One is made for each request, and most of this stays as it is: on the class it costs nothing.
    _attempt: Attempt | None = None
    _send: Send | None = None
    _call: PassedCall | None = None
    _task: asyncio.Task[None] | None = None
    _hedge: asyncio.Task[None] | None = None
    # Of the last send, while its hedge may still save the request.
    _failure: tuple[Outcome, MeshError] | None = None

    def __init__(
        self,
        router: Router,
        request: InferRequest,
        context: RequestContext,
        facts: RequestFacts,
        responder: Responder,
        counts: Statistics | None,
        began: float,
    ) -> None:
        self._router = router
        self._request: InferRequest | None = request
        self._context = context
        self._facts = facts
        # None = it is over.
        self._responder: Responder | None = responder
        self._counts = counts
        self._began = began
        self._tried: list[str] = []

    def go(self, now: float, send: Send, kind: str = "first") -> None:
        """Send the request. Whatever comes of it, the responder is told."""
        router = self._router
        try:
            self._attempt = attempt = router.policy.on_sent(now, self._facts, send, kind)
        except KeyError:
            self._refuse(MeshError(Code.UNAVAILABLE, _LEFT, sent=False))
            return
        self._send = send
        self._tried.append(send.target)
        if send.hedge_after_s is not None:
            router.timers.call_at(now + send.hedge_after_s, self._fire)
        node = router.direct.get(send.target)
        if node is not None and not send.model:
            # Where no pointer has named a version, the node's own pointer does.
            version = send.version if self._facts.version else ""
            try:
                self._call = node.pass_on(cast("InferRequest", self._request), self._context, version, now, self)
            except MeshError as error:
                self._fail(attempt, error)
                return
            if self._call is not None:
                return
        self._task = router.spawn(self._walk(attempt, send))

    def cancel(self) -> None:
        """Nobody waits for the answer any more, or its deadline has passed."""
        attempt, deadline = self._attempt, self._context.deadline
        if self._responder is None or attempt is None:
            return
        now = self._router.now()
        is_late = deadline is not None and now >= deadline
        if attempt.open:
            self._close(now, attempt, Outcome(Code.DEADLINE) if is_late else ABANDONED)
        if self._call is not None:
            self._call.abandon(is_late=is_late)
        if self._task is not None:
            self._task.cancel()
        if is_late and self._counts is not None:
            self._counts.fail(self._facts.model, self._facts.version, now - self._began)
        self._end()

    # What the channel says.

    def on_answer(self, pieces: Sequence[bytes], trailers: Fields) -> None:
        try:
            self._pass_back(pieces, trailers)
        except Exception:  # noqa: BLE001 - it would end the connection, and with it everybody else's calls
            self._break("answer_failed")

    def on_error(self, error: CallError, *, is_refused: bool) -> None:
        self._call = None
        attempt = cast("Attempt", self._attempt)
        try:
            if is_refused:
                # The channel knows how to wait and ask again; for the policy it is still the same send.
                self._task = self._router.spawn(self._walk(attempt, cast("Send", self._send)))
            else:
                self._fail(attempt, error)
        except Exception:  # noqa: BLE001 - as above
            self._break("retry_failed")

    def _pass_back(self, pieces: Sequence[bytes], trailers: Fields) -> None:
        attempt = cast("Attempt", self._attempt)
        target = attempt.target
        served, passed = read_served(trailers, target, attempt.release)
        router = self._router
        now = router.now()
        router.policy.on_reply(now, attempt, Outcome(served=served))
        router.statistics.count(target, None)
        if served.escalate:
            self._follow(pieces, served)
            return
        if self._counts is not None:
            self._counts.succeed(self._facts.model, served.version, served, now - self._began)
        self._end().pass_back(pieces, passed)

    def _break(self, event: str) -> None:
        """Something that cannot happen has happened: the client is answered all the same."""
        _log.exception(event)
        if self._responder is not None:
            self._refuse(MeshError(Code.INTERNAL, _BROKEN, sent=True))

    # The slow ways.

    async def _walk(self, attempt: Attempt, send: Send) -> None:
        """One send by a coroutine."""
        try:
            response = await self._ask(send)
        except asyncio.CancelledError:
            # Not by us, who would have closed it before.
            if attempt.open:
                self._fail(attempt, MeshError(Code.CANCELLED, "The send was cancelled.", sent=True))
            raise
        except MeshError as error:
            self._task = None
            self._fail(attempt, error)
        except Exception as error:  # noqa: BLE001 - whatever breaks, the client is answered
            _log.exception("send_failed", target=send.target)
            self._task = None
            failure = MeshError(Code.INTERNAL, _BROKEN, sent=True)
            failure.__cause__ = error
            self._fail(attempt, failure)
        else:
            self._task = None
            self._close(self._router.now(), attempt, Outcome(served=response.served))
            await self._answer(response)

    def _ask(self, send: Send) -> Awaitable[InferResponse]:
        request = cast("InferRequest", self._request)
        return self._router.ask(send, request, self._context, self._facts)

    def _follow(self, pieces: Sequence[bytes], served: Served) -> None:
        message = pieces[0] if len(pieces) == 1 else b"".join(pieces)

        async def follow() -> None:
            try:
                response = WireResponse(message[5:], served)
            except MeshError as error:
                self._refuse(error)
                return
            await self._answer(response)

        self._task = self._router.spawn(follow())

    async def _answer(self, response: InferResponse) -> None:
        """Answer with a response, or with a better one."""
        if self._responder is None:
            return
        if response.served.escalate:
            response = await self._router.escalate(response, cast("InferRequest", self._request), self._context)
        if self._counts is not None:
            elapsed_s = self._router.now() - self._began
            self._counts.succeed(self._facts.model, response.version, response.served, elapsed_s)
        self._task = None
        self._end().reply(Reply(response.encode_pieces(), fields=served_to_fields(response.served)))

    # The hedge.

    def _fire(self) -> None:
        """The hedge delay is over."""
        attempt = self._attempt
        if self._responder is None or attempt is None or not (attempt.open and attempt.timed):
            return
        router = self._router
        now = router.now()
        copy = router.policy.hedge(now, self._remaining(now), attempt, self._tried)
        if copy is not None:
            self._hedge = router.spawn(self._hedge_with(copy))

    async def _hedge_with(self, copy: Send) -> None:
        # The target may have left in this very turn.
        with suppress(KeyError):
            if await self._run_hedge(copy):
                return
        self._hedge = None
        if self._failure is not None:
            self._again(*self._failure)

    async def _run_hedge(self, copy: Send) -> bool:
        """Send a copy; whether it has answered the request."""
        router = self._router
        # Here and not where the task is made: a task that is cancelled before its first step never gets here.
        attempt = router.policy.on_sent(router.now(), self._facts, copy, "hedge")
        router.statistics.hedges += 1
        self._tried.append(copy.target)
        try:
            response = await self._ask(copy)
        except asyncio.CancelledError:
            router.policy.on_reply(router.now(), attempt, ABANDONED)
            raise
        except MeshError as error:
            # The first send is still on its way, or has failed and says why itself.
            self._close(router.now(), attempt, read_outcome(error))
        except Exception:  # noqa: BLE001 - nobody awaits this task; what broke is logged and counted
            self._close(router.now(), attempt, Outcome(Code.INTERNAL))
            _log.exception("hedge_failed", target=copy.target)
        else:
            self._win(attempt, response)
            await self._answer(response)
            return True
        return False

    def _win(self, attempt: Attempt, response: InferResponse) -> None:
        """The copy was first."""
        router, first = self._router, self._attempt
        now = router.now()
        self._close(now, attempt, Outcome(served=response.served))
        router.statistics.hedges_won += 1
        # From here on this task is the request's own.
        self._task, self._hedge, loser = self._hedge, None, self._task
        if first is not None and first.open:
            self._close(now, first, ABANDONED)
        if self._call is not None:
            self._call.abandon()
            self._call = None
        if loser is not None:
            loser.cancel()

    # Ends.

    def _fail(self, attempt: Attempt, error: MeshError) -> None:
        """A send has failed: its hedge, or another send, may still save the request."""
        if self._responder is None:
            return
        outcome = read_outcome(error)
        self._close(self._router.now(), attempt, outcome)
        if self._hedge is not None:
            self._failure = outcome, error
        else:
            self._again(outcome, error)

    def _again(self, outcome: Outcome, error: MeshError) -> None:
        router = self._router
        self._failure = None
        now = router.now()
        attempt = cast("Attempt", self._attempt)
        again = router.policy.retry(now, self._remaining(now), attempt, outcome, self._tried)
        if again is None:
            self._refuse(error)
        else:
            router.statistics.retries += 1
            self.go(now, again, "retry")

    def _refuse(self, error: MeshError) -> None:
        if self._counts is not None:
            self._counts.fail(self._facts.model, self._facts.version, self._router.now() - self._began)
        self._end().refuse(error)

    def _end(self) -> Responder:
        responder, self._responder = self._responder, None
        # A timer may hold us until its instant; it must not hold the request's tensors.
        self._request = self._call = None
        if self._hedge is not None:
            self._hedge.cancel()
            self._hedge = None
        return cast("Responder", responder)

    def _close(self, now: float, attempt: Attempt, outcome: Outcome) -> None:
        router = self._router
        router.policy.on_reply(now, attempt, outcome)
        router.statistics.count(attempt.target, outcome.code)

    def _remaining(self, now: float) -> RequestFacts:
        deadline = self._context.deadline
        if deadline is None:
            return self._facts
        return msgspec.structs.replace(self._facts, remaining_s=max(0.0, deadline - now))
