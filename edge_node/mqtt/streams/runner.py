"""One message of a stream through its model: what state and what event it leaves. Nothing is stored here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from edge_node.mqtt.lanes import Recent
from edge_node.mqtt.ledger.records import Event, Input, StoredInput
from edge_node.mqtt.limits import MqttLimits
from edge_node.mqtt.streams import events
from edge_node.mqtt.streams.definition import StreamDefinition
from edge_node.mqtt.streams.plan import Plan, make_plan
from edge_node.mqtt.streams.samples import read_samples, read_tensor
from edge_node.mqtt.streams.state import StreamState, keep_tensors, rest_of, tensors_of
from edge_node.mqtt.streams.windows import cut
from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import InferenceHandler, InferResponse, ModelDirectory, Parameter, RequestContext, Tensors
from nearcast.transport.mqtt import topics
from nearcast.wire.message import NO_PARAMETERS
from nearcast.wire.request import TensorRequest
from nearcast.wire.tensors import Array


@dataclass(frozen=True, slots=True)
class Effect:
    """What a message brings about: the stream's state behind it, and the event, if there is one."""

    state: StreamState
    event: Event | None = None


class Runner:
    """Executes messages of streams, each by the definition of its stream.

    Args:
        handler: the router, or a model host.
        directory: tells the models' tensors and kinds of state.
        definitions: by name; may be replaced at any time.
        limits: bounds.
        clock: monotonic time of the deadlines.
    """

    def __init__(
        self,
        handler: InferenceHandler,
        directory: ModelDirectory,
        definitions: Mapping[str, StreamDefinition],
        *,
        limits: MqttLimits,
        clock: Clock,
    ) -> None:
        self.definitions = definitions
        self._handler = handler
        self._directory = directory
        self._limits = limits
        self._clock = clock
        self._open_sequences = Recent(limits.sequences_max)

    async def plan(self, stream: str) -> Plan:
        """How the stream's model is fed now.

        Raises:
            MeshError: MODEL_NOT_FOUND, INVALID_REQUEST if definition and model do not fit, or what the directory says.
        """
        definition = self.definitions.get(stream)
        if definition is None:
            raise MeshError(Code.INVALID_REQUEST, f"The stream {stream} is not configured any more.")
        return make_plan(definition, await self._directory.metadata(definition.model, definition.version))

    async def run(self, plan: Plan, stored: StoredInput, state: StreamState) -> Effect:
        """Execute one message on the state that the one before has left.

        Raises:
            MeshError: INVALID_REQUEST, TOO_LARGE and the like if the message cannot be used, others if the model cannot
                answer now. The state given still holds then.
        """
        item = stored.input
        state = _entered(state, item)
        windows, rest = self._windows(plan, stored, state)
        state = msgspec.structs.replace(state, rest=rest)
        results: list[events.Result] = []
        version = state.version
        try:
            for number, window in enumerate(windows):
                async with asyncio.timeout(plan.definition.deadline_ms / 1e3):
                    response, state = await self._run_window(plan, item, window, state)
                version = response.served.version or response.version
                state, found = _read(plan, response.decode(), state, version, number)
                results += found
        except TimeoutError as error:
            raise MeshError(Code.DEADLINE, f"{plan.definition.model} did not answer within the deadline.") from error
        if not len(windows):
            return Effect(state)
        return self._effect(plan, stored, state, results, version)

    def _windows(self, plan: Plan, stored: StoredInput, state: StreamState) -> tuple[list[Array], bytes]:
        definition = plan.definition
        if plan.shape is None:
            return [read_tensor(plan, stored)], b""
        samples = read_samples(plan, stored)
        parts = cut(rest_of(state, plan), samples, window=definition.window, hop=definition.step)
        if len(parts.windows) > self._limits.windows_max:
            raise MeshError(
                Code.TOO_LARGE,
                f"The message completes {len(parts.windows)} windows; at most {self._limits.windows_max} are accepted.",
            )
        shape = plan.shape
        return [np.ascontiguousarray(window).reshape(shape) for window in parts.windows], parts.rest.tobytes()

    async def _run_window(
        self, plan: Plan, item: Input, window: Array, state: StreamState
    ) -> tuple[InferResponse, StreamState]:
        """The answer for one window, and the state that it was given on."""
        if plan.stateful == "hidden":
            return await self._run_in_sequence(plan, item, window), state
        response = await self._ask(plan, item, {plan.data.name: window, **tensors_of(state, plan)})
        version = response.served.version or response.version
        if plan.feedback and state.version and version != state.version:
            # What another version has remembered means nothing to this one: it begins anew, with the same window.
            state = msgspec.structs.replace(state, version="", tensors={}, recent=())
            response = await self._ask(plan, item, {plan.data.name: window, **tensors_of(state, plan)})
        return response, state

    async def _run_in_sequence(self, plan: Plan, item: Input, window: Array) -> InferResponse:
        """A model with hidden state: the stream is a sequence of its own, which begins anew after a restart.

        The name cannot be that of a sequence of requests, whose names are the device's or continue it with a slash.
        """
        name = f"{item.device}:{item.stream}"
        key = (item.tenant, plan.definition.model, name)
        start = key not in self._open_sequences
        inputs = {plan.data.name: window}
        self._open_sequences.discard(key)  # a run that fails leaves a state that nobody knows
        try:
            response = await self._ask(plan, item, inputs, {"sequence_id": name, "sequence_start": start})
        except MeshError as error:
            if start or error.code is not Code.INVALID_REQUEST:
                raise
            # The host may have dropped an idle sequence or replaced the version.
            response = await self._ask(plan, item, inputs, {"sequence_id": name, "sequence_start": True})
        self._open_sequences.add(key)
        return response

    async def _ask(
        self, plan: Plan, item: Input, inputs: Tensors, parameters: Mapping[str, Parameter] = NO_PARAMETERS
    ) -> InferResponse:
        definition = plan.definition
        request = TensorRequest(
            model=definition.model, version=definition.version, inputs=inputs, parameters=parameters
        )
        context = RequestContext(
            deadline=self._clock.monotonic() + definition.deadline_ms / 1e3,
            tenant=item.tenant,
            principal=f"device:{item.tenant}/{item.device}",
            trace=item.user.get("traceparent", ""),
        )
        return await self._handler.infer(request, context)

    def _effect(
        self, plan: Plan, stored: StoredInput, state: StreamState, results: list[events.Result], version: str
    ) -> Effect:
        item, definition = stored.input, plan.definition
        shown = events.class_names(results)
        if definition.emit == "change" and shown == state.shown:
            return Effect(state)
        latency_ms = (self._clock.monotonic() - item.arrived) * 1e3 if stored.same_boot else None
        body = events.EventBody(
            id=events.event_id(item.key, item.boot, item.seq, otherwise=f"{item.ts} {stored.id}"),
            ts=item.ts,
            boot_id=item.boot,
            seq=item.seq,
            device=item.device,
            stream=item.stream,
            model=definition.model,
            version=version,
            latency_ms=None if latency_ms is None else round(latency_ms, 3),
            results=events.strongest(results),
        )
        event = Event(
            topic=topics.event_topic(item.tenant, item.device, item.stream),
            payload=events.encode_event(body),
            ttl_s=definition.expiry_s,
        )
        return Effect(msgspec.structs.replace(state, shown=shown), event)


def _entered(state: StreamState, item: Input) -> StreamState:
    """The state that a message meets: nothing after a reboot of the device, no half window behind a gap."""
    if item.seq is None:
        return state
    if item.boot != state.boot:
        return StreamState(boot=item.boot, seq=item.seq, shown=state.shown)
    is_next = state.seq is None or item.seq == state.seq + 1
    return msgspec.structs.replace(state, seq=item.seq, **({} if is_next else {"rest": b""}))


def _read(
    plan: Plan, outputs: Tensors, state: StreamState, version: str, number: int
) -> tuple[StreamState, list[events.Result]]:
    """The state behind a window, and what was seen in it."""
    kept = keep_tensors(outputs, plan)
    boxes = events.read_boxes(outputs, plan, number)
    if boxes is not None:
        return msgspec.structs.replace(state, version=version, tensors=kept), boxes
    scores = events.read_scores(outputs, plan)
    recent, mean = events.mean_scores(state.recent, scores, plan.definition.mean_of)
    state = msgspec.structs.replace(state, version=version, tensors=kept, recent=recent)
    return state, events.best_class(mean, plan, number)
