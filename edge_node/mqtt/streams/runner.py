"""One message of a stream through its model: what state and what event it leaves. Nothing is stored here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from edge_node.mqtt.lanes import Recent
from edge_node.mqtt.ledger.records import Event, Input, StoredInput
from edge_node.mqtt.limits import StreamLimits
from edge_node.mqtt.models import KnownModels
from edge_node.mqtt.streams import events
from edge_node.mqtt.streams.definition import StreamDefinition
from edge_node.mqtt.streams.plan import Plan, make_plan
from edge_node.mqtt.streams.samples import read_samples, read_tensor
from edge_node.mqtt.streams.state import StreamState, keep_tensors, rest_of, tensors_of
from edge_node.mqtt.streams.windows import cut
from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import InferenceHandler, InferResponse, ModelDirectory, Parameter, RequestContext, Tensors
from nearcast.transport.context import read_trace
from nearcast.transport.mqtt import topics
from nearcast.wire.message import NO_PARAMETERS
from nearcast.wire.request import TensorRequest
from nearcast.wire.status import TRACE
from nearcast.wire.tensors import Array

JOINED_BYTES_MAX = 4 * 1024 * 1024


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
        limits: StreamLimits,
        clock: Clock,
    ) -> None:
        self.definitions = definitions
        self._handler = handler
        self._models = KnownModels(directory, clock)
        self._limits = limits
        self._clock = clock
        self._open_sequences = Recent(limits.sequences_max)
        self._plans: dict[str, Plan] = {}

    async def plan(self, stream: str, *, renew: bool = False) -> Plan:
        """How the stream's model is fed; with `renew` as it is now.

        Raises:
            MeshError: MODEL_NOT_FOUND, INVALID_REQUEST if definition and model do not fit, or what the directory says.
        """
        definition = self.definitions.get(stream)
        if definition is None:
            raise MeshError(Code.INVALID_REQUEST, f"The stream {stream} is not configured any more.")
        metadata = await self._models.metadata(definition.model, definition.version, renew=renew)
        plan = self._plans.get(stream)
        if plan is None or plan.definition is not definition or plan.metadata is not metadata:
            plan = self._plans[stream] = make_plan(definition, metadata)
        return plan

    async def close(self) -> None:
        """No message comes any more."""
        await self._models.close()

    async def run(self, plan: Plan, stored: StoredInput, state: StreamState) -> Effect:
        """Execute one message on the state that the one before has left.

        Raises:
            MeshError: INVALID_REQUEST, TOO_LARGE and the like if the message cannot be used, others if the model cannot
                answer now. The state given still holds then.
        """
        if _is_other_boot(state, stored.input):
            self._open_sequences.discard(_sequence(plan, stored.input))
        state, windows = self._cut(plan, stored, state)
        results: list[events.Result] = []
        for number, window in enumerate(windows):
            response, state = await self._run_window(plan, stored.input, window, state)
            state, found = _read(plan, response.decode(), state, _version(plan, response), number)
            results += found
        return self._effect(plan, stored, state, results) if windows else Effect(state)

    async def run_joined(self, plan: Plan, rows: Sequence[StoredInput], state: StreamState) -> list[Effect]:
        """Execute several messages in one run of a model without state; no effect at all if that cannot be done.

        Raises:
            MeshError: if one of them, or the model, fails: one by one it shows which.
        """
        parts: list[tuple[StoredInput, StreamState, list[Array]]] = []
        cutting = state
        for stored in rows:
            cutting, windows = self._cut(plan, stored, cutting)
            parts.append((stored, cutting, windows))
        windows = [window for _, _, each in parts for window in each]
        too_large = sum(window.nbytes for window in windows) > JOINED_BYTES_MAX
        if len(windows) < 2 or too_large or len({window.shape[1:] for window in windows}) > 1:
            return []
        response = await self._ask(plan, rows[0].input, {plan.data.name: np.concatenate(windows)})
        counts = [len(window) for window in windows]
        answers = _split(response.decode(), counts)
        effects: list[Effect] = []
        for stored, entered, own in parts if answers else ():
            # What was cut is known beforehand, what was seen only now.
            recent = state.recent if entered.boot == state.boot else ()
            state = msgspec.structs.replace(entered, recent=recent, shown=state.shown)
            results: list[events.Result] = []
            for number in range(len(own)):
                state, found = _read(plan, answers.popleft(), state, _version(plan, response), number)
                results += found
            effects.append(self._effect(plan, stored, state, results) if own else Effect(state))
            state = effects[-1].state
        return effects

    def _cut(self, plan: Plan, stored: StoredInput, state: StreamState) -> tuple[StreamState, list[Array]]:
        """The windows that a message completes, and the state with the samples that are left."""
        state = _entered(state, stored.input)
        if plan.shape is None:
            return state, [read_tensor(plan, stored)]
        definition, samples = plan.definition, read_samples(plan, stored)
        parts = cut(rest_of(state, plan), samples, window=definition.window, hop=definition.step)
        if len(parts.windows) > self._limits.windows_max:
            raise MeshError(
                Code.TOO_LARGE,
                f"The message completes {len(parts.windows)} windows; at most {self._limits.windows_max} are accepted.",
            )
        shape = plan.shape
        windows = [window.reshape(shape) for window in parts.windows]  # views: they may overlap by far
        return msgspec.structs.replace(state, rest=parts.rest.tobytes()), windows

    async def _run_window(
        self, plan: Plan, item: Input, window: Array, state: StreamState
    ) -> tuple[InferResponse, StreamState]:
        """The answer for one window, and the state that it was given on."""
        if plan.stateful == "hidden":
            return await self._run_in_sequence(plan, item, window), state
        response = await self._ask(plan, item, {plan.data.name: window, **tensors_of(state, plan)})
        if plan.feedback and state.version not in ("", _version(plan, response)):
            # What another version has remembered means nothing to this one: it begins anew, with the same window.
            state = msgspec.structs.replace(state, version="", tensors={}, recent=())
            response = await self._ask(plan, item, {plan.data.name: window, **tensors_of(state, plan)})
        return response, state

    async def _run_in_sequence(self, plan: Plan, item: Input, window: Array) -> InferResponse:
        """A model with hidden state: the stream is a sequence of its own, which begins anew after a restart."""
        key = _sequence(plan, item)
        name = key[-1]
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
        """One run of the model.

        Raises:
            MeshError: DEADLINE after the time that the definition grants, or what the handler says.
        """
        definition = plan.definition
        request = TensorRequest(
            model=definition.model, version=definition.version, inputs=inputs, parameters=parameters
        )
        context = RequestContext(
            deadline=self._clock.monotonic() + definition.deadline_ms / 1e3,
            tenant=item.tenant,
            principal=f"device:{item.tenant}/{item.device}",
            trace=read_trace(item.user.get(TRACE, "")),
        )
        try:
            async with asyncio.timeout(definition.deadline_ms / 1e3):
                return await self._handler.infer(request, context)
        except TimeoutError as error:
            raise MeshError(Code.DEADLINE, f"{definition.model} did not answer within the deadline.") from error

    def _effect(self, plan: Plan, stored: StoredInput, state: StreamState, results: list[events.Result]) -> Effect:
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
            version=state.version.rpartition("@")[-1],
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
    if _is_other_boot(state, item):
        return StreamState(boot=item.boot, seq=item.seq, shown=state.shown)
    is_next = state.seq is None or item.seq == state.seq + 1
    return msgspec.structs.replace(state, seq=item.seq, **({} if is_next else {"rest": b""}))


def _is_other_boot(state: StreamState, item: Input) -> bool:
    return item.seq is not None and item.boot != state.boot


def _version(plan: Plan, response: InferResponse) -> str:
    """Which model made a state: another one, or another version, cannot go on with it."""
    return f"{plan.definition.model}@{response.served.version or response.version}"


def _sequence(plan: Plan, item: Input) -> tuple[str, str, str]:
    """Tenant, model and name. The name cannot be that of a sequence of requests: those continue with a slash."""
    return item.tenant, plan.definition.model, f"{item.device}:{item.stream}"


def _split(outputs: Tensors, counts: Sequence[int]) -> deque[dict[str, Array]]:
    """The outputs of each of several joined inputs; none if an output has not a row for each of theirs."""
    rows = sum(counts)
    if any(array.shape[:1] != (rows,) for array in outputs.values()):
        return deque()
    ends = np.cumsum(counts)
    return deque(
        {name: array[end - count : end] for name, array in outputs.items()}
        for end, count in zip(ends.tolist(), counts, strict=True)
    )


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
