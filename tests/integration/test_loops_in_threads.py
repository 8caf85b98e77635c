"""Several event loops in one process, as a program with the blocking client beside its own loop has them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from nearcast.identity import CertificateAuthority, Identity, load_identity, make_csr
from nearcast.transport.grpc import make_channel, make_server
from nearcast.transport.seam import Call, Methods, Reply

PATH = "/test.Echo/Say"
ROUNDS, SIZE_BYTES = 25, 200_000


async def say(body: bytes, _: Call) -> Reply:
    return Reply((bytes(body),))


async def echo_with_itself(mark: int, identity: Identity | None, wrong: list[str]) -> None:
    """A server and a client on this loop; every byte of a message is the loop's own mark."""
    server = make_server("ngh2", Methods(unary={PATH: say}), address="127.0.0.1:0", identity=identity)
    await server.start()
    channel = make_channel("ngh2", server.address, identity=identity)
    try:
        for _ in range(ROUNDS):
            reply = await channel.unary(PATH, (bytes([mark]) * SIZE_BYTES,))
            if b"".join(reply.body) != bytes([mark]) * SIZE_BYTES:
                wrong.append(f"loop {mark}")
    finally:
        await channel.close()
        await server.drain(0.2)


@pytest.mark.parametrize("tls", [False, True])
def test_loops_never_see_bytes_of_one_another(tmp_path: Path, *, tls: bool) -> None:
    identity = make_identity(tmp_path) if tls else None
    wrong: list[str] = []

    def run(mark: int) -> None:
        try:
            asyncio.run(echo_with_itself(mark, identity, wrong))
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(mark,)) for mark in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not wrong


def make_identity(folder: Path) -> Identity:
    authority = CertificateAuthority.create(folder / "ca")
    key, csr = make_csr("a", "edge")
    (folder / "node.key").touch(mode=0o600)
    (folder / "node.key").write_bytes(key)
    (folder / "node.pem").write_bytes(authority.issue(csr, name="a", role="edge", lifetime_s=3600))
    (folder / "ca.pem").write_bytes(authority.certificate_pem)
    return load_identity(folder)
