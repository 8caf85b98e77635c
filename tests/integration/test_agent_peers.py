"""Two and more agents that give each other chunks over mTLS: most bytes stay away from the origin, liars only delay."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import http.server
import json
import math
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_sync.agent.app import Agent
from model_sync.agent.peers.listener import UPLOADS_MAX, PeerServer, bitmap
from model_sync.replica.swarm import SwarmLimits
from nearcast.errors import MeshError
from nearcast.identity import CertificateAuthority, Identity, load_identity, server_tls
from nearcast.identity.authority import make_csr
from nearcast.store import Store
from tests.integration.agent_parts import MODEL, Origin, Publisher, make_config, running, settled

PADDING_BYTES = 3_000_000


class Mesh:
    """A CA, an origin with a node directory, and identities."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = CertificateAuthority.create(folder / "ca")
        self.publisher = Publisher(folder / "home")
        self.peers: dict[str, str] = {}
        self.origin = _Directory(self.publisher, self.peers)

    def identity(self, name: str, role: str = "edge", authority: CertificateAuthority | None = None) -> Identity:
        folder = self.folder / name / "identity"
        folder.mkdir(parents=True, exist_ok=True)
        key, csr = make_csr(name, role)
        (folder / "node.key").write_bytes(key)
        (folder / "node.key").chmod(0o600)
        (folder / "node.pem").write_bytes((authority or self.authority).issue(csr, name=name, role=role))
        (folder / "ca.pem").write_bytes(self.authority.certificate_pem)
        return load_identity(folder)

    def config(self, name: str, **fields: Any) -> Any:
        self.identity(name)
        settings = {"control": self.origin.url, "peer_listen": "127.0.0.1:0", "hint_wait_s": 0.0} | fields
        return make_config(self.folder / name, self.publisher, self.origin, node=name, **settings)

    def blob_bytes(self) -> int:
        """What the origin gave of blobs and deltas."""
        return sum(sent for path, _, sent in self.origin.served if "/blobs/" in path or "/deltas/" in path)

    def announce(self, agent: Agent) -> None:
        self.peers[agent.config.node] = agent._status.peer


