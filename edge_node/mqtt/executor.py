"""From an accepted request to its one answer: deadline, sequence, model, status."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext

from edge_node.mqtt import envelope
from edge_node.mqtt.admission import Request
from edge_node.mqtt.lanes import Lanes, Recent
from edge_node.mqtt.ledger.records import NOTICE_EXPIRY_S, Reply
from edge_node.mqtt.limits import RequestLimits
from edge_node.mqtt.models import MODELS_MAX, KnownModels
from edge_node.mqtt.patience import Patience
from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import (
    InferenceHandler,
    InferRequest,
    InferResponse,
    ModelDirectory,
    ModelMetadata,
    Parameter,
    RequestContext,
)
from nearcast.telemetry import get_logger
from nearcast.transport.context import read_trace
from nearcast.transport.mqtt.status import EXPIRED
from nearcast.wire.status import TRACE

SEQUENCE_ID_LENGTH_MAX = 128
_log = get_logger("nearcast.mqtt")


class Executor:
    """Runs requests on a handler, at most `in_flight_max` at a time.

    Args:
        handler: the router, or a model host.
        directory: tells a model's tensors and its kind of state.
        limits: bounds.
        clock: monotonic time of the deadlines.
        sees_mesh: whether it is known now what other nodes hold; while it is not, an unknown model may exist.
    """

    def __init__(
        self,
        handler: InferenceHandler,
        directory: ModelDirectory,
        *,
        limits: RequestLimits,
        clock: Clock,
        sees_mesh: Callable[[], bool] = lambda: True,
    ) -> None:
        self._handler = handler
        self._models = KnownModels(directory, clock)
        self._limits = limits
        self._clock = clock
        self._slots = asyncio.Semaphore(limits.in_flight_max)
        self._lanes = Lanes()
        self._stateless = Recent(MODELS_MAX)
        self._sequences = Recent(limits.sequences_max)
        self._sees_mesh = sees_mesh
        self._patience = Patience(limits, random.Random())

    async def close(self) -> None:
        """No request comes any more."""
        await self._models.close()

    async def answer(self, request: Request, payload: bytes) -> Reply:
        """The answer, whatever happens. Only cancellation passes through."""
        now = self._clock.monotonic()
        started = False
        try:
            if now >= request.deadline:
                raise TimeoutError
            if self._patience.waiting and self._lanes.users >= self._limits.outlasting_max:
                raise MeshError(Code.UNAVAILABLE, "Too many requests wait for a model that is away; try again later.")
            async with asyncio.timeout(request.deadline - now), self._lane(request):
                attempt = 0
                while True:
                    try:
                        async with self._slots:
                            started = True
                            return await self._run(request, payload)
                    except MeshError as error:
                        await self._outlast(error, request, attempt)
                        attempt += 1
        except TimeoutError:
            if started:
                return self._failure(request, MeshError(Code.DEADLINE, "The model did not answer within the deadline."))
            return self.expired(request)
        except MeshError as error:
            return self._failure(request, error)
        except Exception:  # noqa: BLE001  # one request must not end the worker
            _log.exception("a request failed unexpectedly", model=request.model)
            return self._failure(request, MeshError(Code.INTERNAL, "The node failed on this request; see its log."))

    def expired(self, request: Request) -> Reply:
        """The answer to a request that was never run, because nobody waits for it any more."""
        error = MeshError(Code.DEADLINE, "The deadline passed before the model ran; send a longer deadline.")
        return self._failure(request, error, status=EXPIRED)

    def quarantined(self, request: Request) -> Reply:
        """The answer to a request that was being executed each time that the node crashed."""
        error = MeshError(Code.INTERNAL, "The node crashed each time that it ran this request; it is not tried again.")
        return self._failure(request, error)

    def _failure(self, request: Request, error: MeshError, *, status: int | None = None) -> Reply:
        notice_until = self._clock.monotonic() + NOTICE_EXPIRY_S
        expires = max(request.deadline, notice_until)
        return envelope.error_reply(request, error, status=status, expires=expires)

    async def _outlast(self, error: MeshError, request: Request, attempt: int) -> None:
        """Wait for the next try of a request whose model nobody can be asked for now.

        Raises:
            MeshError: the same error, if it is the answer.
        """
        key = request.model, request.version
        wait_s = self._patience.wait_s(
            error,
            attempt,
            request.deadline - self._clock.monotonic(),
            is_missed=key in self._models or not self._sees_mesh(),
            is_safe=request.model in self._stateless,
        )
        if wait_s is None:
            if error.code is Code.MODEL_NOT_FOUND:
                self._models.forget(key)  # the next one need not wait for what has gone for good
            if attempt:
                error.retry_after_ms = None  # that would say `not accepted`, and this one was, long ago
            raise error
        self._patience.waiting += 1
        try:
            await asyncio.sleep(wait_s)
        finally:
            self._patience.waiting -= 1

    def _lane(self, request: Request) -> AbstractAsyncContextManager[None]:
        """Requests for one model of one device keep their order, unless the model is known to hold no hidden state."""
        if request.model in self._stateless:
            return nullcontext()
        return self._lanes.enter((request.tenant, request.device, request.model))

    async def _run(self, request: Request, payload: bytes) -> Reply:
        metadata = await self._models.metadata(request.model, request.version)
        if metadata.properties.get("stateful") != "hidden":
            self._stateless.add(request.model)
            inference = envelope.to_inference(request, payload, metadata, {})
            response = await self._handler.infer(inference, self._context(request))
        else:
            response = await self._run_in_sequence(request, payload, metadata)
        return envelope.reply(request, response)

    async def _run_in_sequence(self, request: Request, payload: bytes, metadata: ModelMetadata) -> InferResponse:
        """A model with hidden state: each device is a sequence of its own, and its first message starts it.

        A device cannot name another's sequence, because its ids lie below its own name.
        """
        own = request.user.get("sequence-id", "")
        if len(own) > SEQUENCE_ID_LENGTH_MAX:
            raise MeshError(Code.INVALID_REQUEST, f"sequence-id may have at most {SEQUENCE_ID_LENGTH_MAX} characters.")
        name = f"{request.device}/{own}" if own else request.device
        key = (request.tenant, request.model, name)
        start = _flag(request.user, "sequence-start") or key not in self._sequences
        end = _flag(request.user, "sequence-end")
        context = self._context(request)

        def inference(*, start: bool) -> InferRequest:
            parameters: dict[str, Parameter] = {"sequence_id": name, "sequence_start": start, "sequence_end": end}
            return envelope.to_inference(request, payload, metadata, parameters)

        self._sequences.discard(key)
        try:
            response = await self._handler.infer(inference(start=start), context)
        except MeshError as error:
            if error.code is Code.UNAVAILABLE and not (start or error.sent):
                self._sequences.add(key)  # nothing has run: the next try goes on where the sequence is
            if start or error.code is not Code.INVALID_REQUEST:
                raise
            # The host may have dropped an idle sequence or replaced the version: the device need not know.
            response = await self._handler.infer(inference(start=True), context)
        if not end:
            self._sequences.add(key)
        return response

    def _context(self, request: Request) -> RequestContext:
        return RequestContext(
            deadline=request.deadline,
            priority=_priority(request.user),
            tenant=request.tenant,
            principal=f"device:{request.tenant}/{request.device}",
            idempotency_key=request.correlation.hex() if request.echo else "",
            trace=read_trace(request.user.get(TRACE, "")),
        )


def _flag(user: Mapping[str, str], name: str) -> bool:
    return user.get(name, "").lower() in {"1", "true"}


def _priority(user: Mapping[str, str]) -> int:
    text = user.get("priority", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 4 else 0
