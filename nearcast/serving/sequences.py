"""Sequences of a model with hidden state: one runner each, bounded in number, dropped when idle.

The protocol is Triton's sequence extension: parameters `sequence_id`, `sequence_start`, `sequence_end`.
"""

from __future__ import annotations

import asyncio
from functools import partial

import msgspec

from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, RequestContext, Tensors
from nearcast.serving.dispatch import Dispatch
from nearcast.serving.engines import LoadedModel, Runner, Timed
from nearcast.serving.limits import HostLimits

SequenceKey = tuple[str, str]
"""Tenant and sequence id: tenants never share a sequence."""


class Sequence(msgspec.Struct):
    """One sequence. `turn` lets its requests in one by one, in order; `runner` is None until started and once ended."""

    last_used: float
    runner: Runner | None = None
    pending: int = 0
    turn: asyncio.Lock = msgspec.field(default_factory=asyncio.Lock)


class Sequences:
    """The open sequences of one version."""

    def __init__(
        self,
        title: str,
        engine: LoadedModel,
        dispatch: Dispatch,
        *,
        limits: HostLimits,
        inline_run: bool,
        inline_start: bool,
        clock: Clock,
    ) -> None:
        self._title = title
        self._engine = engine
        self._count_max = limits.sequences_max
        self._idle_s = limits.sequence_idle_s
        self._pending_max = limits.queue_rows_max
        self._inline_run = inline_run
        self._inline_start = inline_start
        self._dispatch = dispatch
        self._clock = clock
        self._pending = 0
        self._open: dict[SequenceKey, Sequence] = {}

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, key: SequenceKey) -> bool:
        return key in self._open

    def key(self, request: InferRequest, tenant: str) -> SequenceKey:
        """The sequence that a request belongs to.

        Raises:
            MeshError: INVALID_REQUEST if it names none.
        """
        name = request.sequence_id
        if not name:
            raise MeshError(
                Code.INVALID_REQUEST,
                f"Model {self._title} keeps state between calls; send the parameter sequence_id (text, or a number "
                "other than 0), and sequence_start=true with the first request.",
            )
        return tenant, name

    async def run(self, request: InferRequest, context: RequestContext, inputs: Tensors) -> Timed:
        """Run on the state of the request's sequence, after those of its requests that came before.

        Raises:
            MeshError: INVALID_REQUEST without an open sequence, OVERLOADED, DEADLINE, or what the model raised; a
                failed run closes the sequence, since its state is unknown.
        """
        start, end = _flag(request, "sequence_start"), _flag(request, "sequence_end")
        key = self.key(request, context.tenant)
        if self._pending >= self._pending_max:
            raise MeshError(
                Code.OVERLOADED, f"Model {self._title} has {self._pending} requests waiting.", retry_after_ms=1
            )
        sequence = self.enter(self._clock.monotonic(), key, start=start)
        entered = is_handed_on = False
        try:
            await self._wait_turn(sequence, context)
            entered = True
            context.require_time(self._clock.monotonic())
            if sequence.runner is None and not start:
                raise self.not_started(key)
            if self._inline_start if start else self._inline_run:
                return self._step(sequence, inputs, start=start, end=end)
            is_handed_on = True
        finally:
            if not is_handed_on:
                self._leave_turn(key, sequence, entered=entered)
        # The thread may outlive the client's interest; the next request must not enter before it is done.
        return await self._dispatch.submit(
            inputs,
            context,
            size_bytes=request.size_bytes,
            step=partial(self._step, sequence, inputs, start=start, end=end),
            left=partial(self._leave_turn, key, sequence, entered=True),
        )

    async def _wait_turn(self, sequence: Sequence, context: RequestContext) -> None:
        if not sequence.turn.locked():
            await sequence.turn.acquire()
            return
        try:
            async with asyncio.timeout(context.remaining_s(self._clock.monotonic())):
                await sequence.turn.acquire()
        except TimeoutError:
            context.require_time(float("inf"))

    def _leave_turn(self, key: SequenceKey, sequence: Sequence, *, entered: bool) -> None:
        if entered:
            sequence.turn.release()
        self.leave(self._clock.monotonic(), key, sequence)

    def _step(self, sequence: Sequence, inputs: Tensors, *, start: bool, end: bool) -> Timed:
        """One run, on the loop or in a thread; `turn` is held."""
        started = self._clock.monotonic()
        runner = self._engine.new_sequence() if start else sequence.runner
        assert runner is not None
        sequence.runner = None
        outputs = runner.run(inputs)
        if not end:
            sequence.runner = runner
        return outputs, started, self._clock.monotonic()

    def enter(self, now: float, key: SequenceKey, *, start: bool) -> Sequence:
        """A request of the sequence arrived; answer with `leave` once it is over.

        Raises:
            MeshError: INVALID_REQUEST if it is not open and this does not start it, OVERLOADED if too many are open.
        """
        sequence = self._open.get(key)
        if sequence is not None and self._is_idle(now, sequence):
            del self._open[key]
            sequence = None
        if sequence is None:
            if not start:
                raise self.not_started(key)
            if len(self._open) >= self._count_max:
                self.sweep(now)
            if len(self._open) >= self._count_max:
                raise self._full(now)
            sequence = self._open[key] = Sequence(now)
        sequence.pending += 1
        self._pending += 1
        sequence.last_used = now
        return sequence

    def leave(self, now: float, key: SequenceKey, sequence: Sequence) -> None:
        """The request is over. A sequence that has ended, or never started, goes with its last request."""
        sequence.pending -= 1
        self._pending -= 1
        sequence.last_used = now
        if sequence.runner is None and not sequence.pending and self._open.get(key) is sequence:
            del self._open[key]

    def sweep(self, now: float) -> int:
        """Drop the sequences that nobody has used for too long; how many there were."""
        idle = [key for key, sequence in self._open.items() if self._is_idle(now, sequence)]
        for key in idle:
            del self._open[key]
        return len(idle)

    def not_started(self, key: SequenceKey) -> MeshError:
        """The error for a request of a sequence that is not open."""
        return MeshError(
            Code.INVALID_REQUEST,
            f"Sequence {key[1]!r} of {self._title} has not been started; send sequence_start=true.",
        )

    def _is_idle(self, now: float, sequence: Sequence) -> bool:
        return not sequence.pending and now - sequence.last_used >= self._idle_s

    def _full(self, now: float) -> MeshError:
        oldest = min(sequence.last_used for sequence in self._open.values())
        return MeshError(
            Code.OVERLOADED,
            f"Model {self._title} has {self._count_max} open sequences and may have no more; send sequence_end.",
            retry_after_ms=max(1, int((oldest + self._idle_s - now) * 1000)),
        )


def _flag(request: InferRequest, name: str) -> bool:
    value = request.parameters.get(name, False)
    if not isinstance(value, bool):
        raise MeshError(Code.INVALID_REQUEST, f"The parameter {name} must be true or false.")
    return value
