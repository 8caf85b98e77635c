"""A node's report as a stream: sent when it changes and at an interval, however many routers watch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from msgspec.structs import replace

from nearcast.load import NodeReport
from nearcast.wire.report import encode_report

LOOK_S = 0.1
"""How often the report is read while somebody watches; no watcher hears more often."""
INTERVAL_S_MIN, INTERVAL_S_MAX = 0.02, 60.0
GAP_S_MAX = 10.0
WATCHERS_MAX = 256


class ReportFeed:
    """Reads the report once for all who follow it; nothing runs while nobody does.

    Args:
        report: what the node says about itself now.
        look_s: how often it is read.
    """

    def __init__(self, report: Callable[[], NodeReport], *, look_s: float = LOOK_S) -> None:
        self._report = report
        self._look_s = look_s
        self._latest = self._shape = NodeReport(node="", role="")
        self._body = b""
        # How often the load, and anything else, has changed.
        self._loads = self._shapes = 0
        self._followers: set[asyncio.Event] = set()
        self._looking: asyncio.TimerHandle | None = None

    @property
    def watchers(self) -> int:
        """How many follow now."""
        return len(self._followers)

    async def follow(self, *, interval_s: float, gap_s: float) -> AsyncGenerator[bytes, None]:
        """Encoded reports, until the node drains: one now, one at each change and one each interval.

        Who reads slowly gets fewer of them, always the latest. A change of load alone waits for the gap to pass.
        """
        loop = asyncio.get_running_loop()
        interval_s = min(max(interval_s, INTERVAL_S_MIN), INTERVAL_S_MAX)
        gap_s = min(max(gap_s, 0.0), GAP_S_MAX, interval_s)
        woken = asyncio.Event()
        if not self._followers:
            self._look(loop)
        self._followers.add(woken)
        try:
            while True:
                shapes, loads = self._shapes, self._loads
                sent_at = loop.time()
                yield self._body
                if self._latest.draining and shapes == self._shapes:
                    return
                while shapes == self._shapes:
                    waited_s = loop.time() - sent_at
                    if waited_s >= interval_s or (loads != self._loads and waited_s >= gap_s):
                        break
                    woken.clear()
                    until_s = gap_s if loads != self._loads else interval_s
                    timer = loop.call_later(until_s - waited_s, woken.set)
                    try:
                        await woken.wait()
                    finally:
                        timer.cancel()
        finally:
            self._followers.discard(woken)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read the report, and again while somebody follows; wake the followers if it tells something new."""
        if self._looking is not None:
            self._looking.cancel()
        self._looking = loop.call_later(self._look_s, self._look_again, loop)
        report = self._report()
        if report == self._latest:
            return
        self._latest = report
        self._body = encode_report(report)
        self._loads += 1
        shape = _shape(report)
        if shape != self._shape:
            self._shape = shape
            self._shapes += 1
        for follower in self._followers:
            follower.set()

    def _look_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looking = None
        if self._followers:
            self._look(loop)


def _shape(report: NodeReport) -> NodeReport:
    """The report without what changes all the time."""
    return replace(
        report,
        in_flight=0,
        versions=tuple(
            replace(version, in_flight=0, queue_us=0.0, service_p50_us=0.0, service_p95_us=0.0, eta_ms=0.0)
            for version in report.versions
        ),
    )
