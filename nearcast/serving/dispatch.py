"""The queue of one version in front of its engine: the batcher's shell, with the futures, the timer and the threads."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Protocol

import msgspec

from nearcast.clock import Clock
from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext, Tensors
from nearcast.serving.batching import Batcher, BatchingConfig, Expire, Instruction, Refuse, Run
from nearcast.serving.engines import LoadedModel, Runner, Timed
from nearcast.serving.joining import join, split
from nearcast.serving.pipeline.model import PipelinedModel
from nearcast.serving.signature import Signature
from nearcast.serving.statistics import Statistics
from nearcast.serving.workers import Workers

_LOG = logging.getLogger(__name__)
_FIRST, _SECOND, _ROWS = itemgetter(0), itemgetter(1), attrgetter("rows")


class Answer(Protocol):
    """What a request gets: a future, or what takes a future's place. It ends once, unless it is cancelled before."""

    def done(self) -> bool:
        """Whether nobody waits for it any more."""
        ...

    def set_result(self, result: Timed, /) -> None:
        """The model's answer."""
        ...

    def set_exception(self, exception: MeshError, /) -> None:
        """Why there is none."""
        ...


class Waiting(msgspec.Struct, eq=False):
    """A request until it is over. `step` runs instead of the engine; `left` is called once nothing of it can run.

    The run that it takes part in says how long it spent on tensors: `before_s` the engine, and `after_s`.
    """

    inputs: Tensors
    rows: int
    deadline: float | None
    answer: Answer
    step: Callable[[], Timed] | None = None
    left: Callable[[], None] | None = None
    before_s: float = 0.0
    after_s: float = 0.0


