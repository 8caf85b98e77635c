"""Streams of requests: each request for itself and in order, or, for cameras, only ever the newest."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import TypeVar

from nearcast.client.answer import Answer, to_answer
from nearcast.client.nodes import Nodes
from nearcast.errors import Code, MeshError
from nearcast.handler import Served, Tensors
from nearcast.transport.oip import MODEL_STREAM_INFER
from nearcast.transport.seam import Metadata
from nearcast.transport.stream_answers import decode_answer
from nearcast.wire.request import TensorRequest
from nearcast.wire.status import LATEST
from router.policy import Attempt, Outcome, Policy, Reject, RequestFacts
from router.policy.events import ABANDONED

Frames = AsyncIterable[Tensors] | Iterable[Tensors]
_MOVING = frozenset({Code.UNAVAILABLE, Code.OVERLOADED, Code.INTERNAL, Code.MODEL_NOT_FOUND, Code.VERSION_MISMATCH})
"""Errors after which another node may go on with a stream."""
_LET_GO = frozenset({Code.SUPERSEDED, Code.DEADLINE, Code.OVERLOADED})
"""Errors of one frame, after which the same node goes on with the next one."""
_PAUSE_S = 0.02
_SENT_MAX = 64

T = TypeVar("T")


async def each(items: AsyncIterable[T] | Iterable[T]) -> AsyncIterator[T]:
    """The items one by one, whichever kind of iterable they come in."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
        return
    for item in items:
        yield item
        # An endless iterable must leave the loop to others.
        await asyncio.sleep(0)


async def in_order(
    frames: Frames, ask: Callable[[Tensors, int], Awaitable[Answer]], *, ahead: int
) -> AsyncGenerator[Answer, None]:
    """Answers in the order of the frames, at most `ahead` of them asked for and not taken.

    Raises:
        MeshError: of the first frame that fails; it ends the stream.
    """
    loop = asyncio.get_running_loop()
    room = asyncio.Semaphore(ahead)
    asked: asyncio.Queue[asyncio.Task[Answer] | None] = asyncio.Queue()
    open_tasks: set[asyncio.Task[Answer]] = set()

    async def one(frame: Tensors, index: int) -> Answer:
        return await ask(frame, index)

    async def read() -> None:
        index = 0
        try:
            async for frame in each(frames):
                await room.acquire()
                task = loop.create_task(one(frame, index))
                open_tasks.add(task)
                asked.put_nowait(task)
                index += 1
        finally:
            asked.put_nowait(None)

    reader = loop.create_task(read())
    try:
        while (task := await asked.get()) is not None:
            answer = await task
            open_tasks.discard(task)
            room.release()
            yield answer
        await reader
    finally:
        tasks = (reader, *open_tasks)
        for each_task in tasks:
            each_task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class LatestFrames:
    """A stream of which only the newest frame counts: one on its way, one waiting here, older ones let go.

    Frames go to one node as long as it answers, and then to another one. What is superseded, late or refused is left
    out; `dropped` counts it.

    Args:
        nodes: how to reach the policy's targets.
        policy: chooses the node.
        now: monotonic seconds.
        make: the request of a frame.
        facts: of a usual frame.
        metadata: said once, at the start.
    """

    def __init__(
        self,
        nodes: Nodes,
        policy: Policy,
        now: Callable[[], float],
        make: Callable[[Tensors], TensorRequest],
        facts: RequestFacts,
        metadata: Metadata,
    ) -> None:
        self._nodes = nodes
        self._policy = policy
        self._now = now
        self._make = make
        self._facts = facts
        self._metadata = [*metadata, (LATEST, "1")]
        self._newest: tuple[Tensors, int] | None = None
        self._in_work: tuple[Tensors, int] | None = None
        self._is_over = False
        self._changed = asyncio.Event()
        self._sent_at: dict[str, tuple[int, float]] = {}
        self.dropped = 0

    async def run(self, frames: Frames) -> AsyncGenerator[Answer, None]:
        """The answers, as they come.

        Raises:
            MeshError: once no node takes the frames any more, or the sequence's node is lost.
        """
        reader = asyncio.get_running_loop().create_task(self._read(frames))
        failures = 0
        try:
            while not (self._is_over and self._newest is None):
                try:
                    async with aclosing(self._converse()) as answers:
                        async for answer in answers:
                            failures = 0
                            yield answer
                except MeshError as error:
                    failures += 1
                    is_movable = error.code in _MOVING and not self._facts.sequence
                    if not is_movable or failures >= self._policy.config.attempts_max:
                        raise
                    self._newest = self._newest or self._in_work
                    await asyncio.sleep(_PAUSE_S * 2.0**failures * random.uniform(0.5, 1.0))
            await reader
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, frames: Frames) -> None:
        index = 0
        try:
            async for frame in each(frames):
                self.dropped += self._newest is not None
                self._newest = (frame, index)
                index += 1
                self._changed.set()
        finally:
            self._is_over = True
            self._changed.set()

    async def _bodies(self) -> AsyncIterator[Sequence[bytes]]:
        """Asked for the next one when the node can take it: by then only the newest frame is of use."""
        while True:
            while self._newest is None and not self._is_over:
                self._changed.clear()
                await self._changed.wait()
            if self._newest is None:
                return
            frame, index = self._in_work = self._newest
            self._newest = None
            request = self._make(frame)
            if len(self._sent_at) >= _SENT_MAX:
                del self._sent_at[next(iter(self._sent_at))]
            self._sent_at[request.id] = (index, self._now())
            yield request.encode_pieces()

    async def _converse(self) -> AsyncGenerator[Answer, None]:
        """One streaming call to one node, as long as it lasts."""
        name, attempt = self._choose()
        outcome = ABANDONED
        replies = self._nodes.channel(name).stream(MODEL_STREAM_INFER, self._bodies(), metadata=self._metadata)
        try:
            async with aclosing(replies):
                async for body in replies:
                    try:
                        response = decode_answer(body, Served(node=name))
                        answer_id = response.id
                        response.served = Served(node=name, version=response.version)
                        index, sent_at = self._sent_at.pop(answer_id, (0, self._now()))
                        answer = to_answer(response, self._now() - sent_at, index)
                    except MeshError as error:
                        if error.code not in _LET_GO:
                            raise
                        self.dropped += 1
                        continue
                    if self._in_work is not None and self._in_work[1] == index:
                        self._in_work = None
                    yield answer
        except MeshError as error:
            outcome = Outcome(error.code, error.sent, error.retry_after_ms)
            raise
        finally:
            if attempt is not None:
                self._policy.on_reply(self._now(), attempt, outcome)

    def _choose(self) -> tuple[str, Attempt | None]:
        now = self._now()
        decision = self._policy.decide(now, self._facts)
        if not isinstance(decision, Reject):
            return decision.target, self._policy.on_sent(now, self._facts, decision)
        if self._nodes.front is None:
            raise MeshError(decision.code, decision.message, retry_after_ms=decision.retry_after_ms)
        return "", None
