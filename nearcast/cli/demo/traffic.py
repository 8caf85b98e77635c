"""Open-loop traffic: a request leaves when its time has come, whether or not earlier ones were answered."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from nearcast.errors import MeshError

IN_FLIGHT_MAX = 512
"""A mesh that hangs must not make the demo's memory grow."""
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one request came back with. `says` is the human form of the output."""

    model: str
    version: str
    served_by: str
    says: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request of the traffic. Times are monotonic seconds; `error` is empty for an answer."""

    client: str
    sent_at: float
    done_at: float
    answer: Answer | None
    error: str = ""

    @property
    def latency_ms(self) -> float:
        """From sending to the answer."""
        return (self.done_at - self.sent_at) * 1e3


Ask = Callable[[], Awaitable[Answer]]


class Traffic:
    """Sends `rate_per_s` requests a second through one client until it is stopped."""

    def __init__(self, client: str, ask: Ask, *, rate_per_s: float) -> None:
        self.client = client
        self.samples: list[Sample] = []
        self._ask = ask
        self._rate_per_s = rate_per_s
        self._open: set[asyncio.Task[None]] = set()
        self._pacer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._pacer = asyncio.create_task(self._pace())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._pacer is not None
        self._pacer.cancel()
        if self._open:
            await asyncio.wait(self._open, timeout=STOP_TIMEOUT_S)

    @property
    def failures(self) -> list[Sample]:
        """Requests without an answer."""
        return [sample for sample in self.samples if sample.error]

    def versions(self, since: float = 0.0) -> Counter[str]:
        """Answers by version, of requests sent after `since`."""
        return Counter(s.answer.version for s in self.samples if s.answer is not None and s.sent_at >= since)

    def served_by(self, since: float = 0.0) -> Counter[str]:
        """Answers by node, of requests sent after `since`."""
        return Counter(s.answer.served_by for s in self.samples if s.answer is not None and s.sent_at >= since)

    async def _pace(self) -> None:
        began, count = time.monotonic(), 0
        while True:
            await asyncio.sleep(max(0.0, began + count / self._rate_per_s - time.monotonic()))
            count += 1
            if len(self._open) < IN_FLIGHT_MAX:
                task = asyncio.create_task(self._send())
                self._open.add(task)
                task.add_done_callback(self._open.discard)

    async def _send(self) -> None:
        sent_at = time.monotonic()
        answer, error = None, ""
        try:
            answer = await self._ask()
        except MeshError as failure:
            error = str(failure)
        except Exception as failure:  # noqa: BLE001 - a foreign client's error is a failure of the mesh, whatever its type
            error = f"{type(failure).__name__}: {failure}"
        self.samples.append(
            Sample(client=self.client, sent_at=sent_at, done_at=time.monotonic(), answer=answer, error=error)
        )
