"""Some messages of one stream in a row: executed in order, their effects committed together."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_node.mqtt.ledger.records import Advance, Input, Intake, Outgoing, Page, StoredInput
from edge_node.mqtt.limits import StreamLimits
from edge_node.mqtt.streams.metrics import StreamMetrics
from edge_node.mqtt.streams.plan import Plan
from edge_node.mqtt.streams.runner import Effect, Runner
from edge_node.mqtt.streams.state import StreamState, decode_state, encode_state
from nearcast.clock import Clock
from nearcast.errors import Code, MeshError, Retry
from nearcast.telemetry import get_logger

BATCH_MAX = 64
"""Messages of one stream in one transaction."""
BATCH_S = 0.02
"""What has been executed for so long is committed."""
SLICE_S = 0.001
"""A stream with a backlog lets others run after so long."""
_log = get_logger("nearcast.mqtt")


class InputStore(Protocol):
    """Where messages and states of streams are kept: the ledger, or memory."""

    def take(self, item: Input, payload: bytes, *, again: bool = False) -> asyncio.Future[Intake]: ...

    def inputs(self, after: int, limit: int, *, key: str = "") -> asyncio.Future[Page[StoredInput]]: ...

    def begin_input(self, row: int) -> asyncio.Future[None]: ...

    def advance_all(
        self, steps: Sequence[Advance], now: float, *, state: bytes | None = None
    ) -> asyncio.Future[Sequence[Outgoing]]: ...

    def stream_state(self, tenant: str, device: str, stream: str) -> asyncio.Future[bytes | None]: ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch came: its first `done` messages are committed; `failure` keeps the next one from its turn."""

    done: int
    failure: MeshError | None = None


