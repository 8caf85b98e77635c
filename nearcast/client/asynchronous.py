"""The client for asyncio programs."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
import numpy as np

from nearcast.client.answer import Answer, ClientCounts, to_answer
from nearcast.client.leases import LeasedNodes
from nearcast.client.limits import ClientLimits
from nearcast.client.nodes import NamedNodes, Nodes
from nearcast.client.streams import Frames, LatestFrames, in_order
from nearcast.client.trace import current_trace
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import InferResponse, ModelMetadata, Parameter, RequestContext, Tensors
from nearcast.identity import Identity
from nearcast.transport.grpc import make_channel
from nearcast.transport.seam import Channel
from nearcast.wire.message import NO_PARAMETERS
from nearcast.wire.request import TensorRequest
from nearcast.wire.status import IDEMPOTENCY_KEY, PRIORITY, TRACE, require_metadata_value
from nearcast.wire.tensors import dtype_of
from router.policy import Policy, PolicyConfig, RequestFacts
from router.router import Router

DEFAULT_ADDRESS = "127.0.0.1:8001"
_ELSEWHERE = frozenset({Code.MODEL_NOT_FOUND, Code.VERSION_MISMATCH, Code.UNAVAILABLE})


class Wish(msgspec.Struct, frozen=True):
    """What a caller wants of a model, but for the arrays; see `AsyncClient.infer`."""

    model: str
    version: str
    outputs: Sequence[str]
    deadline_ms: float | None
    sequence: str
    priority: int
    idempotency_key: str
    parameters: Mapping[str, Parameter]


class AsyncClient:
    """Sends each request to the node that will answer it soonest: deadlines, hedges and retries by the mesh's policy.

    It learns the nodes in one of two ways:

    - from one address, of a router or of any node: it asks there for a *lease*, for each model a list of nodes with
      what is to be expected of them, renews it in the background and calls the nodes directly. What no leased node
      can take, and everything while no lease is to be had, goes through that address.
    - from a list of addresses: those nodes and no others are used; they are watched by readiness probes.

    ```python
    async with AsyncClient("10.0.0.5:8001") as client:
        answer = await client.infer("digits", {"x": image}, deadline_ms=50)
        print(answer.outputs["scores"].argmax(), answer.served_by, answer.latency_ms)
    ```

    Lives on one event loop and connects at the first call.

    Args:
        targets: `host:port` of a router or node that gives leases, or a list of client listeners.
        transport: "ngh2" or "grpcio".
        ca: PEM file of the authority that certified the nodes; None = plain connections. A leased node must then show
            the name, too, that the lease gives it.
        identity: the certificate to show.
        policy: parameters of the routing policy.
        limits: bounds.
        seed: makes the choices between near ties repeatable.
        clock: its monotonic time must be the loop's.

    Raises:
        MeshError: INVALID_REQUEST without an address.
    """

    def __init__(
        self,
        targets: str | Sequence[str] = DEFAULT_ADDRESS,
        *,
        transport: Literal["ngh2", "grpcio"] = "ngh2",
        ca: Path | None = None,
        identity: Identity | None = None,
        policy: PolicyConfig | None = None,
        limits: ClientLimits | None = None,
        seed: int | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not targets:
            raise MeshError(Code.INVALID_REQUEST, "A client needs the address of at least one node.")

        def connect(address: str, name: str) -> Channel:
            return make_channel(transport, address, identity=identity, ca=ca, name=name)

        self._limits = limits or ClientLimits()
        self._now = clock.monotonic
        self._policy = Policy(policy or PolicyConfig(), secrets.randbits(63) if seed is None else seed)
        self._router = Router(self._policy, node="client", forward=False, clock=clock)
        self._nodes: Nodes
        if isinstance(targets, str):
            is_secured = ca is not None or identity is not None
            self._nodes = LeasedNodes(targets, self._router, connect, self._limits, self._now, is_secured=is_secured)
        else:
            self._nodes = NamedNodes(targets, self._router, connect, self._limits, self._now)
        self._described: dict[str, ModelMetadata] = {}
        self._ids = itertools.count(1)
        self._prefix = secrets.token_hex(4)
        self._requests = self._answered = self._passed_on = self._dropped = self._open = 0
        self._failed: dict[Code, int] = {}
        self._closed = False

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def counts(self) -> ClientCounts:
        """What happened so far."""
        return ClientCounts(
            requests=self._requests,
            answered=self._answered,
            hedges=self._router.statistics.hedges,
            retries=self._router.statistics.retries,
            passed_on=self._passed_on,
            dropped=self._dropped,
            leases=self._nodes.leases,
            failed=dict(self._failed),
        )

    @property
    def in_flight(self) -> dict[str, int]:
        """Attempts under way, by the node that was asked."""
        return {target.name: target.own for target in self._policy.targets}

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        deadline_ms: float | None = 5000.0,
        sequence: str = "",
        priority: int = 0,
        idempotency_key: str = "",
        parameters: Mapping[str, Parameter] | None = None,
    ) -> Answer:
        """Ask a model. Cancelling the task cancels the request wherever it is.

        Args:
            model: its name.
            inputs: arrays by name; they must not change before the answer is there. Lists and numbers are made into
                arrays of the types that the model declares, which is asked for once.
            version: release to use; "" = what the channel serves.
            outputs: names of the outputs wanted; empty = all.
            deadline_ms: after this the answer is worthless; None = no deadline.
            sequence: the calls of one sequence go to one node and are neither hedged nor repeated.
            priority: 0 = default, 1 = highest, larger is lower.
            idempotency_key: makes repeating the call harmless.
            parameters: more protocol parameters.

        Raises:
            MeshError: the refusal, or the error of the last node that was asked; `code` says which of the catalogue.
        """
        wish = Wish(
            model, version, outputs, deadline_ms, sequence, priority, idempotency_key, parameters or NO_PARAMETERS
        )
        return await self._infer(wish, inputs, 0)

    async def stream(
        self,
        model: str,
        frames: Frames,
        *,
        latest: bool = False,
        version: str = "",
        outputs: Sequence[str] = (),
        deadline_ms: float | None = 5000.0,
        sequence: str = "",
        priority: int = 0,
        idempotency_key: str = "",
        parameters: Mapping[str, Parameter] | None = None,
    ) -> AsyncGenerator[Answer, None]:
        """Ask a model again and again; yields an answer for each of the `frames`, in their order.

        Each is a request for itself, with its own hedges and retries; some are under way at the same time, those of a
        `sequence` one after the other. The first that fails ends the stream.

        With `latest`, for cameras, all go to one node in one stream in which only the newest frame counts: a frame that
        waits when the next one comes is left out, and so is one that is late or refused; `Answer.index` tells which
        were answered. When the node is lost another one goes on. An iterable that makes frames faster than they are
        answered loses most of them.

        Args:
            model: its name.
            frames: arrays by name, one mapping per request; an iterable or an asynchronous one.
            latest: see above.
            version: as all that follows, of each frame and as in `infer`.
            outputs: names of the outputs wanted.
            deadline_ms: from when the frame is taken.
            sequence: the state that the frames share.
            priority: 0 = default, 1 = highest, larger is lower.
            idempotency_key: makes repeating harmless.
            parameters: more protocol parameters.

        Raises:
            MeshError: of the frame that ends the stream.
        """
        wish = Wish(
            model, version, outputs, deadline_ms, sequence, priority, idempotency_key, parameters or NO_PARAMETERS
        )
        if latest:
            answers = self._stream_latest(wish, frames)
        else:
            ahead = 1 if sequence else self._limits.stream_ahead
            answers = in_order(frames, lambda frame, index: self._infer(wish, frame, index), ahead=ahead)
        async with aclosing(answers):
            async for answer in answers:
                yield answer

    async def metadata(self, model: str, version: str = "", *, timeout_s: float = 5.0) -> ModelMetadata:
        """Tensors and versions of a model, from the first node that answers.

        Raises:
            MeshError: of the last node, such as MODEL_NOT_FOUND.
        """
        failure = MeshError(Code.UNAVAILABLE, "No node can be reached; check the addresses.")
        for node in self._nodes.every:
            try:
                return await node.metadata(model, version, deadline=self._now() + timeout_s)
            except MeshError as error:
                failure = error
        raise failure

    async def close(self) -> None:
        """Close all connections; calls in flight fail."""
        self._closed = True
        await self._router.close()
        await self._nodes.close()

    # Inside ----------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._closed:
            raise MeshError(Code.UNAVAILABLE, "This client is closed; make a new one.")
        self._nodes.start()

    async def _infer(self, wish: Wish, inputs: Mapping[str, Any], index: int) -> Answer:
        self._start()
        self._requests += 1
        self._open += 1
        started = self._now()
        try:
            if self._open > self._limits.in_flight_max:
                raise MeshError(
                    Code.OVERLOADED, f"This client has {self._limits.in_flight_max} requests in flight; wait for some."
                )
            for array in inputs.values():
                if type(array) is not np.ndarray:
                    inputs = await self._as_arrays(wish.model, inputs)
                    break
            request = self._request(wish, inputs)
            context = RequestContext(
                deadline=None if wish.deadline_ms is None else started + wish.deadline_ms / 1e3,
                priority=wish.priority,
                idempotency_key=wish.idempotency_key,
                trace=current_trace(),
            )
            if not self._nodes.knows(started, wish.model):
                await self._nodes.learn(wish.model, request.size_bytes, context.deadline, wish.priority)
            answer = to_answer(await self._send(request, context), self._now() - started, index)
        except MeshError as error:
            self._failed[error.code] = self._failed.get(error.code, 0) + 1
            raise
        except asyncio.CancelledError:
            self._failed[Code.CANCELLED] = self._failed.get(Code.CANCELLED, 0) + 1
            raise
        finally:
            self._open -= 1
        self._answered += 1
        return answer

    async def _send(self, request: TensorRequest, context: RequestContext) -> InferResponse:
        """To the best of the nodes known; what they cannot take, and have not taken, to who knows more."""
        try:
            return await self._router.infer(request, context)
        except MeshError as error:
            front = self._nodes.front
            if front is None or error.sent or error.code not in _ELSEWHERE:
                raise
        self._passed_on += 1
        return await front.infer(request, context)

    def _request(self, wish: Wish, inputs: Tensors) -> TensorRequest:
        said = {**wish.parameters, "sequence_id": wish.sequence} if wish.sequence else wish.parameters
        return TensorRequest(
            model=wish.model,
            inputs=inputs,
            version=wish.version,
            id=f"{self._prefix}-{next(self._ids)}",
            parameters=said,
            outputs=wish.outputs,
        )

    async def _as_arrays(self, model: str, inputs: Mapping[str, Any]) -> Tensors:
        """What people type in a notebook, as the arrays that the model wants."""
        described = self._described.get(model)
        if described is None:
            if len(self._described) >= self._limits.models_max:
                self._described.clear()
            described = self._described[model] = await self.metadata(model)
        types = {spec.name: dtype_of(spec.datatype) for spec in described.inputs}
        try:
            return {name: np.asarray(value, types.get(name)) for name, value in inputs.items()}
        except (TypeError, ValueError) as error:
            raise MeshError(Code.INVALID_REQUEST, f"The inputs of {model!r} are no arrays: {error}.") from error

    async def _stream_latest(self, wish: Wish, frames: Frames) -> AsyncGenerator[Answer, None]:
        self._start()
        remaining_s = None if wish.deadline_ms is None else wish.deadline_ms / 1e3
        now = self._now()
        if not self._nodes.knows(now, wish.model):
            deadline = None if remaining_s is None else now + remaining_s
            await self._nodes.learn(wish.model, 0, deadline, wish.priority)
        if remaining_s is not None:
            # The stream goes on for ever; each frame carries its own deadline, in microseconds.
            wish = msgspec.structs.replace(wish, parameters={**wish.parameters, "timeout": int(remaining_s * 1e6)})
        metadata = [(PRIORITY, str(wish.priority))] if wish.priority else []
        if key := wish.idempotency_key:
            metadata.append((IDEMPOTENCY_KEY, require_metadata_value(IDEMPOTENCY_KEY, key)))
        if trace := current_trace():
            metadata.append((TRACE, trace))
        facts = RequestFacts(
            model=wish.model,
            remaining_s=remaining_s,
            stateful=bool(wish.sequence),
            sequence=wish.sequence,
            priority=wish.priority,
        )
        stream = LatestFrames(
            self._nodes, self._policy, self._now, lambda frame: self._request(wish, frame), facts, metadata
        )
        try:
            async with aclosing(stream.run(frames)) as answers:
                async for answer in answers:
                    self._requests += 1
                    self._answered += 1
                    yield answer
        except MeshError as error:
            self._requests += 1
            self._failed[error.code] = self._failed.get(error.code, 0) + 1
            raise
        finally:
            self._dropped += stream.dropped
