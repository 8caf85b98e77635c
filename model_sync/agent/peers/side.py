"""Both directions of one agent's exchange with other nodes, put together: the listener, and whom downloads may ask."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import suppress

from model_sync.agent.config import AgentConfig
from model_sync.agent.peers.download import Peers
from model_sync.agent.peers.holdings import Holdings
from model_sync.agent.peers.listener import NODE_ROLES, PeerServer
from model_sync.agent.peers.neighbours import Neighbours
from model_sync.agent.sources.http_source import HttpSource
from model_sync.agent.sources.mirrors import Mirrors
from nearcast.errors import Code, MeshError
from nearcast.identity import Identity
from nearcast.store import Store

RELOAD_S = 60.0
"""How often the listener looks for a renewed certificate."""


class PeerSide:
    """Made for an agent with `peer_listen`. `peers` is what its downloads use.

    Args:
        tls: makes the context of a new connection.
        make_origin: a connection to the repository and its mirrors.
        draw: uniform numbers in [0, 1).

    Raises:
        MeshError: INVALID_REQUEST without an identity or a control API: peers know each other by both.
    """

    def __init__(
        self,
        config: AgentConfig,
        store: Store,
        identity: Identity | None,
        *,
        tls: Callable[[], ssl.SSLContext] | None,
        make_origin: Callable[[], Mirrors],
        draw: Callable[[], float],
    ) -> None:
        if identity is None or not config.control:
            raise MeshError(
                Code.INVALID_REQUEST, "`peer_listen` needs `identity` and `control`; join the mesh or leave it empty."
            )
        self._identity = identity
        holdings = Holdings(store)
        self.server = PeerServer(
            holdings,
            identity,
            address=config.peer_listen,
            upload_bytes_per_s_max=config.limits.upload_bytes_per_s_max,
        )
        timeout_s = config.limits.connect_timeout_s
        self.peers = Peers(
            config.node,
            Neighbours(config.node, lambda: HttpSource(config.control, tls=tls, connect_timeout_s=timeout_s)),
            holdings,
            make_peer=lambda address: HttpSource(
                f"https://{address}", tls=tls, connect_timeout_s=timeout_s, roles=NODE_ROLES
            ),
            make_origin=make_origin,
            draw=draw,
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen; returns the address to announce."""
        await self.server.start()
        self._task = asyncio.create_task(self._follow_certificate())
        return self.server.address

    async def close(self) -> None:
        """Stop at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.server.close()

    async def _follow_certificate(self) -> None:
        """The node renews the certificate that lies in its identity folder; new peers are to see the new one."""
        shown = self._identity.certificate.stat().st_mtime_ns
        while True:
            await asyncio.sleep(RELOAD_S)
            with suppress(OSError, MeshError):
                present = self._identity.certificate.stat().st_mtime_ns
                if present != shown:
                    self._identity.reload()
                    shown = present
