"""A mesh listener refuses names that were removed, on both transports, also on connections that are open."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from nearcast.errors import Code, MeshError
from nearcast.identity import CertificateAuthority, Identity, load_identity, make_csr
from nearcast.identity.files import write_file
from nearcast.transport.grpc import KINDS, Kind, make_channel, make_server
from nearcast.transport.grpcio_channel import TLS_SERVER_NAME
from nearcast.transport.mesh import Members
from nearcast.transport.seam import Call, Methods, Reply
from router.directory import Announcer


def enrol(authority: CertificateAuthority, folder: Path, name: str, role: str) -> Identity:
    folder.mkdir()
    key, csr = make_csr(name, role)
    write_file(folder / "node.key", key, mode=0o600)
    write_file(folder / "node.pem", authority.issue(csr, name=name, role=role, lifetime_s=3600))
    write_file(folder / "ca.pem", authority.certificate_pem)
    return load_identity(folder)


async def whoami(_: bytes, call: Call) -> Reply:
    return Reply((call.identity.encode(),))


async def greet(_: AsyncIterator[bytes], call: Call) -> AsyncIterator[Reply]:
    yield Reply((call.identity.encode(),))


async def stream_status(address: str, identity: Identity) -> grpc.StatusCode:
    """Stock grpcio: our channels make unary calls only. The call waits for the server without a word of its own."""
    credentials = grpc.ssl_channel_credentials(
        identity.ca.read_bytes(), identity.key.read_bytes(), identity.certificate.read_bytes()
    )
    options = [("grpc.ssl_target_name_override", TLS_SERVER_NAME)]
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        call = channel.stream_stream("/t.T/greet")(timeout=5)
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return error.code()
        return await call.code()


@pytest.mark.parametrize("kind", KINDS)
async def test_only_members_are_answered(kind: Kind, tmp_path: Path) -> None:
    authority = CertificateAuthority.create(tmp_path / "ca")
    cloud, edge, other = (
        enrol(authority, tmp_path / name, name, role)
        for name, role in (("c1", "cloud"), ("e1", "edge"), ("e2", "edge"))
    )
    members = Members()
    methods = members.guard(Methods(unary={"/t.T/whoami": whoami}, stream={"/t.T/greet": greet}))
    server = make_server(kind, methods, address="127.0.0.1:0", identity=cloud, require_client=True)
    await server.start()
    channels = {identity.name: make_channel("ngh2", server.address, identity=identity) for identity in (edge, other)}

    async def ask(name: str) -> str:
        reply = await channels[name].unary("/t.T/whoami", (b"",), deadline=time.monotonic() + 5)
        return b"".join(reply.body).decode()

    try:
        assert await ask("e1") == edge.uri
        assert await stream_status(server.address, edge) is grpc.StatusCode.OK
        members.remove_only(["e1", "somebody"])
        with pytest.raises(MeshError, match="'e1' was removed from the mesh") as caught:
            await ask("e1")
        assert caught.value.code is Code.FORBIDDEN
        assert await stream_status(server.address, edge) is grpc.StatusCode.PERMISSION_DENIED
        assert await ask("e2") == other.uri
        members.remove_only([])
        assert await ask("e1") == edge.uri
    finally:
        for channel in channels.values():
            await channel.close()
        await server.drain(0.2)


class Controller:
    """Answers announcements as it is told."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any] | MeshError] = []

    async def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        answer = self.answers.pop(0)
        if isinstance(answer, MeshError):
            raise answer
        return answer


async def test_the_last_word_of_the_controller_holds_while_it_is_away() -> None:
    controller, heard = Controller(), []
    for answer in ({"removed": ["e1"]}, MeshError(Code.UNAVAILABLE, "away"), {"removed": [7]}, {}):
        controller.answers.append(answer)
        announcer = Announcer(controller, addresses=dict, heed_removed=heard.append, interval_s=60)
        await announcer.start()
        await announcer.close()
    # Neither silence nor nonsense lets anyone in again; a controller that names nobody does.
    assert heard == [["e1"], []]
