"""The listener whose HTTP server is made when the first client comes."""

from __future__ import annotations

import asyncio
import errno
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from nearcast.errors import Code, MeshError
from nearcast.runtime import http_listener
from nearcast.runtime.http_listener import HttpListener

WAIT_S = 30.0


class Maker:
    """Makes a server that says hello, after as many failures as it is told; counts its calls."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.calls = 0

    async def make(self) -> web.AppRunner:
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError(errno.EMFILE, "Too many open files")

        async def answer(_: web.Request) -> web.Response:
            return web.Response(text="hello")

        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        return runner


@asynccontextmanager
async def listening(maker: Maker, address: str = "127.0.0.1:0") -> AsyncIterator[HttpListener]:
    listener = HttpListener(address, maker.make)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.close()


async def get(url: str, unix: Path | None = None) -> str:
    connector = None if unix is None else aiohttp.UnixConnector(str(unix))
    async with aiohttp.ClientSession(connector=connector) as session, session.get(url) as answer:
        return await answer.text()


async def test_the_first_client_waits_for_the_server_and_the_others_find_it() -> None:
    maker = Maker()
    async with listening(maker) as listener:
        assert maker.calls == 0
        url = f"http://{listener.address}/"
        assert await asyncio.gather(*(get(url) for _ in range(5))) == ["hello"] * 5
        assert await get(url) == "hello"
        assert maker.calls == 1
    with pytest.raises(aiohttp.ClientConnectionError):
        await get(url)


async def test_a_server_that_cannot_be_made_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_listener, "RETRY_S", 0.001)
    async with listening(Maker(failures=2)) as listener:
        assert await get(f"http://{listener.address}/") == "hello"
    assert caplog.text.count(f"no HTTP server for {listener.address} yet") == 2


async def test_a_server_that_cannot_take_its_socket_over_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_listener, "RETRY_S", 0.001)
    maker, start, failures = Maker(), web.SockSite.start, [OSError(errno.ENOMEM, "Cannot allocate memory")] * 2

    async def start_at_last(site: web.SockSite) -> None:
        await web.BaseSite.start(site)
        await web.BaseSite.stop(site)
        if failures:
            raise failures.pop()
        await start(site)

    monkeypatch.setattr(web.SockSite, "start", start_at_last)
    async with listening(maker) as listener:
        async with asyncio.timeout(WAIT_S):
            assert await get(f"http://{listener.address}/") == "hello"
        assert maker.calls == 1, "a server that was made is kept"
    assert caplog.text.count(f"no HTTP server for {listener.address} yet") == 2


async def test_stopping_before_or_while_the_server_is_made_leaves_nothing() -> None:
    async with listening(Maker()) as listener:
        host, port = listener.address.split(":")
        await listener.stop()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, int(port))

    begun, never = asyncio.Event(), asyncio.Event()

    async def make() -> web.AppRunner:
        begun.set()
        await never.wait()
        raise AssertionError

    slow = HttpListener("127.0.0.1:0", make)
    await slow.start()
    host, port = slow.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    await begun.wait()
    await slow.close()
    with pytest.raises(ConnectionError):
        assert await reader.read() == b""
        raise ConnectionResetError  # an orderly end does as well
    writer.close()


async def test_a_unix_socket_is_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    async with listening(Maker(), f"unix:{path}") as listener:
        assert listener.address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await get("http://here/", unix=path) == "hello"


async def test_a_taken_or_open_address_is_refused_at_once() -> None:
    async with listening(Maker()) as first:
        with pytest.raises(MeshError) as taken:
            await HttpListener(first.address, Maker().make).start()
        assert taken.value.code is Code.UNAVAILABLE
    with pytest.raises(MeshError, match="no certificates"):
        await HttpListener("0.0.0.0:0", Maker().make).start()
