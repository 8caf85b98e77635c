"""One hot version: its engine, its queue, its sequences, its statistics."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Hashable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors
from nearcast.serving.batching import Batcher, BatchingConfig, Expire, Instruction, Refuse, Run
from nearcast.serving.engines import Timed
from nearcast.serving.joining import join, split
from nearcast.serving.limits import HostLimits
from nearcast.serving.loading import Loaded
from nearcast.serving.sequences import Sequences
from nearcast.serving.signature import Signature
from nearcast.serving.statistics import Statistics
from nearcast.serving.turn import Turn

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Waiting:
    inputs: Tensors
    rows: int
    deadline: float | None
    answer: asyncio.Future[Timed]


class HotVersion:
    """A loaded and warmed version. Lives on one loop; runs inline there if it is quick enough, else in threads.

    Attributes:
        in_flight: requests that have arrived and are not answered.
        used_at: when the last one arrived, in monotonic seconds.
        inline: small requests run on the loop.
    """

    def __init__(
        self, loaded: Loaded, *, statistics: Statistics, limits: HostLimits, executor: Executor, clock: Clock
    ) -> None:
        self.manifest = loaded.manifest
        self.engine = loaded.engine
        self.warm_up = loaded.warm_up
        self.statistics = statistics
        self.release = loaded.manifest.release
        self.wire_version = str(loaded.manifest.release)
        self.title = f"{loaded.manifest.name} release {loaded.manifest.release}"
        self.signature = Signature(loaded.manifest)
        self.stateful = loaded.manifest.stateful == "hidden"
        self.in_flight = 0
        self.used_at = 0.0
        warm_up = loaded.warm_up
        self.inline = warm_up.runs > 0 and warm_up.busy_p99_us <= limits.inline_us_max
        self.sequences = Sequences(
            self.title,
            loaded.engine,
            limits=limits,
            inline_run=self.inline,
            inline_start=self.inline and warm_up.sequence_us <= limits.inline_us_max,
            executor=executor,
            clock=clock,
        )
        self._inline_elements_max = (
            int(warm_up.elements * limits.inline_us_max / max(1.0, warm_up.busy_p99_us)) if self.inline else 0
        )
        self._limits = limits
        self._executor = executor
        self._clock = clock
        engines = limits.slots if loaded.engine.concurrent else 1
        rows_max = limits.batch_rows_max if self.signature.batchable else 1
        self._batcher = Batcher(
            BatchingConfig(rows_max=rows_max, queue_rows_max=limits.queue_rows_max, engines=engines)
        )
        self._engines = engines
        self._turn = self._make_turn() if self.inline and rows_max > 1 and loaded.engine.concurrent else None
        self._ids = itertools.count()
        self._waiting: dict[int, _Waiting] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._idle: asyncio.Future[None] | None = None
        self._keep_sequences = False
        self.is_closed = False

    def runs_inline(self, inputs: Tensors) -> bool:
        """Whether these inputs are answered without leaving the loop."""
        if not self.inline or (self._batcher.running and not self.engine.concurrent):
            return False
        return self.signature.fixed or sum(array.size for array in inputs.values()) <= self._inline_elements_max

    async def run_inline(self, inputs: Tensors, deadline: float | None) -> Timed:
        """Run on the loop: at once, or in a crowded turn together with the others that arrived in it.

        Raises:
            MeshError: what the model raised, or DEADLINE if time ran out.
        """
        turn = self._turn
        if turn is None or not turn.arrive():
            started = self._clock.monotonic()
            outputs = self.engine.run(inputs)
            ended = self._clock.monotonic()
            self.statistics.ran(self.signature.rows(inputs), started, ended)
            return outputs, started, ended
        answer: asyncio.Future[Timed] = asyncio.get_running_loop().create_future()
        turn.join(self.signature.key(inputs), _Waiting(inputs, self.signature.rows(inputs), deadline, answer))
        return await answer

    def queue_us(self) -> float:
        """How long a request that arrives now waits, by the batch-1 time of what is before it."""
        ahead = self._batcher.waiting + self._batcher.running
        return max(0, ahead + 1 - self._engines) * self.warm_up.p50_us / self._engines

    def service_us(self, now: float) -> tuple[float, float]:
        """p50 and p95 of the model's time: lately, or at warm-up while too few requests have come."""
        recent = self.statistics.recent_us(now, (0.5, 0.95))
        return (recent[0], recent[1]) if recent else (self.warm_up.p50_us, self.warm_up.p99_us)

    async def submit(self, inputs: Tensors, deadline: float | None) -> Timed:
        """Run in a thread, alone or in a batch, once an engine is free.

        Raises:
            MeshError: OVERLOADED if the queue is full, DEADLINE if time ran out in it, or what the model raised.
        """
        rows = self.signature.rows(inputs)
        key: Hashable = self.signature.key(inputs)
        request_id = next(self._ids)
        answer: asyncio.Future[Timed] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = _Waiting(inputs, rows, deadline, answer)
        self._obey(self._batcher.add(self._clock.monotonic(), request_id, rows, key=key, deadline=deadline))
        try:
            return await answer
        except asyncio.CancelledError:
            if self._batcher.cancel(request_id):
                del self._waiting[request_id]
            raise

    def drained(self, *, keep_sequences: bool) -> asyncio.Future[None]:
        """Done once nothing is in flight (and no sequence is open); only requests of those may still be sent here."""
        if self._idle is None:
            self._keep_sequences = keep_sequences
            self._idle = asyncio.get_running_loop().create_future()
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
        if self._timer is not None:
            self._timer.cancel()
        for request_id in list(self._waiting):
            self._batcher.cancel(request_id)
            _settle(self._waiting.pop(request_id).answer, _unloaded(self.title))
        for waiting in self._turn.take_all() if self._turn is not None else ():
            _settle(waiting.answer, _unloaded(self.title))

    def _make_turn(self) -> Turn[_Waiting] | None:
        """So many rows that a run stays within what the loop may lag, by the batch-1 time; None if that is one."""
        fitting = int(self._limits.inline_us_max / max(1.0, self.warm_up.busy_p50_us))
        rows_max = min(fitting, self._limits.batch_rows_max)
        return Turn(self._run_turn, lambda waiting: waiting.rows, rows_max=rows_max) if rows_max > 1 else None

    def _run_turn(self, batch: list[_Waiting]) -> None:
        live = [waiting for waiting in batch if not waiting.answer.done()]
        self.statistics.release("turn", sum(waiting.rows for waiting in live))
        answers = self._run_batch(live)
        self._count(live, answers)
        for waiting, answer in zip(live, answers, strict=True):
            _settle(waiting.answer, answer)

    def _obey(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Run(ids, rows, reason):
                    self.statistics.release(reason, rows)
                    self._start([self._waiting.pop(request_id) for request_id in ids])
                case Refuse(request_id):
                    _settle(self._waiting.pop(request_id).answer, self._overloaded())
                case Expire(ids):
                    for request_id in ids:
                        _settle(self._waiting.pop(request_id).answer, _expired())
        self._arm()

    def _arm(self) -> None:
        wake = self._batcher.next_wake()
        if wake is None or (self._timer is not None and self._timer_at <= wake):
            # A timer that rings too early arms the next one; cancelling one for each request would fill the loop.
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = wake
        delay_s = max(0.0, wake - self._clock.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._obey(self._batcher.tick(self._clock.monotonic()))

    def _start(self, batch: list[_Waiting]) -> None:
        job = asyncio.get_running_loop().run_in_executor(self._executor, self._run_batch, batch)
        job.add_done_callback(lambda done: self._finish(batch, done))

    def _finish(self, batch: list[_Waiting], job: asyncio.Future[list[Timed | MeshError]]) -> None:
        # First the engine gets new work, then the clients their answers.
        self._obey(self._batcher.finish(self._clock.monotonic()))
        answers: list[Timed | MeshError]
        if job.cancelled():
            answers = [_unloaded(self.title) for _ in batch]
        elif (error := job.exception()) is not None:
            _LOG.error("%s failed", self.title, exc_info=error)
            answers = [MeshError(Code.INTERNAL, f"Model {self.title} failed; the log says why.") for _ in batch]
        else:
            answers = job.result()
            self._count(batch, answers)
        for waiting, answer in zip(batch, answers, strict=True):
            _settle(waiting.answer, answer)

    def _count(self, batch: list[_Waiting], answers: list[Timed | MeshError]) -> None:
        """Count the runs: answers that began at the same instant come from the same one."""
        runs: dict[float, tuple[int, float]] = {}
        for waiting, answer in zip(batch, answers, strict=True):
            if not isinstance(answer, MeshError):
                _, started, ended = answer
                runs[started] = (runs[started][0] + waiting.rows if started in runs else waiting.rows, ended)
        for started, (rows, ended) in runs.items():
            self.statistics.ran(rows, started, ended)

    def _run_batch(self, batch: list[_Waiting]) -> list[Timed | MeshError]:
        """In a thread, or for a crowded turn on the loop: each request gets its own answer or error."""
        now = self._clock.monotonic()
        answers: dict[int, Timed | MeshError] = {}
        live = [index for index, waiting in enumerate(batch) if waiting.deadline is None or waiting.deadline > now]
        if len(live) > 1:
            try:
                answers |= zip(live, self._run_joined([batch[index] for index in live]), strict=True)
            except (MeshError, ValueError, TypeError, MemoryError):
                # One request may have failed all of them: each gets a run of its own.
                _LOG.info("a batch of %s failed; its requests run one by one", self.title, exc_info=True)
        for index in live:
            if index not in answers:
                answers[index] = self._run_alone(batch[index].inputs)
        return [answers.get(index) or _expired() for index in range(len(batch))]

    def _run_joined(self, batch: list[_Waiting]) -> list[Timed]:
        joined = join([waiting.inputs for waiting in batch], self.signature.input_axes)
        started = self._clock.monotonic()
        outputs = self.engine.run(joined)
        ended = self._clock.monotonic()
        parts = split(outputs, [waiting.rows for waiting in batch], self.signature.output_axes)
        return [(part, started, ended) for part in parts]

    def _run_alone(self, inputs: Tensors) -> Timed | MeshError:
        started = self._clock.monotonic()
        try:
            return self.engine.run(inputs), started, self._clock.monotonic()
        except MeshError as error:
            return error

    def _overloaded(self) -> MeshError:
        return MeshError(
            Code.OVERLOADED,
            f"The queue of {self.title} is full ({self._batcher.rows_waiting} rows wait); try again later.",
            retry_after_ms=max(1, int(self.queue_us() / 1000)),
        )


def _settle(answer: asyncio.Future[Timed], result: Timed | MeshError) -> None:
    if answer.done():
        return
    if isinstance(result, MeshError):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _expired() -> MeshError:
    return MeshError(Code.DEADLINE, "The deadline passed while the request waited for the model.")


def _unloaded(title: str) -> MeshError:
    return MeshError(Code.UNAVAILABLE, f"Model {title} is being unloaded; try again.")