class _Directory(Origin):
    def __init__(self, publisher: Publisher, peers: dict[str, str]) -> None:
        super().__init__(publisher)
        self.peers = peers

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.path == "/v1/nodes":
            rows = [{"name": name, "role": "edge", "addresses": {"peer": at}} for name, at in self.peers.items()]
            self.reply(handler, 200, json.dumps({"nodes": rows}).encode())
            return
        self._ranged(handler) if "bytes=" in handler.headers.get("Range", "") else super().answer(handler)

    def _ranged(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        place = self.publisher.repository.folder / handler.path.removeprefix("/repository/")
        data = place.read_bytes()
        first, _, last = handler.headers["Range"].removeprefix("bytes=").partition("-")
        start, end = int(first), int(last) + 1 if last else len(data)
        self.served.append((handler.path, start, end - start))
        self.reply(handler, 206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    made = Mesh(tmp_path)
    made.publisher.push(1, padding=PADDING_BYTES)
    made.publisher.roll(1)
    yield made
    made.origin.close()


async def test_the_second_node_gets_nearly_everything_from_the_first(mesh: Mesh) -> None:
    async with running(mesh.config("edge-1")) as first:
        await settled(first, stable=1)
        whole = mesh.blob_bytes()
        assert whole > PADDING_BYTES
        mesh.announce(first)
        mesh.origin.served.clear()
        async with running(mesh.config("edge-2")) as second:
            await settled(second, stable=1)
            assert mesh.blob_bytes() < 0.1 * whole
            assert first._peer_side is not None
            assert first._peer_side.server.sent_bytes > 0.9 * PADDING_BYTES
            mesh.announce(second)
        assert installed(mesh, "edge-2") == installed(mesh, "edge-1")


async def test_nodes_that_start_together_share_what_they_have_so_far(mesh: Mesh) -> None:
    names = [f"edge-{index}" for index in range(4)]
    mesh.publisher.push(2, scale=3.0, padding=PADDING_BYTES)
    async with contextlib.AsyncExitStack() as stack:
        agents = [await stack.enter_async_context(running(mesh.config(name))) for name in names]
        for agent in agents:
            await settled(agent, stable=1)
            mesh.announce(agent)
        for agent in agents:
            agent._peer_side.peers.limits = SwarmLimits(origin_bytes=1)  # as if the payload were large
            agent._peer_side.peers._neighbours._asked_at = -math.inf  # a directory is asked now and then
        mesh.origin.served.clear()
        mesh.publisher.roll(2)
        await asyncio.gather(*(agent.check() for agent in agents))
        for agent in agents:
            await settled(agent, stable=2)
        servers = [agent._peer_side.server for agent in agents if agent._peer_side is not None]
        given = sum(server.sent_bytes for server in servers)
    assert len({installed(mesh, name) for name in names}) == 1
    assert given + mesh.blob_bytes() >= 4 * PADDING_BYTES
    assert given > PADDING_BYTES
    assert mesh.blob_bytes() < 3 * PADDING_BYTES


def installed(mesh: Mesh, name: str) -> str:
    folder = Store(mesh.folder / name / "store").folder(MODEL, 1 if mesh.publisher.intent == 1 else 2)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()


class LyingPeer:
    """A node of the mesh, with a good certificate, that claims every chunk and sends something else."""

    def __init__(self, identity: Identity, chunks: int) -> None:
        self.asked = 0
        peer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                wants_chunk = self.path.count("/") == 4
                peer.asked += wants_chunk
                body = b"x" * (256 * 1024) + bitmap((1 << chunks) - 1, chunks)
                answer = body if wants_chunk else json.dumps({"held": f"{(1 << chunks) - 1:x}"}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        context = server_tls(identity, require_client=True, alpn=("http/1.1",))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


async def test_a_peer_that_lies_only_delays(mesh: Mesh) -> None:
    liar = LyingPeer(mesh.identity("edge-9"), 12)
    mesh.peers["edge-9"] = liar.address
    mesh.peers["edge-8"] = "127.0.0.1:9"  # and one that has gone
    try:
        async with running(mesh.config("edge-1")) as agent:
            await settled(agent, stable=1)
    finally:
        liar.close()
    assert liar.asked, "it was believed at first"
    assert liar.asked < 12, "and left alone after that"
    folder = Store(mesh.folder / "edge-1" / "store").folder(MODEL, 1)
    for entry in Store(mesh.folder / "edge-1" / "store").manifest(MODEL, 1).files:
        assert hashlib.sha256((folder / entry.path).read_bytes()).hexdigest() == entry.sha256


def ask(address: str, path: str, context: ssl.SSLContext) -> tuple[int, bytes]:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), context=context, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def client(mesh: Mesh, identity: Identity | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=mesh.authority.certificate_pem.decode())
    context.check_hostname = False
    if identity is not None:
        context.load_cert_chain(identity.certificate, identity.key)
    return context


async def test_only_nodes_of_the_mesh_are_answered(mesh: Mesh) -> None:
    async with running(mesh.config("edge-1")) as agent:
        await settled(agent, stable=1)
        address = agent._status.peer
        notes = next(entry for entry in agent._store.manifest(MODEL, 1).files if entry.path == "notes.txt")
        path = f"/v1/payloads/{notes.sha256}"
        stranger = CertificateAuthority.create(mesh.folder / "other-ca")
        node, operator = mesh.identity("edge-2"), mesh.identity("ann", "operator")
        foreign = mesh.identity("edge-3", authority=stranger)
        for identity in (None, foreign):
            with pytest.raises((OSError, http.client.HTTPException)):
                await asyncio.to_thread(ask, address, path, client(mesh, identity))
        assert (await asyncio.to_thread(ask, address, path, client(mesh, operator)))[0] == 403
        status, body = await asyncio.to_thread(ask, address, path, client(mesh, node))
        assert (status, int(json.loads(body)["held"], 16)) == (200, (1 << len(notes.chunks)) - 1)
        status, body = await asyncio.to_thread(ask, address, f"{path}/1", client(mesh, node))
        assert status == 200
        assert hashlib.sha256(body[: 256 * 1024]).hexdigest() == notes.chunks[1]
        for wrong in (f"{path}/99", f"{path}/-1", f"{path}/x", f"/v1/payloads/{'0' * 64}", "/v1/payloads/../x", "/"):
            assert (await asyncio.to_thread(ask, address, wrong, client(mesh, node)))[0] == 404
        damaged = agent._store.folder(MODEL, 1) / "notes.txt"
        damaged.chmod(0o600)
        damaged.write_bytes(b"y" * notes.size_bytes)
        status, _ = await asyncio.to_thread(ask, address, f"{path}/2", client(mesh, node))
        assert status == 404, "what is damaged here is not given to others"


class _Slow:
    """Holdings of one chunk."""

    def held(self, sha256: str) -> int:
        return 1

    def read(self, sha256: str, chunk: int) -> bytes:
        return b"z" * (256 * 1024)


async def test_uploads_are_bounded_in_number_and_rate(mesh: Mesh) -> None:
    identity = mesh.identity("edge-1")
    server = PeerServer(_Slow(), identity, address="127.0.0.1:0", upload_bytes_per_s_max=2_000_000)  # type: ignore[arg-type]
    await server.start()
    try:
        path, context = f"/v1/payloads/{'a' * 64}/0", client(mesh, mesh.identity("edge-2"))
        began = asyncio.get_running_loop().time()
        asked = [asyncio.to_thread(ask, server.address, path, context) for _ in range(UPLOADS_MAX + 3)]
        statuses = sorted(status for status, _ in await asyncio.gather(*asked))
        took_s = asyncio.get_running_loop().time() - began
        assert statuses.count(200) >= UPLOADS_MAX
        assert set(statuses) <= {200, 503}
        assert server.sent_bytes / took_s < 1.5 * 2_000_000 + 500_000
    finally:
        await server.close()


def test_peers_need_an_identity_and_a_control_api(mesh: Mesh, tmp_path: Path) -> None:
    config = make_config(tmp_path / "lone", mesh.publisher, mesh.origin, peer_listen="127.0.0.1:0")

    async def start() -> None:
        async with running(config):
            pass

    with pytest.raises(MeshError, match="peer_listen"):
        asyncio.run(start())
