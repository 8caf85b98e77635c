"""Asking a larger model again where an answer is uncertain (`Manifest.cascade`).

The node that ran the small model says so in its answer; the router that decided on the request asks the larger one, if
that can answer within what is left of the deadline. The first answer is kept in hand: whatever goes wrong, it is given.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from nearcast.errors import MeshError
from nearcast.handler import InferRequest, InferResponse, RequestContext
from nearcast.wire.request import StandInRequest
from router.policy import Policy, Reject, RequestFacts, Send

_MUST_FIT = 2
"""From this priority on a request is sent only where its 95th percentile fits."""
_KEPT_BACK_SHARE = 0.1
"""Of the time that is left when the first answer is there."""


class Cascade:
    """Escalates uncertain answers of one router, once each.

    Args:
        policy: decides where the larger model is asked.
        now: the monotonic clock, in seconds.
        describe: the facts of a request, with the version that its channel chooses.
        run: carries out a decision.
        counts: of uncertain answers, by what became of them: "escalated", "kept_late" (the larger model could not
            answer in time) or "kept_failed" (it broke its word).
    """

    def __init__(
        self,
        policy: Policy,
        now: Callable[[], float],
        describe: Callable[[float, InferRequest, RequestContext], RequestFacts],
        run: Callable[[Send, RequestFacts, InferRequest, RequestContext], Awaitable[InferResponse]],
        counts: dict[str, int],
    ) -> None:
        self._policy = policy
        self._now = now
        self._describe = describe
        self._run = run
        self._counts = counts

    async def follow(self, answer: InferResponse, request: InferRequest, context: RequestContext) -> InferResponse:
        """The larger model's answer, or the one in hand if there can be no better one in time.

        A client that named a version, or a sequence, wants that and nothing else.
        """
        if request.version or request.sequence_id:
            return answer
        now = self._now()
        larger = StandInRequest(request, answer.served.escalate)
        # What is kept back brings the answer in hand home if the larger model breaks its word.
        deadline = context.deadline
        if deadline is not None:
            deadline -= max(self._policy.config.reserve_ms / 1e3, _KEPT_BACK_SHARE * (deadline - now))
        context = msgspec.structs.replace(context, deadline=deadline, priority=max(_MUST_FIT, context.priority))
        facts = self._describe(now, larger, context)
        decision = self._policy.decide(now, facts)
        if isinstance(decision, Reject) or decision.model:
            self._counts["kept_late"] += 1
            return answer
        try:
            better = await self._run(decision, facts, larger, context)
        except MeshError:
            self._counts["kept_failed"] += 1
            return answer
        self._counts["escalated"] += 1
        return better