class Batches:
    """Executes batches.

    Args:
        runner: executes one message.
        store: keeps messages and states, and sees to it that events leave.
        limits: bounds.
        clock: monotonic.
        metrics: counts.
        tell: called with a message of each stream that has events.
        suspects: held by whatever may have ended the node, of any kind, while it is tried again: alone.
    """

    def __init__(
        self,
        runner: Runner,
        store: InputStore,
        *,
        limits: StreamLimits,
        clock: Clock,
        metrics: StreamMetrics,
        tell: Callable[[Input], None] | None = None,
        suspects: asyncio.Lock | None = None,
    ) -> None:
        self._tell = tell
        self._runner = runner
        self._store = store
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._states: OrderedDict[str, StreamState] = OrderedDict()
        self._suspects = suspects or asyncio.Lock()

    async def run(self, rows: Sequence[StoredInput], *, tries: int = 0) -> Progress:
        """Execute messages of one stream, as many as fit into one transaction.

        Args:
            rows: in order.
            tries: how often the first of them has failed already.

        Raises:
            MeshError: if the effects could not be committed; then there are none.
        """
        first = rows[0].input
        if first.stream not in self._runner.definitions:
            buried = [Advance(row.id, buried=f"No stream {first.stream!r} is configured any more.") for row in rows]
            return await self._commit(first, buried, None)
        try:
            plan = await self._runner.plan(first.stream)
        except MeshError as error:
            return Progress(0, error)
        state = await self._state_of(first)
        steps: list[Advance] = []
        if plan.joins and len(rows) > 1:
            try:
                effects = await self._runner.run_joined(plan, rows[:BATCH_MAX], state)
            except Exception:  # noqa: BLE001  # whatever it is, it comes again for the one that is to blame
                effects = []
            if effects:
                steps = [_step(row, effect) for row, effect in zip(rows, effects, strict=False)]
                return await self._commit(first, steps, effects[-1].state)
        failure, began = None, self._clock.monotonic()
        yielded = began
        for row in rows[:BATCH_MAX]:
            try:
                step, state = await self._execute(plan, row, state, tries=0 if steps else tries)
            except MeshError as error:
                failure = error
                break
            steps.append(step)
            now = self._clock.monotonic()
            if now - began > BATCH_S:
                break
            if now - yielded > SLICE_S:
                await asyncio.sleep(0)
                yielded = self._clock.monotonic()
        return await self._commit(first, steps, state, failure) if steps else Progress(0, failure)

    async def run_suspect(self, row: StoredInput, *, tries: int = 0) -> Progress:
        """Execute a message that may have ended the node: alone among its like, so that a crash has one culprit.

        Raises:
            MeshError: as `run`.
        """
        if row.attempts >= self._limits.attempts_max - 1:  # the first crash was not counted: nobody was suspected yet
            reason = f"The node crashed {row.attempts + 1} times while it ran this message."
            return await self._commit(row.input, [Advance(row.id, buried=reason)], None)
        try:
            await self._runner.plan(row.input.stream)  # one that cannot run is to blame for nothing
        except MeshError as error:
            return Progress(0, error)
        async with self._suspects:
            await self._store.begin_input(row.id)
            return await self.run([row], tries=tries)

    async def _execute(
        self, plan: Plan, row: StoredInput, state: StreamState, *, tries: int
    ) -> tuple[Advance, StreamState]:
        """One message: its effect, or its burial.

        Raises:
            MeshError: if it should be tried again later.
        """
        try:
            effect: Effect = await self._runner.run(plan, row, state)
        except MeshError as error:
            if not is_hopeless(error, tries, self._limits):
                raise
            if await self._runner.plan(row.input.stream, renew=True) != plan:  # the model is another one since
                raise MeshError(Code.UNAVAILABLE, "The model has changed; the message is tried again.") from error
            _log.warning("a message of a stream was buried", stream=row.input.key, error=error.message)
            return Advance(row.id, buried=error.message), state
        except Exception as error:
            if tries + 1 < self._limits.tries_max:
                raise MeshError(Code.INTERNAL, "The node failed on this message; see its log.") from error
            _log.exception("a message of a stream failed unexpectedly", stream=row.input.key)
            return Advance(row.id, buried="The node failed on this message; see its log."), state
        return _step(row, effect), effect.state

    async def _commit(
        self, item: Input, steps: Sequence[Advance], state: StreamState | None, failure: MeshError | None = None
    ) -> Progress:
        encoded = None if state is None else encode_state(state)
        if state is not None:
            self._remember(item.key, state)
        try:
            await self._store.advance_all(steps, self._clock.monotonic(), state=encoded)
        except MeshError:
            self._states.pop(item.key, None)
            raise
        buried = sum(1 for step in steps if step.buried)
        events = sum(len(step.events) for step in steps)
        self._metrics.executed(len(steps) - buried, buried, events)
        if events and self._tell is not None:
            self._tell(item)
        return Progress(len(steps), failure)

    async def _state_of(self, item: Input) -> StreamState:
        known = self._states.get(item.key)
        if known is not None:
            return known
        return decode_state(await self._store.stream_state(item.tenant, item.device, item.stream) or b"")

    def _remember(self, key: str, state: StreamState) -> None:
        self._states[key] = state
        self._states.move_to_end(key)
        if len(self._states) > self._limits.states_cached_max:
            self._states.popitem(last=False)


def _step(row: StoredInput, effect: Effect) -> Advance:
    return Advance(row.id, () if effect.event is None else (effect.event,))


def is_hopeless(error: MeshError, tries: int, limits: StreamLimits) -> bool:
    """Whether a message that failed with `error`, after `tries` earlier failures, is not tried again. Pure.

    What is wrong with the message stays wrong. A model that breaks or takes too long is given some tries. What is not
    here, or has no room, may be there later: such a message waits.
    """
    if error.code in (Code.INTERNAL, Code.DEADLINE):
        return tries + 1 >= limits.tries_max
    return error.retry is Retry.NEVER and error.code not in (Code.CANCELLED, Code.SUPERSEDED)
