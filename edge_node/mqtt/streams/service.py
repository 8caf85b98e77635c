"""Streams from their messages to their events: each in order, many at the same time, live ones first."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field

from edge_node.mqtt.backlog import Backlog, Row
from edge_node.mqtt.ledger.records import Input, Intake, StoredInput
from edge_node.mqtt.limits import MessageLimits, StreamLimits
from edge_node.mqtt.streams.admission import Dropped, admit_input
from edge_node.mqtt.streams.batches import BATCH_MAX, Batches, InputStore, Progress
from edge_node.mqtt.streams.definition import StreamDefinition
from edge_node.mqtt.streams.intake import STORE_RETRY_S, Arrival, IntakeQueue
from edge_node.mqtt.streams.metrics import StreamMetrics
from edge_node.mqtt.streams.runner import Runner
from nearcast.backoff import full_jitter_s
from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import InferenceHandler, ModelDirectory
from nearcast.telemetry import get_logger
from nearcast.transport import eager
from nearcast.transport.mqtt.message import Message

BACKLOG_SHARE = 32
"""A backlog has at most one part in so many of what is in hand."""
WEIGHT_BYTES = 64 * 1024
"""A message of this size counts as another one."""
_log = get_logger("nearcast.mqtt")


@dataclass(slots=True, eq=False)
class _Lane:
    """One stream with messages in hand.

    Attributes:
        waiting: the next messages, in order.
        left_out: first and last row of those that were let go while the stream rested; they follow `waiting`.
        suspects: so many of the next messages may have been running when the node crashed.
        tries: failed runs of the first message. failures: of any kind, since something last succeeded.
        rests: it waits before it tries again.
    """

    key: str
    suspects: int = 0
    waiting: deque[StoredInput] = field(default_factory=deque)
    left_out: tuple[int, int] | None = None
    tries: int = 0
    failures: int = 0
    rests: bool = False


class StreamService:
    """Admits, stores and executes the messages of streams.

    Args:
        handler: the router, or a model host.
        directory: tells the models' tensors.
        store: the ledger, which sees to it that events leave too.
        definitions: what each stream means, by name.
        limits: bounds. messages: of what a device may send.
        clock: monotonic and wall time.
        metrics: counts.
        hold: keeps the acknowledgement of a message until its effect is on its way; None = it is given as soon as the
            store has the message.
        tell: called with a message of each stream that has events.
        suspects: held by whatever may have ended the node, of any kind, while it is tried again: alone.
    """

    def __init__(
        self,
        handler: InferenceHandler,
        directory: ModelDirectory,
        store: InputStore,
        definitions: Mapping[str, StreamDefinition],
        *,
        limits: StreamLimits,
        messages: MessageLimits,
        clock: Clock,
        metrics: StreamMetrics,
        hold: Callable[[int, Callable[[], None]], None] | None = None,
        tell: Callable[[Input], None] | None = None,
        suspects: asyncio.Lock | None = None,
    ) -> None:
        self._hold = hold
        self._runner = Runner(handler, directory, definitions, limits=limits, clock=clock)
        self._batches = Batches(
            self._runner, store, limits=limits, clock=clock, metrics=metrics, tell=tell, suspects=suspects
        )
        self._intake = IntakeQueue(store, self._taken)
        self._store = store
        self._limits = limits
        self._messages = messages
        self._clock = clock
        self._metrics = metrics
        self._generator = random.Random()
        self._loop = asyncio.get_running_loop()
        self._backlog: Backlog[StoredInput] = Backlog(limits.lanes)
        self._lanes: dict[str, _Lane] = {}
        self._suspected: set[str] = set()
        self._in_hand = 0
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def streams_behind(self) -> int:
        """Streams with messages that are only on disk."""
        return self._backlog.streams

    def redefine(self, definitions: Mapping[str, StreamDefinition]) -> None:
        """Give streams another meaning, from their next messages on."""
        self._runner.definitions = definitions

    def recover(self, left: Mapping[str, int], *, crashed: bool) -> None:
        """Begin with what a former life left: the last row of each stream."""
        self._backlog = Backlog(self._limits.lanes, left)
        if crashed:
            self._suspected = set(left)
        self._pump()

    def receive(self, message: Message, acknowledge: Callable[[], None]) -> None:
        """Take in a message on a stream's topic; `acknowledge` is called once, when the broker may forget it."""
        clock = self._clock
        verdict = admit_input(message, clock.monotonic(), clock.wall(), self._messages, self._runner.definitions)
        if isinstance(verdict, Dropped):
            self._metrics.taken(verdict.reason)
            _log.warning("a message of a stream was dropped", topic=message.topic[:200], reason=verdict.detail)
            acknowledge()
        else:
            self._intake.put(verdict, message.payload, acknowledge)

    def resume(self, stored: StoredInput) -> None:
        """Execute a message that the store holds already: a dead letter that is tried again."""
        self._backlog.add(Row(stored.id, stored.input.key, len(stored.payload), stored))
        self._pump()

    async def close(self) -> None:
        """Finish the batches that run. The rest stays in the store, for the next start."""
        self._closing = True
        self._intake.close()
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def cancel(self) -> None:
        """End what still runs; its messages run again after the next start."""
        self._closing = True
        self._intake.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._runner.close()

    # -- which message is next ----------------------------------------------------------------------------------------

    def _taken(self, arrival: Arrival, intake: Intake | None) -> None:
        if intake is None:
            self._metrics.taken("failed")
            arrival.acknowledge()
            return
        if self._hold is not None and intake.id:
            self._hold(intake.id, arrival.acknowledge)
        else:
            arrival.acknowledge()
        self._metrics.taken(intake.verdict, intake.lost)
        if intake.verdict == "accept":
            self.resume(StoredInput(intake.id, arrival.item, arrival.payload))

    def _pump(self) -> None:
        """Hand out messages while there is room, and read on where the next ones are only on disk.

        A backlog gets a small part of the room: a live message waits for what is under way.
        """
        room = self._limits.in_hand_max
        while not self._closing and self._in_hand < room:
            row = self._backlog.next(live_only=self._in_hand * BACKLOG_SHARE >= room)
            if row is None:
                break
            self._hand_out(row.stream, row.item)
        if not self._closing and (after := self._backlog.start_reading()) is not None:
            self._spawn(self._read_page(after))

    def _hand_out(self, key: str, stored: StoredInput) -> None:
        lane = self._lanes.get(key)
        is_idle = lane is None
        if lane is None:
            lane = self._lanes[key] = _Lane(key, suspects=BATCH_MAX if key in self._suspected else 0)
            self._suspected.discard(key)
        if lane.rests or lane.left_out is not None:
            # A stream that cannot go on must not take the place of those that can: the store has its messages.
            lane.left_out = (stored.id if lane.left_out is None else lane.left_out[0], stored.id)
            return
        lane.waiting.append(stored)
        self._in_hand += _weight(stored)
        if is_idle:
            self._spawn(self._run_lane(lane))

    async def _read_page(self, after: int) -> None:
        try:
            page = await self._store.inputs(after, self._limits.lanes.page_rows_max)
        except MeshError:
            self._backlog.failed()
            self._loop.call_later(STORE_RETRY_S, self._pump)
            return
        rows = [Row(stored.id, stored.input.key, len(stored.payload), stored) for stored in page.rows]
        rows.sort(key=lambda row: row.stream)  # stable: what one stream waits for becomes one batch
        self._backlog.read(rows, page.through)
        self._pump()

    # -- one stream ---------------------------------------------------------------------------------------------------

    async def _run_lane(self, lane: _Lane) -> None:
        """Execute what a stream has in hand, until it has nothing more or cannot go on."""
        while not self._closing:
            if not lane.waiting and lane.left_out is None:
                del self._lanes[lane.key]
                return
            failure = await self._run_some(lane)
            self._pump()
            if failure is not None:
                self._rest(lane, failure)
                return

    async def _run_some(self, lane: _Lane) -> MeshError | None:
        """One batch, or the way to the next one; returns what keeps the stream from going on."""
        try:
            if not lane.waiting:
                await self._read_left_out(lane)
                return None
            if lane.suspects:
                progress = await self._batches.run_suspect(lane.waiting[0], tries=lane.tries)
            else:
                progress = await self._batches.run(list(lane.waiting), tries=lane.tries)
        except MeshError as error:
            progress = Progress(0, error)
        except Exception as error:  # noqa: BLE001  # one stream must not end the others, nor itself
            _log.exception("a stream failed unexpectedly", stream=lane.key)
            progress = Progress(0, MeshError(Code.INTERNAL, f"The node failed on this stream: {error!r}."))
        for _ in range(progress.done):
            self._in_hand -= _weight(lane.waiting.popleft())
        if progress.done:
            lane.suspects = max(0, lane.suspects - progress.done)
            lane.tries = lane.failures = 0
        return progress.failure

    def _rest(self, lane: _Lane, failure: MeshError) -> None:
        """Try again later; what the stream has in hand is let go meanwhile."""
        level = _log.warning if lane.failures == 0 else _log.debug
        level("a stream waits for its model", stream=lane.key, error=str(failure))
        lane.tries += failure.code in (Code.INTERNAL, Code.DEADLINE)
        lane.failures += 1
        lane.rests = True
        if lane.waiting:
            last = lane.waiting[-1].id if lane.left_out is None else lane.left_out[1]
            lane.left_out = (lane.waiting[0].id, last)
            self._in_hand -= sum(map(_weight, lane.waiting))
            lane.waiting.clear()
        limits = self._limits
        base_s, max_s = limits.retry_base_s, limits.retry_max_s
        delay_s = full_jitter_s(lane.failures, self._generator, base_s=base_s, max_s=max_s)
        self._loop.call_later(delay_s, self._rise, lane)
        self._pump()

    def _rise(self, lane: _Lane) -> None:
        lane.rests = False
        if not self._closing:
            self._spawn(self._run_lane(lane))

    async def _read_left_out(self, lane: _Lane) -> None:
        """Bring back from the store what was let go while the stream rested.

        Raises:
            MeshError: UNAVAILABLE if the store cannot be read.
        """
        assert lane.left_out is not None
        first, last = lane.left_out
        page = await self._store.inputs(first - 1, self._limits.lanes.page_rows_max, key=lane.key)
        last = lane.left_out[1]  # more may have come meanwhile
        found = [stored for stored in page.rows if stored.id <= last]
        lane.waiting.extend(found)
        self._in_hand += sum(map(_weight, found))
        lane.left_out = None if page.through >= last else (page.through + 1, last)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = eager.start(work, self._loop)
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


def _weight(stored: StoredInput) -> int:
    """What a message takes of `inputs_in_hand_max`: that bounds bytes too."""
    return 1 + len(stored.payload) // WEIGHT_BYTES
