"""`python -m benchmarks.relay ADDRESS IDENTITY`: copies bytes to ADDRESS over the same mutual TLS and parses nothing.

The peer of the router benchmark: no hop written in Python can add less than this one on the same machine.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import cast

import uvloop

from nearcast.identity import client_tls, load_identity
from nearcast.runtime import parse_address
from nearcast.transport.tls_stream import TlsStream

HANDSHAKE_TIMEOUT_S = 5.0


class Upstream(asyncio.Protocol):
    """The connection to the node."""

    def __init__(self, client: asyncio.Transport) -> None:
        self._client = client
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        # The stream reads into the same buffer again.
        self._client.write(bytes(data))

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.close()


class Downstream(asyncio.Protocol):
    """The connection of the load tool; what comes before the node is connected waits."""

    def __init__(self, address: str, identity_folder: Path) -> None:
        identity = load_identity(identity_folder)
        self._context = client_tls(identity, ca=identity.ca, alpn=("h2",))
        self._place = parse_address(address)
        self._early: list[bytes] = []
        self._upstream: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connecting = asyncio.ensure_future(self._connect(cast("asyncio.Transport", transport)))

    def data_received(self, data: bytes) -> None:
        if self._upstream is None:
            self._early.append(data)
        else:
            self._upstream.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._upstream is not None:
            self._upstream.close()

    async def _connect(self, client: asyncio.Transport) -> None:
        loop = asyncio.get_running_loop()
        upstream = Upstream(client)
        stream = TlsStream(self._context, upstream, loop, server_side=False, handshake_timeout_s=HANDSHAKE_TIMEOUT_S)
        await loop.create_connection(lambda: stream, self._place.host, self._place.port)
        await stream.ready
        self._upstream = upstream.transport
        assert self._upstream is not None
        self._upstream.write(b"".join(self._early))


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Downstream(sys.argv[1], Path(sys.argv[2])), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    print(json.dumps({"address": f"{host}:{port}"}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
