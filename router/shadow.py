"""Copies of requests for a version or model that nobody depends on yet.

A share of the requests is assigned to a shadow, by the same hash that assigns candidates. A copy starts when its user
has been answered, in a task of its own, and takes only room that nobody needs: nothing here can delay, change or fail
an answer. What is assigned and not sent is counted with its reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, RequestContext
from nearcast.wire.request import StandInRequest
from router.policy import Outcome, Policy, Reject, RequestFacts, Send, assign, sticky_key
from router.policy.events import ABANDONED

CopyOutcome: TypeAlias = Literal[
    "answered", "same", "different", "failed", "dropped_full", "dropped_large", "dropped_busy", "dropped_refused"
]
_LOWEST_PRIORITY = 9


class ShadowConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One shadow.

    Attributes:
        model: whose requests are copied.
        to_model: who gets the copies; "" = the same model.
        to_version: which version of it; "" = what its channel serves.
        share: of the clients (or requests, where they have no identity) that are assigned, in [0, 1].
        salt: another one draws other clients.
        compare: an output; answers agree if its largest value is at the same place in every row. "" = not compared.
    """

    model: str
    to_model: str = ""
    to_version: str = ""
    share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    salt: str = "shadow"
    compare: str = ""

    def __post_init__(self) -> None:
        if not self.to_version and self.to_model in ("", self.model):
            raise ValueError("a shadow needs a to_version, or a to_model that is another one")


class ShadowLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of all shadows of one router.

    Attributes:
        in_flight_max: copies at the same time.
        size_bytes_max: a larger request is not copied.
        utilisation_max: a copy goes only to a target whose slots are used at most to this share.
        timeout_ms: after this a copy is given up.
    """

    in_flight_max: Annotated[int, msgspec.Meta(ge=0)] = 8
    size_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 1024 * 1024
    utilisation_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.6
    timeout_ms: Annotated[float, msgspec.Meta(gt=0)] = 2000.0


class Shadows:
    """The shadows of one router. Lives on its loop.

    Args:
        configs: one per model; a later one for the same model replaces the earlier.
        policy: says where a copy goes, and is told of it, so that the load of targets is known.
        now: the monotonic clock, in seconds.
        call: sends one attempt.
        counts: of requests that were assigned, by model and outcome.
        limits: bounds.
    """

    def __init__(
        self,
        configs: Sequence[ShadowConfig],
        *,
        policy: Policy,
        now: Callable[[], float],
        call: Callable[[Send, InferRequest, RequestContext], Awaitable[InferResponse]],
        counts: dict[tuple[str, str], int],
        limits: ShadowLimits | None = None,
    ) -> None:
        self._configs = {config.model: config for config in configs}
        self._limits = limits or ShadowLimits()
        self._policy = policy
        self._now = now
        self._call = call
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._counts = counts

    @property
    def models(self) -> tuple[str, ...]:
        """Models whose requests may be copied."""
        return tuple(self._configs)

    def offer(self, request: InferRequest, context: RequestContext, answer: InferResponse) -> None:
        """Copy an answered request if it is assigned. Cheap; the copy starts when the answer is on its way."""
        config = self._configs.get(request.model)
        if config is None or request.sequence_id or not self._is_assigned(config, request, context):
            return
        if request.size_bytes > self._limits.size_bytes_max:
            self._count(config, "dropped_large")
        elif len(self._tasks) + self._waiting >= self._limits.in_flight_max:
            self._count(config, "dropped_full")
        else:
            self._waiting += 1
            asyncio.get_running_loop().call_soon(self._start, config, request, context, answer)

    async def close(self) -> None:
        """Give up the copies that are on their way."""
        self._configs.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _is_assigned(self, config: ShadowConfig, request: InferRequest, context: RequestContext) -> bool:
        nonce = "" if context.principal or request.id else repr(self._now())
        key = sticky_key(sequence="", principal=context.principal, request_id=request.id, nonce=nonce)
        return assign(config.salt, context.tenant, key, config.share)

    def _start(
        self, config: ShadowConfig, request: InferRequest, context: RequestContext, answer: InferResponse
    ) -> None:
        self._waiting -= 1
        if not self._configs:
            return
        task = asyncio.get_running_loop().create_task(self._run(config, request, context, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(
        self, config: ShadowConfig, request: InferRequest, context: RequestContext, answer: InferResponse
    ) -> None:
        now, timeout_s = self._now(), self._limits.timeout_ms / 1e3
        model = config.to_model or request.model
        facts = RequestFacts(
            model=model,
            version=config.to_version,
            pinned=bool(config.to_version),
            size_bytes=request.size_bytes,
            remaining_s=timeout_s,
            idempotent=False,
            priority=_LOWEST_PRIORITY,
            tenant=context.tenant,
        )
        send = self._policy.decide(now, facts)
        if isinstance(send, Reject) or send.model:
            return self._count(config, "dropped_refused")
        if self._policy.utilisation(send.target) > self._limits.utilisation_max:
            return self._count(config, "dropped_busy")
        copy = request if model == request.model else StandInRequest(request, model)
        context = msgspec.structs.replace(
            context, deadline=now + timeout_s, priority=_LOWEST_PRIORITY, idempotency_key=""
        )
        attempt = self._policy.on_sent(now, facts, send, "shadow")
        outcome = ABANDONED
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._call(send, copy, context)
            outcome = Outcome(served=response.served)
            self._count(config, _compare(config.compare, answer, response))
        except TimeoutError:
            outcome = Outcome(Code.DEADLINE)
            self._count(config, "failed")
        except MeshError as error:
            outcome = Outcome(error.code, error.sent, error.retry_after_ms)
            self._count(config, "failed")
        finally:
            self._policy.on_reply(self._now(), attempt, outcome)

    def _count(self, config: ShadowConfig, outcome: CopyOutcome) -> None:
        key = (config.model, outcome)
        self._counts[key] = self._counts.get(key, 0) + 1


def _compare(output: str, answer: InferResponse, copy: InferResponse) -> CopyOutcome:
    """Whether both say the same: the largest value of `output` at the same place in every row."""
    if not output:
        return "answered"
    ours, theirs = answer.decode().get(output), copy.decode().get(output)
    if ours is None or theirs is None or ours.shape != theirs.shape or not ours.size:
        return "different"
    axis = -1 if ours.ndim else None
    return "same" if np.array_equal(ours.argmax(axis), theirs.argmax(axis)) else "different"
