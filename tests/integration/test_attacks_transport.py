"""Attacks by whoever answers the agent's requests: bytes without end, or without haste, or that are no metadata."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nearcast.store.manifest import CHUNK_SIZE_BYTES
from tests.integration.agent_parts import Origin, Publisher, make_config, running, serving, settled, status_of
from tests.integration.attack_parts import Hostile, Template, attacked, refuse, told, trusted_files
from tests.patience import until

PIECE = b"x" * 65536
ENDLESS_BYTES = 64 * 1024 * 1024
"""Where an endless answer ends after all, if nobody stops reading."""
SOCKET_BYTES = 8 * 1024 * 1024
"""What the buffers of the two ends may swallow beyond what is read."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    made = Template(tmp_path_factory.mktemp("template"))
    made.publisher.push(2, scale=3.0, padding=CHUNK_SIZE_BYTES)
    made.publisher.roll(1, 2, share=0.5, salt="a")
    return made


@pytest.fixture
def publisher(template: Template, tmp_path: Path) -> Publisher:
    return template.copy(tmp_path)


@pytest.fixture
def origin(publisher: Publisher) -> Iterator[Origin]:
    with serving(publisher) as running_origin:
        yield running_origin


class Endless:
    """Answers without end, and without a length if `length` is None."""

    def __init__(self, part: str, length: int | None) -> None:
        self.part = part
        self.length = length
        self.sent_bytes = 0

    def __call__(self, handler: Any, path: str, _: bytes) -> bool:
        if self.part not in path:
            return False
        handler.send_response(200)
        if self.length is not None:
            handler.send_header("Content-Length", str(self.length))
        handler.end_headers()
        handler.close_connection = True
        try:
            while self.sent_bytes < ENDLESS_BYTES:
                handler.wfile.write(PIECE)
                self.sent_bytes += len(PIECE)
        except OSError:
            return True
        return True


@pytest.mark.parametrize("length", [None, 1 << 62], ids=["no-length", "huge-length"])
@pytest.mark.parametrize("part", ["timestamp", ".snapshot", ".rollout", "targets/channels"])
async def test_endless_metadata(
    tmp_path: Path, publisher: Publisher, origin: Origin, part: str, length: int | None
) -> None:
    config = make_config(tmp_path, publisher, origin)
    endless = Endless(part, length)
    with attacked(config, publisher, origin):
        origin.fault = endless
        async with running(config) as agent:
            await refuse(agent, config, "http://")
            assert endless.sent_bytes < SOCKET_BYTES, "reading stopped at the signed or the greatest allowed length"
    async with running(config) as agent:
        assert await agent.check()