class Dispatch:
    """Requests in, answers out; runs in threads what the batcher releases. Lives on one loop.

    An answer's deadline is kept here and not by the thread: whoever waits is told in time even if the engine is stuck.
    """

    def __init__(
        self,
        title: str,
        engine: LoadedModel,
        signature: Signature,
        config: BatchingConfig,
        *,
        statistics: Statistics,
        workers: Workers,
        clock: Clock,
    ) -> None:
        self.batcher = Batcher(config)
        self._title = title
        # With images to decode, a bad or late one must end before the others run with it.
        self._pipeline = engine if isinstance(engine, PipelinedModel) and engine.decodes else None
        self._runner: Runner = engine if self._pipeline is None else self._pipeline.core
        self._axes = signature.input_axes if self._pipeline is None else self._pipeline.prepared_axes
        self._signature = signature
        self._statistics = statistics
        self._joins = config.rows_max > 1
        self._workers = workers
        self._clock = clock
        self._ids = itertools.count()
        self._open: dict[int, Waiting] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0

    async def submit(
        self,
        inputs: Tensors,
        context: RequestContext,
        *,
        rows: int = 1,
        key: Hashable = (),
        size_bytes: int = 0,
        step: Callable[[], Timed] | None = None,
        left: Callable[[], None] | None = None,
    ) -> Timed:
        """Run in a thread, alone or in a batch, once an engine is free.

        Raises:
            MeshError: OVERLOADED if the queue is full or the deadline cannot be kept, DEADLINE if it passed, or what
                the model raised.
        """
        request_id = next(self._ids)
        answer: asyncio.Future[Timed] = asyncio.get_running_loop().create_future()
        self._open[request_id] = Waiting(inputs, rows, context.deadline, answer, step, left)
        self._obey(
            self.batcher.add(
                self._clock.monotonic(),
                request_id,
                rows,
                key=key,
                deadline=context.deadline,
                priority=context.priority,
                size_bytes=size_bytes,
            )
        )
        try:
            return await answer
        except asyncio.CancelledError:
            if self.batcher.cancel(request_id):
                self._end(request_id)
            raise

    def close(self) -> None:
        """Refuse what still waits; what runs is answered once it is done."""
        if self._timer is not None:
            self._timer.cancel()
        for request_id in list(self._open):
            if self.batcher.cancel(request_id):
                settle(self._end(request_id).answer, unloaded(self._title))

    def _end(self, request_id: int) -> Waiting:
        waiting = self._open.pop(request_id)
        if waiting.left is not None:
            waiting.left()
        return waiting

    def _obey(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Run(ids, rows, reason):
                    self._statistics.release(reason, rows)
                    self._start(ids)
                case Refuse(request_id, why, _):
                    self._statistics.refuse(why)
                    settle(self._end(request_id).answer, self._refusal(instruction))
                case Expire(ids):
                    for request_id in ids:
                        self._expire(request_id)
        self._arm()

    def _expire(self, request_id: int) -> None:
        waiting = self._open[request_id]
        if self.batcher.is_running(request_id):
            settle(waiting.answer, _too_slow())
        else:
            settle(self._end(request_id).answer, expired())

    def _arm(self) -> None:
        wake = self.batcher.next_wake()
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
        self._obey(self.batcher.tick(self._clock.monotonic()))

    def _start(self, ids: tuple[int, ...]) -> None:
        batch = [self._open[request_id] for request_id in ids]
        try:
            self._workers.run(partial(self.run_batch, batch), partial(self._finish, ids, batch))
        except Exception as error:  # noqa: BLE001 (it is answered, and the engine is free again)
            # Not at once: what waits is handed over next, and may fail like this.
            asyncio.get_running_loop().call_soon(self._finish, ids, batch, error)

    def _finish(
        self, ids: tuple[int, ...], batch: list[Waiting], outcome: list[Timed | MeshError] | BaseException
    ) -> None:
        answers: list[Timed | MeshError]
        if isinstance(outcome, asyncio.CancelledError):
            answers = [unloaded(self._title) for _ in batch]
        elif isinstance(outcome, BaseException):
            _LOG.error("%s failed", self._title, exc_info=outcome)
            answers = [failed(self._title) for _ in batch]
        else:
            answers = outcome
            self.count(batch, answers)
        for request_id in ids:
            self._end(request_id)
        # First the engine gets new work, then the clients their answers.
        ran = not any(isinstance(answer, MeshError) for answer in answers)
        self._obey(self.batcher.finish(self._clock.monotonic(), ids[0], ran=ran))
        for waiting, answer in zip(batch, answers, strict=True):
            settle(waiting.answer, answer)

    def count(self, batch: Sequence[Waiting], answers: Sequence[Timed | MeshError]) -> None:
        """Count the runs: answers that began at the same instant come from the same one."""
        ran = [
            (answer[1:], waiting)
            for waiting, answer in zip(batch, answers, strict=True)
            if type(answer) is tuple and waiting.step is None
        ]
        for (started, ended), group in groupby(ran, _FIRST):
            run = list(map(_SECOND, group))
            self._statistics.ran(
                sum(map(_ROWS, run)),
                started,
                ended,
                requests=sum([not waiting.answer.done() for waiting in run]),
                before_s=run[0].before_s,
                after_s=run[0].after_s,
            )

    def run_batch(self, batch: list[Waiting]) -> list[Timed | MeshError]:
        """Run some requests, joined if they may be: each gets its own answer or error. In a thread or on the loop."""
        now = self._clock.monotonic()
        if len(batch) == 1 and self._pipeline is None:
            (alone,) = batch
            return [
                self._run_alone(alone, alone.inputs) if alone.deadline is None or alone.deadline > now else expired()
            ]
        answers: dict[int, Timed | MeshError] = {}
        live = [index for index, waiting in enumerate(batch) if waiting.deadline is None or waiting.deadline > now]
        parts: list[Tensors] = [waiting.inputs for waiting in batch]
        if self._pipeline is not None:
            answers |= self._prepare(self._pipeline, batch, live, parts)
            live = [index for index in live if index not in answers]
        if len(live) > 1 and self._joins:
            try:
                joined = self._run_joined([batch[index] for index in live], [parts[index] for index in live], now)
                answers |= zip(live, joined, strict=True)
            except Exception:  # noqa: BLE001 (it is logged)
                # One request may have failed all of them: each gets a run of its own.
                _LOG.info("a batch of %s failed; its requests run one by one", self._title, exc_info=True)
        for index in live:
            if index not in answers:
                answers[index] = self._run_alone(batch[index], parts[index])
        return [answers.get(index) or expired() for index in range(len(batch))]

    def _prepare(
        self, pipeline: PipelinedModel, batch: Sequence[Waiting], live: Sequence[int], parts: list[Tensors]
    ) -> dict[int, Timed | MeshError]:
        """Decode each request for itself, into `parts`; answers what is wrong with those that are bad or too late."""
        wrong: dict[int, Timed | MeshError] = {}
        for index in live:
            waiting = batch[index]
            if waiting.step is None:
                began = self._clock.monotonic()
                try:
                    parts[index] = pipeline.prepare(waiting.inputs, partial(self._require_time, waiting))
                    self._require_time(waiting)
                    waiting.before_s = self._clock.monotonic() - began
                except Exception as error:  # noqa: BLE001 (one of several requests: the others want their answers)
                    wrong[index] = self._failure(error)
        return wrong

    def _require_time(self, waiting: Waiting) -> None:
        if waiting.answer.done() or (waiting.deadline is not None and waiting.deadline <= self._clock.monotonic()):
            raise expired()

    def _run_joined(self, batch: Sequence[Waiting], parts: Sequence[Tensors], taken: float) -> list[Timed]:
        joined = join(parts, self._axes)
        before_s = self._clock.monotonic() - taken
        outputs = self._runner.run(joined)
        ended = self._clock.monotonic()
        apart = split(outputs, [waiting.rows for waiting in batch], self._signature.output_axes)
        after_s = self._clock.monotonic() - ended
        for waiting in batch:
            waiting.before_s, waiting.after_s = before_s, after_s
        return [(part, taken, ended) for part in apart]

    def _run_alone(self, waiting: Waiting, inputs: Tensors) -> Timed | MeshError:
        started = self._clock.monotonic() - waiting.before_s
        try:
            if waiting.step is not None:
                return waiting.step()
            return self._runner.run(inputs), started, self._clock.monotonic()
        except Exception as error:  # noqa: BLE001 (one of several requests: the others want their answers)
            return self._failure(error)

    def _failure(self, error: Exception) -> MeshError:
        if isinstance(error, MeshError):
            return error
        _LOG.error("%s failed", self._title, exc_info=error)
        return failed(self._title)

    def _refusal(self, refusal: Refuse) -> MeshError:
        if refusal.why == "hopeless":
            needed_ms = self.batcher.curve.quantile_s(1, 0.5) * 1e3
            return MeshError(
                Code.DEADLINE,
                f"The deadline is too short for {self._title}, which lately needs about {needed_ms:.1f} ms.",
            )
        reason = {
            "full": f"is full ({self.batcher.rows_waiting} rows wait)",
            "displaced": "is full and more important requests came",
            "late": "is too long to answer before the deadline",
        }[refusal.why]
        retry_after_ms = max(1, -int(-1e3 * (refusal.retry_s or 0.0) // 1))
        return MeshError(
            Code.OVERLOADED, f"The queue of {self._title} {reason}; try again later.", retry_after_ms=retry_after_ms
        )


def settle(answer: Answer, result: Timed | MeshError) -> None:
    """Give a request its end, unless it has one."""
    if answer.done():
        return
    if isinstance(result, MeshError):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def expired() -> MeshError:
    """The error for work that was dropped before it ran."""
    return MeshError(Code.DEADLINE, "The deadline passed while the request waited for the model.")


def unloaded(title: str) -> MeshError:
    """The error for work that waits for a version which goes."""
    return MeshError(Code.UNAVAILABLE, f"Model {title} is being unloaded; try again.")


def failed(title: str) -> MeshError:
    """The error for work that broke as no model should; how it did is for the log."""
    return MeshError(Code.INTERNAL, f"Model {title} failed; the log says why.")


def _too_slow() -> MeshError:
    return MeshError(
        Code.DEADLINE, "The deadline passed while the model ran on the request; send a longer deadline.", sent=True
    )
