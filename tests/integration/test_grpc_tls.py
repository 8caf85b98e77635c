"""Mutual TLS on both transports: who gets in, and who the server takes them for."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from nearcast.errors import Code, MeshError
from nearcast.identity import CertificateAuthority, Identity, client_tls, load_identity, make_csr
from nearcast.transport.grpc import KINDS, Kind, make_channel, make_server
from nearcast.transport.seam import Call, CallError, Limits, Methods, Reply, Server

LIMITS = Limits(connect_timeout_s=2.0)
# The replacement is a hook that would change the loop of everybody else's tests too.
pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy:pytest.PytestDeprecationWarning")


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


def enrol(ca: CertificateAuthority, folder: Path, role: str, name: str) -> Identity:
    folder.mkdir(parents=True)
    key, csr = make_csr(name, role)
    (folder / "node.key").touch(mode=0o600)
    (folder / "node.key").write_bytes(key)
    (folder / "node.pem").write_bytes(ca.issue(csr, name=name, role=role))
    (folder / "ca.pem").write_bytes(ca.certificate_pem)
    return load_identity(folder)


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    root = tmp_path_factory.mktemp("identities")
    ca, rogue_ca = CertificateAuthority.create(root / "ca"), CertificateAuthority.create(root / "rogue-ca")
    return {
        "cloud": enrol(ca, root / "c1", "cloud", "c1"),
        "edge": enrol(ca, root / "e1", "edge", "e1"),
        "rogue": enrol(rogue_ca, root / "rogue", "edge", "e1"),
    }


async def whoami(message: bytes, call: Call) -> Reply:
    return Reply((call.identity.encode(),))


@pytest.fixture(params=KINDS)
async def server(request: pytest.FixtureRequest, identities: dict[str, Identity]) -> AsyncIterator[Server]:
    server = make_server(
        request.param,
        Methods(unary={"/t.T/whoami": whoami}),
        address="127.0.0.1:0",
        limits=LIMITS,
        identity=identities["cloud"],
        require_client=True,
    )
    await server.start()
    yield server
    await server.drain(0.2)


@pytest.fixture(params=KINDS)
def channel_kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


async def call(kind: Kind, address: str, **options: object) -> str:
    channel = make_channel(kind, address, limits=LIMITS, **options)
    try:
        reply = await channel.unary("/t.T/whoami", (b"",), deadline=time.monotonic() + 5)
        return b"".join(reply.body).decode()
    finally:
        await channel.close()


async def test_the_server_knows_its_peer(server: Server, channel_kind: Kind, identities: dict[str, Identity]) -> None:
    assert await call(channel_kind, server.address, identity=identities["edge"]) == "spiffe://nearcast/edge/e1"


async def test_no_certificate_no_entry(server: Server, channel_kind: Kind, identities: dict[str, Identity]) -> None:
    with pytest.raises(CallError) as caught:
        await call(channel_kind, server.address, ca=identities["edge"].ca)
    assert caught.value.code is Code.UNAVAILABLE


async def test_another_authority_no_entry(server: Server, channel_kind: Kind, identities: dict[str, Identity]) -> None:
    # It trusts the right authority and shows a certificate of the wrong one.
    with pytest.raises(CallError) as caught:
        await call(channel_kind, server.address, identity=identities["rogue"], ca=identities["edge"].ca)
    assert caught.value.code is Code.UNAVAILABLE


async def test_a_rogue_server_is_not_believed(
    server: Server, channel_kind: Kind, identities: dict[str, Identity]
) -> None:
    with pytest.raises(CallError) as caught:
        await call(channel_kind, server.address, identity=identities["edge"], ca=identities["rogue"].ca)
    assert (caught.value.code, caught.value.sent) == (Code.UNAVAILABLE, False)


async def test_plain_text_no_entry(server: Server, channel_kind: Kind) -> None:
    with pytest.raises(CallError) as caught:
        await call(channel_kind, server.address)
    assert caught.value.code is Code.UNAVAILABLE


async def test_a_server_of_the_wrong_role_is_not_called(server: Server, identities: dict[str, Identity]) -> None:
    # Only ngh2 can look at the server's identity.
    with pytest.raises(CallError, match="not who it should be") as caught:
        await call("ngh2", server.address, identity=identities["edge"], roles=("sync",))
    assert (caught.value.code, caught.value.sent) == (Code.UNAVAILABLE, False)


async def test_a_client_without_alpn_is_closed(identities: dict[str, Identity]) -> None:
    server = make_server("ngh2", Methods(), address="127.0.0.1:0", identity=identities["cloud"])
    await server.start()
    host, port = server.address.split(":")
    for alpn in ((), ("http/1.1",)):
        tls = client_tls(identities["edge"], ca=identities["edge"].ca, alpn=alpn)
        try:
            reader, writer = await asyncio.open_connection(host, int(port), ssl=tls)
            assert await asyncio.wait_for(reader.read(), 2) == b""
            writer.close()
        except (ssl.SSLError, ConnectionError):
            pass
    await server.drain(0.1)


async def test_requiring_certificates_needs_an_identity() -> None:
    with pytest.raises(MeshError, match="identity"):
        make_server("ngh2", Methods(), address="127.0.0.1:0", require_client=True)
    with pytest.raises(MeshError, match="choose one of ngh2, grpcio"):
        make_server("h2", Methods(), address="127.0.0.1:0")  # type: ignore[arg-type]


async def test_the_server_goes_on_after_bad_handshakes(server: Server, identities: dict[str, Identity]) -> None:
    host, port = server.address.split(":")
    for _ in range(5):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16\x03\x01garbage that is no handshake")
        writer.close()
        await writer.wait_closed()
    assert await call("ngh2", server.address, identity=identities["edge"]) == "spiffe://nearcast/edge/e1"