async def test_endless_root(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    """There is no signed length for the next root: the client's own bound holds."""
    config = make_config(tmp_path, publisher, origin)
    hostile = Hostile(publisher, tmp_path / "hostile")
    hostile.path("root", 2).write_bytes(b"x" * 600_000)
    with attacked(config, publisher, origin, hostile):
        async with running(config) as agent:
            await refuse(agent, config, "not the signed ones")


async def test_an_endless_blob(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    config = make_config(tmp_path, publisher, origin)
    endless = Endless("/blobs/", None)
    with attacked(config, publisher, origin):
        origin.fault = endless
        async with running(config) as agent:
            await until(lambda: "Refused" in status_of(agent).error, "the blob is refused")
    staged = [path.stat().st_size for path in (tmp_path / "store" / ".staging").rglob("*") if path.is_file()]
    assert sum(staged) < CHUNK_SIZE_BYTES


@pytest.mark.parametrize("step", ["headers", "body"])
async def test_a_slow_loris(tmp_path: Path, publisher: Publisher, origin: Origin, step: str) -> None:
    """Each byte comes in time, and the whole never does."""
    config = make_config(tmp_path, publisher, origin, limits={"chunk_timeout_s": 0.4, "check_s": 0.8})

    def drip(handler: Any, path: str, data: bytes) -> bool:
        if "timestamp" not in path:
            return False
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        if step == "body":
            handler.wfile.write(b"Content-Length: %d\r\n\r\n" % len(data))
        try:
            for _ in range(60):
                handler.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass
        handler.close_connection = True
        return True

    with attacked(config, publisher, origin):
        origin.fault = drip
        async with running(config) as agent:
            await until(lambda: told(config).error, "the drip is noticed")
            assert "too slow" in told(config).error or "took too long" in told(config).error
    async with running(config) as agent:
        assert await agent.check()


JUNK: dict[str, bytes] = {
    "nothing": b"",
    "a page": b"<html>Log in to the hotel's network</html>",
    "no text": bytes(range(256)),
    "a list": b"[]",
    "a number": b"1e999",
    "too deep": b"[" * 15_000,
    "a surrogate": b'{"signatures":[],"signed":{"_type":"timestamp","spec_version":"1.0.31","version":9,"expires":'
    b'"2099-01-01T00:00:00Z","meta":{"snapshot.json":{"version":9}},"x":"\\ud800"}}',
    "huge version": b'{"signatures":[],"signed":{"_type":"timestamp","spec_version":"1.0.31","version":'
    + b"9" * 5000
    + b',"expires":"2099-01-01T00:00:00Z","meta":{"snapshot.json":{"version":9}}}}',
    "another role": b'{"signatures":[],"signed":{"_type":"root"}}',
    "oversized": b" " * 20_000,
}


@pytest.mark.parametrize("name", JUNK)
async def test_what_is_no_metadata(tmp_path: Path, publisher: Publisher, origin: Origin, name: str) -> None:
    config = make_config(tmp_path, publisher, origin)
    hostile = Hostile(publisher, tmp_path / "hostile")
    hostile.path("timestamp").write_bytes(JUNK[name])
    with attacked(config, publisher, origin, hostile):
        async with running(config) as agent:
            await refuse(agent, config, "Refused")
    async with running(config) as agent:
        assert await agent.check()


@pytest.mark.parametrize("part", ["timestamp", ".rollout", "/blobs/"])
async def test_a_compressed_bomb_is_not_inflated(
    tmp_path: Path, publisher: Publisher, origin: Origin, part: str
) -> None:
    """A server may claim any encoding: the signed bytes are the plain ones."""
    config = make_config(tmp_path, publisher, origin)
    bomb = gzip.compress(bytes(16 * 1024 * 1024))

    def inflate(handler: Any, path: str, _: bytes) -> bool:
        if part in path:
            origin.reply(handler, 200, bomb, {"Content-Encoding": "gzip"})
        return part in path

    with attacked(config, publisher, origin):
        origin.fault = inflate
        async with running(config) as agent:
            await until(lambda: "Refused" in told(config).error + status_of(agent).error, "the bomb is refused")


ANSWERS = [
    b"\x16\x03\x01\x02\x00" * 100,
    b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 500 No\r\nRetry-After: 99999999999999999999\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 204 None\r\n\r\n",
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
async def test_a_server_that_speaks_no_http(
    tmp_path: Path, publisher: Publisher, origin: Origin, answer: bytes
) -> None:
    config = make_config(tmp_path, publisher, origin)

    def talk(handler: Any, path: str, _: bytes) -> bool:
        if "timestamp" in path:
            handler.wfile.write(answer)
            handler.close_connection = True
        return "timestamp" in path

    with attacked(config, publisher, origin):
        origin.fault = talk
        async with running(config) as agent:
            assert not await agent.check()
            assert told(config).error
            before = trusted_files(config)
    assert trusted_files(config) == before


async def test_what_has_not_changed_is_not_sent_again(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    """An ETag spares the body; who lies with it can only hold back."""
    config = make_config(tmp_path, publisher, origin)
    statuses: list[int] = []

    def tagged(handler: Any, path: str, data: bytes) -> bool:
        if "timestamp" not in path:
            return False
        known = handler.headers.get("If-None-Match") == '"tag"'
        statuses.append(304 if known else 200)
        origin.reply(handler, statuses[-1], b"" if known else data, {"ETag": '"tag"', "Cache-Control": "max-age=30"})
        return True

    origin.fault = tagged
    async with running(config) as agent:
        await settled(agent, stable=1, candidate=2)
        assert await agent.check()
        assert statuses == [200, 304]
        publisher.roll(1)
        assert await agent.check(), "the liar's 304 is the old state, which is still genuine"
        assert status_of(agent).candidate == 2
        origin.fault = None
        assert await agent.check()
        await settled(agent, stable=1)


async def test_a_304_that_nobody_asked_for(tmp_path: Path, publisher: Publisher, origin: Origin) -> None:
    config = make_config(tmp_path, publisher, origin)
    with attacked(config, publisher, origin):
        origin.fault = lambda handler, *_: bool(origin.reply(handler, 304, b"") or True)
        async with running(config) as agent:
            await refuse(agent, config, "HTTP status 304")
