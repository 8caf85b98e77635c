"""Does a version on trial answer like the one it would replace? Asked in the background, when the node has time.

An input that one of the two answered is run on the other too, and the outputs are compared within the tolerance of the
golden vectors. The user's answer has long left by then: nothing here can delay, change or fail it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from nearcast.errors import Code, MeshError
from nearcast.handler import Tensors
from nearcast.serving.golden import difference
from nearcast.serving.limits import HostLimits
from nearcast.serving.precedence import yield_to_serving
from nearcast.serving.version import HotVersion

ATOL = 1e-4
"""For a version without golden vectors."""


class Pair(msgspec.Struct, frozen=True, eq=False):
    """A version on trial and the one it is compared with."""

    trial: HotVersion
    reference: HotVersion

    @property
    def comparable(self) -> bool:
        """Whether a request of one may be run on the other: two, both stateless, and engines take a second caller."""
        if self.trial is self.reference:
            return False
        versions = (self.trial, self.reference)
        return all(one.manifest.stateful == "none" and one.engine.concurrent for one in versions)


class _Sample(msgspec.Struct, frozen=True, eq=False):
    pair: Pair
    answered: HotVersion
    inputs: Tensors
    outputs: Tensors
    taken: float


class Shadow:
    """Samples of one host. Lives on its loop; runs in one thread, started by the first sample.

    Attributes:
        due: the monotonic second from which on another request may be sampled.

    Args:
        limits: bounds of the sample.
        quiet: whether the host has nothing to do.
        now: the loop's monotonic time in seconds.
    """

    def __init__(self, limits: HostLimits, quiet: Callable[[], bool], now: Callable[[], float]) -> None:
        self._limits = limits
        self._quiet = quiet
        self._now = now
        self._queue: deque[_Sample] = deque()
        self.due = 0.0
        self._work: asyncio.Task[None] | None = None
        self._executor: ThreadPoolExecutor | None = None

    def take(self, pair: Pair, answered: HotVersion, inputs: Tensors, outputs: Tensors) -> None:
        """Take an answered request into the sample, once its answer is on its way: all that costs happens then."""
        if pair.trial.statistics.compared < self._limits.shadow_compared_max and not math.isinf(self.due):
            self.due = self._now() + self._limits.shadow_interval_s
            asyncio.get_running_loop().call_soon(self._sample, pair, answered, inputs, outputs)

    def _sample(self, pair: Pair, answered: HotVersion, inputs: Tensors, outputs: Tensors) -> None:
        statistics = pair.trial.statistics
        if math.isinf(self.due):
            return
        size_bytes = sum(array.nbytes for array in inputs.values())
        if len(self._queue) >= self._limits.shadow_queue_max or size_bytes > self._limits.shadow_bytes_max:
            statistics.shadows_dropped += 1
            return
        self._queue.append(_Sample(pair, answered, inputs, outputs, self._now()))
        if self._work is None:
            self._work = asyncio.get_running_loop().create_task(self._drain())

    async def close(self) -> None:
        """Drop what waits and end the thread once its run is over."""
        self.due = math.inf
        self._queue.clear()
        work, self._work = self._work, None
        if work is not None:
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    async def _drain(self) -> None:
        try:
            while self._queue:
                if self._quiet():
                    await self._compare(self._queue.popleft())
                    continue
                oldest = self._queue[0]
                if self._now() - oldest.taken > self._limits.shadow_wait_s:
                    self._queue.popleft()
                    oldest.pair.trial.statistics.shadows_dropped += 1
                await asyncio.sleep(self._limits.shadow_quiet_s)
        finally:
            self._work = None

    async def _compare(self, sample: _Sample) -> None:
        pair = sample.pair
        other = pair.reference if sample.answered is pair.trial else pair.trial
        try:
            other.signature.require(sample.inputs)
        except MeshError:
            return  # the other declares other inputs: nothing to compare
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "nearcast-shadow", initializer=yield_to_serving)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._executor, _differs, other, sample.inputs, sample.outputs, pair.trial)
        if found is not None:
            pair.trial.statistics.compared += 1
            pair.trial.statistics.disagreed += found


def _differs(other: HotVersion, inputs: Tensors, outputs: Tensors, trial: HotVersion) -> bool | None:
    """Whether `other` answers differently; None if it went away meanwhile, which says nothing."""
    atol = max((vector.atol for vector in trial.manifest.golden), default=ATOL)
    try:
        return bool(difference(outputs, other.engine.run(inputs), atol))
    except MeshError as error:
        # One of the two fails on what the other answers.
        return None if error.code is Code.UNAVAILABLE or other.is_closed else True
