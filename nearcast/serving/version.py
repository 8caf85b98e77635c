"""One hot version: its engine, its queue, its sequences, its statistics."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

import msgspec

from nearcast.clock import Clock
from nearcast.errors import MeshError
from nearcast.handler import RequestContext, Tensors
from nearcast.serving.batching import BatchingConfig
from nearcast.serving.dispatch import Answer, Dispatch, Waiting, failed, settle, unloaded
from nearcast.serving.engines import Timed
from nearcast.serving.limits import HostLimits
from nearcast.serving.loading import Loaded
from nearcast.serving.pipeline.flow import decodes
from nearcast.serving.sequences import Sequences
from nearcast.serving.signature import Signature, Size
from nearcast.serving.statistics import Statistics
from nearcast.serving.turn import Turn
from nearcast.serving.turn_rows import TurnRows
from nearcast.serving.workers import Workers

_LOG = logging.getLogger(__name__)


class HotVersion:
    """A loaded and warmed version. Lives on one loop; runs inline there if it is quick enough, else in threads.

    Attributes:
        in_flight: requests that have arrived and are not answered.
        used_at: when the last one arrived, in monotonic seconds.
        told_at: when an answer last said how the host is.
        inline: small requests run on the loop.
        turn: of requests that only the model has to do with (no sequence, no cache); None = none runs on the loop.
        cascade: when the answer is uncertain; None = it never is.
        cache_salt: names the version in the response cache; empty unless its answers may be remembered.
    """

    def __init__(
        self, loaded: Loaded, *, statistics: Statistics, limits: HostLimits, workers: Workers, clock: Clock
    ) -> None:
        self.manifest = loaded.manifest
        self.engine = loaded.engine
        self.setting = loaded.setting
        self.warm_up = loaded.warm_up
        self.statistics = statistics
        self.release = loaded.manifest.release
        self.wire_version = str(loaded.manifest.release)
        self.title = f"{loaded.manifest.name} release {loaded.manifest.release}"
        self.signature = Signature(loaded.manifest)
        self.stateful = loaded.manifest.stateful == "hidden"
        self.cascade = None if loaded.manifest.cascade is msgspec.UNSET else loaded.manifest.cascade
        cached = loaded.manifest.response_cache and loaded.manifest.stateful == "none"
        self.cache_salt = hashlib.sha256(loaded.manifest.encode()).digest() if cached else b""
        self.in_flight = 0
        self.used_at = 0.0
        self.told_at = 0.0
        warm_up = loaded.warm_up
        steady = not decodes(loaded.manifest)
        self.inline = steady and warm_up.runs > 0 and warm_up.p99_us <= limits.inline_us_max
        self._inline_elements_max = (
            int(warm_up.elements * limits.inline_us_max / max(1.0, warm_up.p99_us)) if self.inline else 0
        )
        self._limits = limits
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        # Wall time where a run has several threads: the loop waits for all of them.
        self._busy_s = time.thread_time if loaded.setting.threads == 1 else time.perf_counter
        self._engines = limits.slots if loaded.engine.concurrent or self.stateful else 1
        rows_max = loaded.setting.rows_max if self.signature.batchable else 1
        self._dispatch = Dispatch(
            self.title,
            loaded.engine,
            self.signature,
            BatchingConfig(
                rows_max=rows_max,
                queue_rows_max=limits.queue_rows_max,
                queue_bytes_max=limits.queue_bytes_max,
                engines=self._engines,
                window_s_max=limits.batch_window_us_max / 1e6 if rows_max > 1 else 0.0,
                priority_levels=limits.priority_levels,
                priority_default=limits.priority_default,
                priority_age_s=limits.priority_age_ms / 1e3,
                late_quantile=self.signature.late_quantile(limits.late_quantile),
            ),
            statistics=statistics,
            workers=workers,
            clock=clock,
        )
        self.sequences = Sequences(
            self.title,
            loaded.engine,
            self._dispatch,
            limits=limits,
            inline_run=self.inline,
            inline_start=self.inline and warm_up.sequence_us <= limits.inline_us_max,
            clock=clock,
        )
        self._joins = rows_max > 1
        self._turn = self._make_turn(rows_max) if self.inline and loaded.engine.concurrent else None
        self.turn = None if self.stateful or self.cache_salt else self._turn
        self._idle: asyncio.Future[None] | None = None
        self._keep_sequences = False
        self.is_closed = False

    def runs_inline(self, size: Size) -> bool:
        """Whether inputs of this size are answered without leaving the loop."""
        if not self.inline or (self._dispatch.batcher.running and not self.engine.concurrent):
            return False
        return self.signature.fixed or size.elements <= self._inline_elements_max

    def run_inline(self, inputs: Tensors, size: Size, deadline: float | None) -> Timed | asyncio.Future[Timed]:
        """Run on the loop: at once, or in a crowded turn together with the others that arrived in it.

        Raises:
            MeshError: what the model raised; the future also raises DEADLINE if time ran out.
        """
        if self._turn is None or not self._turn.arrive():
            return self.run_now(inputs, size)
        answer: asyncio.Future[Timed] = self._loop.create_future()
        self.join(inputs, size, deadline, answer)
        return answer

    def run_now(self, inputs: Tensors, size: Size) -> Timed:
        """Run on the loop, at once and alone.

        Raises:
            MeshError: what the model raised.
        """
        started = self._clock.monotonic()
        outputs = self.engine.run(inputs)
        ended = self._clock.monotonic()
        self.statistics.ran(size.rows, started, ended)
        return outputs, started, ended

    def join(self, inputs: Tensors, size: Size, deadline: float | None, answer: Answer) -> None:
        """Run by the end of the turn, together with those that may be joined."""
        assert self._turn is not None
        key = self.signature.key(inputs) if self._joins else ()
        self._turn.join(key, Waiting(inputs, size.rows, deadline, answer))

    @property
    def waiting(self) -> int:
        """Requests that wait for the engine."""
        return self._dispatch.batcher.waiting

    def queue_us(self) -> float:
        """How long a request that arrives now waits, by the runs lately or by the batch-1 time of what is before it."""
        batcher = self._dispatch.batcher
        if not batcher.running:
            return 0.0
        wait_s = batcher.wait_s(self._clock.monotonic())
        if wait_s is not None:
            return wait_s * 1e6
        ahead = batcher.waiting + batcher.running
        return max(0, ahead + 1 - self._engines) * self.warm_up.p50_us / self._engines

    def batch_wait_us(self) -> float:
        """How long a request that comes alone is kept waiting for company now."""
        return self._dispatch.batcher.window_s * 1e6

    def service_us(self, now: float) -> tuple[float, float]:
        """p50 and p95 of the model's time: lately, or at warm-up while too few requests have come."""
        recent = self.statistics.recent_us(now, (0.5, 0.95))
        return (recent[0], recent[1]) if recent else (self.warm_up.p50_us, self.warm_up.p99_us)

    async def run(self, inputs: Tensors, size: Size, context: RequestContext, size_bytes: int) -> Timed:
        """Run on the loop or in a thread, as the inputs allow.

        Raises:
            MeshError: as `run_inline` and `submit`.
        """
        if self.runs_inline(size):
            timed = self.run_inline(inputs, size, context.deadline)
            return timed if isinstance(timed, tuple) else await timed
        return await self.submit(inputs, size, context, size_bytes)

    def submit(
        self, inputs: Tensors, size: Size, context: RequestContext, size_bytes: int
    ) -> Coroutine[Any, Any, Timed]:
        """Run in a thread, alone or in a batch, once an engine is free.

        Raises:
            MeshError: OVERLOADED if the queue is full or the deadline cannot be kept, DEADLINE if it passed, or what
                the model raised.
        """
        key = self.signature.key(inputs)
        return self._dispatch.submit(inputs, context, rows=size.rows, key=key, size_bytes=size_bytes)

    def drained(self, *, keep_sequences: bool) -> asyncio.Future[None]:
        """Done once nothing is in flight (and no sequence is open); only requests of those may still be sent here."""
        if self._idle is None:
            self._keep_sequences = keep_sequences
            self._idle = self._loop.create_future()
            self.left()
        return self._idle

    def left(self) -> None:
        """A request is over: tell whoever waits for the version to drain."""
        if (
            self._idle is not None
            and not self._idle.done()
            and not self.in_flight
            and not (self._keep_sequences and len(self.sequences))
        ):
            self._idle.set_result(None)

    def close(self) -> None:
        """Refuse what still waits. The engine is its owner's to close, off the loop."""
        self.is_closed = True
        self._dispatch.close()
        for waiting in self._turn.take_all() if self._turn is not None else ():
            settle(waiting.answer, unloaded(self.title))

    def _make_turn(self, rows_max: int) -> Turn[Waiting]:
        """At first so many rows that their runs stay within what the loop may lag, each at its own p99.

        Requests that may not be joined run one by one, but still in a row: a model that shares the processor's caches
        with the protocol's code between any two runs takes a tenth longer, and so does the protocol.
        """
        limits = self._limits
        fitting = int(limits.inline_us_max / max(1.0, self.warm_up.p99_us))
        self._turn_rows = TurnRows(fitting, limits.inline_us_max, rows_max=rows_max)
        most = self._turn_rows.rows if self._joins else limits.queue_rows_max
        return Turn(self._run_turn, lambda waiting: waiting.rows, rows_max=most)

    def _run_turn(self, batch: list[Waiting]) -> None:
        live = [waiting for waiting in batch if not waiting.answer.done()]
        run = self._run_together if self._joins else self._run_in_a_row
        try:
            run(live)
        except Exception:  # noqa: BLE001 (nobody else would tell those who wait)
            _LOG.exception("a turn of %s failed", self.title)
            for waiting in live:
                settle(waiting.answer, failed(self.title))

    def _run_together(self, live: list[Waiting]) -> None:
        rows = sum(waiting.rows for waiting in live)
        self.statistics.release("turn", rows)
        began = self._busy_s()
        answers = self._dispatch.run_batch(live)
        self._turn_rows.observe(rows, (self._busy_s() - began) * 1e6)
        assert self._turn is not None
        self._turn.rows_max = self._turn_rows.rows
        self._dispatch.count(live, answers)
        for waiting, answer in zip(live, answers, strict=True):
            settle(waiting.answer, answer)

    def _run_in_a_row(self, live: list[Waiting]) -> None:
        """One by one until the loop has waited long enough; the others in the next turn."""
        assert self._turn is not None
        ends_at = self._clock.monotonic() + self._limits.turn_us_max / 1e6
        answers: list[Timed | MeshError] = []
        for waiting in live:
            if answers and self._clock.monotonic() >= ends_at:
                self._turn.join((), waiting)
            else:
                answers += self._dispatch.run_batch([waiting])
        self._dispatch.count(live[: len(answers)], answers)
        for waiting, answer in zip(live, answers, strict=False):
            settle(waiting.answer, answer)
