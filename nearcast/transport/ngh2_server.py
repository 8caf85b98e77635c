"""gRPC server on asyncio and libnghttp2: a protocol object per connection, a task per call, one write per loop turn."""

from __future__ import annotations

import asyncio
import ssl
from typing import cast

from nearcast.errors import Code, MeshError
from nearcast.transport.listener import Listener, within_descriptors
from nearcast.transport.ngh2_connection import require_alpn, wait_gone
from nearcast.transport.ngh2_server_connection import ServerConnection
from nearcast.transport.ngh2_server_state import ServerState
from nearcast.transport.seam import DEFAULT_LIMITS, Limits, Methods

_SWEEP_INTERVAL_S_MAX = 1.0
_SWEEP_INTERVAL_S_MIN = 0.05
# Of the shortest timeout: how late it may be noticed.
_SWEEP_SHARE = 0.25
# Connections looked at before others get their turn of the loop.
_SWEPT_AT_ONCE = 256
_IDLE_ROUNDS = 4
_NOTICE_S_MAX = 0.3
_CANCEL_GRACE_S = 1.0
_CLOSE_TIMEOUT_S = 0.5


class Ngh2Server:
    """A `Server` on libnghttp2.

    Args:
        methods: what it answers.
        address: `host:port` (port 0: the system chooses) or `unix:/path`.
        limits: bounds.
        tls: server context; None serves without TLS.
    """

    def __init__(
        self, methods: Methods, *, address: str, limits: Limits = DEFAULT_LIMITS, tls: ssl.SSLContext | None = None
    ) -> None:
        self._state = ServerState(methods=methods, limits=within_descriptors(limits))
        self._is_draining = False
        self._interval_s = _sweep_interval_s(limits)
        self._round = 0
        self._tls = require_alpn(tls) if tls is not None else None
        self._listener = Listener(address)
        self._loop: asyncio.AbstractEventLoop = cast("asyncio.AbstractEventLoop", None)
        self._sweeper: asyncio.Handle | None = None

    @property
    def address(self) -> str:
        return self._listener.address

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._listener.start(
            lambda: ServerConnection(self._state, self._loop),
            tls=self._tls,
            handshake_timeout_s=self._state.limits.handshake_timeout_s,
            handshakes_max=self._state.limits.handshakes_max,
        )
        self._sweep([])

    async def drain(self, timeout_s: float) -> None:
        if self._is_draining or self._loop is None:
            return
        ends_at = self._loop.time() + timeout_s
        self._is_draining = True
        self._listener.close()
        connections = list(self._state.connections)
        if connections:
            notice_s = min(_NOTICE_S_MAX, timeout_s)
            await asyncio.gather(*(connection.notify(notice_s) for connection in connections))
        for connection in list(self._state.connections):
            connection.say_goodbye()
        await self._wait_until_idle(ends_at)
        await self._close_all()

    async def _wait_until_idle(self, ends_at: float) -> None:
        idle = self._state.idle
        # A closed connection is one whose last answer has left: libnghttp2 wants nothing more after GOAWAY.
        while self._state.connections and any(not connection.is_quiet for connection in self._state.connections):
            left_s = ends_at - self._loop.time()
            if left_s <= 0:
                break
            idle.clear()
            try:
                await asyncio.wait_for(idle.wait(), min(left_s, 0.05))
            except TimeoutError:
                continue

    async def _close_all(self) -> None:
        for connection in list(self._state.connections):
            for stream in list(connection.streams.values()):
                connection.fail(stream, MeshError(Code.UNAVAILABLE, "The server is shutting down; ask another node."))
                self._state.cancel(stream)
            connection.flush()
            connection.close()
        await wait_gone(list(self._state.connections), _CLOSE_TIMEOUT_S)
        tasks = list(self._state.cancelled)
        if tasks:
            await asyncio.wait(tasks, timeout=_CANCEL_GRACE_S)
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._listener.wait_closed()

    def _sweep(self, rest: list[ServerConnection]) -> None:
        now = self._loop.time()
        for connection in rest[:_SWEPT_AT_ONCE]:
            # Thousands may be idle: those are looked at in every fourth round.
            if connection.is_lively or not self._round % _IDLE_ROUNDS:
                connection.sweep(now)
        del rest[:_SWEPT_AT_ONCE]
        if rest:
            self._sweeper = self._loop.call_soon(self._sweep, rest)
        else:
            self._round += 1
            self._sweeper = self._loop.call_later(self._interval_s, lambda: self._sweep(list(self._state.connections)))


def _sweep_interval_s(limits: Limits) -> float:
    shortest_s = min(
        limits.handshake_timeout_s,
        limits.upload_timeout_s,
        limits.stall_timeout_s,
        limits.idle_timeout_s,
        limits.keepalive_s,
        limits.keepalive_timeout_s,
        limits.connection_age_s or limits.idle_timeout_s,
    )
    return min(_SWEEP_INTERVAL_S_MAX, max(_SWEEP_INTERVAL_S_MIN, _SWEEP_SHARE * shortest_s))
