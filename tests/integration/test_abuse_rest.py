"""Clients that misbehave in HTTP/1.1 and JSON: bounded time and memory, and others are served as before."""

from __future__ import annotations

import asyncio
import gzip
import re
from collections.abc import Awaitable, Callable

import pytest

from tests.integration.abuse_parts import MEBIBYTE, Bench, Raw, raw
from tests.patience import until

INFER = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def post(body: bytes, *headers: bytes) -> bytes:
    return INFER + b"".join(header + b"\r\n" for header in headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(*chunks: bytes, end: bool = True) -> bytes:
    pieces = b"".join(b"%x\r\n" % len(chunk) + chunk + b"\r\n" for chunk in chunks)
    return INFER + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + (b"0\r\n\r\n" if end else b"")


BOMB = post(gzip.compress(bytes(100 * MEBIBYTE), 9) * 4, b"Content-Encoding: gzip")
NUMBERS = post(
    b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1500000,2],"data":[' + b",".join([b"1"] * 3_000_000) + b"]}]}"
)
"""Six megabytes of JSON: three million elements."""


async def answered(one: Raw, status: bytes, times: int = 1) -> None:
    """Wait for an answer of that status."""
    line = re.compile(rb"HTTP/1\.[01] " + status)
    await until(lambda: len(line.findall(one.received)) >= times, f"a status {status!r}")


async def header_without_end(one: Raw) -> None:
    await one.send(b"GET / HTTP/1.1\r\nx: ")
    for _ in range(100):
        if not await one.send(b"y" * 65536):
            break
    assert await one.is_closed()


async def headers_without_end(one: Raw) -> None:
    await one.send(b"GET / HTTP/1.1\r\n")
    for _ in range(100):
        if not await one.send(b"x: y\r\n" * 5000):
            break
    assert await one.is_closed()


async def path_without_end(one: Raw) -> None:
    await one.send(b"GET /" + b"a" * MEBIBYTE)
    await answered(one, b"400")


async def chunk_of_too_much(one: Raw) -> None:
    await one.send(INFER + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 15 + b"\r\n" + b"x" * 1000)
    await one.is_closed(0.2)


async def chunk_sizes_without_end(one: Raw) -> None:
    await one.send(INFER + b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * MEBIBYTE)
    await one.is_closed(0.2)


async def chunk_extensions(one: Raw) -> None:
    """Kilobytes of extension for each byte of body."""
    await one.send(INFER + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"x" * 2000 + b"\r\nz\r\n") * 1000)
    await one.is_closed(0.2)


async def many_small_chunks(one: Raw) -> None:
    await one.send(chunked(*[b"x"] * 100_000))
    await answered(one, b"400")


async def body_too_large(one: Raw) -> None:
    await one.send(INFER + b"Content-Length: 99999999999\r\n\r\n")
    await answered(one, b"413")


async def chunked_body_too_large(one: Raw) -> None:
    for _ in range(16):
        if not await one.send(
            chunked(bytes(MEBIBYTE), end=False) if _ == 0 else b"100000\r\n" + bytes(MEBIBYTE) + b"\r\n"
        ):
            break
    await answered(one, b"413")


async def bomb(one: Raw) -> None:
    await one.send(BOMB)
    await answered(one, b"413")


async def deep_json(one: Raw) -> None:
    for body in (b"[" * 4 * MEBIBYTE, b'{"inputs":' * 400_000, b'{"inputs": [], "x": ' + b"[" * 100_000):
        one.received = b""
        await one.send(post(body))
        await answered(one, b"400")


async def numbers(one: Raw) -> None:
    await one.send(NUMBERS)
    await until(lambda: one.received, "an answer to the numbers")


async def huge_numbers(one: Raw) -> None:
    """Integers of a million digits, and exponents beyond any float."""
    for number in (b"9" * MEBIBYTE, b"1e999999999", b"-" + b"9" * 400):
        one.received = b""
        await one.send(post(b'{"inputs":[{"name":"x","datatype":"INT64","shape":[1],"data":[' + number + b"]}]}"))
        await answered(one, b"400")


async def smuggling(one: Raw) -> None:
    await one.send(INFER + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + GET)
    await answered(one, b"400")


async def pipelining(one: Raw) -> None:
    """Ten thousand requests, and none of the answers is read for a while."""
    for _ in range(100):
        await one.send(GET * 100)
    await answered(one, b"200", 1)


async def garbage(one: Raw) -> None:
    await one.send(bytes(range(256)) * 256)
    assert await one.is_closed()


async def http2(one: Raw) -> None:
    await one.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100))
    assert await one.is_closed()


@pytest.mark.parametrize(
    "attack",
    [
        header_without_end,
        headers_without_end,
        path_without_end,
        chunk_of_too_much,
        chunk_sizes_without_end,
        chunk_extensions,
        many_small_chunks,
        body_too_large,
        chunked_body_too_large,
        bomb,
        deep_json,
        numbers,
        huge_numbers,
        smuggling,
        pipelining,
        garbage,
        http2,
    ],
    ids=lambda attack: attack.__name__,
)
async def test_one_connection(abused: Bench, attack: Callable[[Raw], Awaitable[None]]) -> None:
    most = 400 if attack is numbers else 40
    slowest_s = 2.0 if attack is numbers else 1.0
    async with (
        abused.attack("rest", grown_mib=most, slowest_s=slowest_s),
        raw(abused.address("rest"), greets=False) as (one,),
    ):
        await attack(one)


async def test_slow_loris(abused: Bench) -> None:
    """Byte by byte: headers, and three hundred bodies, more than there are places."""
    async with abused.attack("rest"), raw(abused.address("rest"), 290, greets=False) as many:
        for one in many[40:]:
            await one.send(INFER + b"Content-Length: 1000\r\n\r\n")
        for i in range(10):
            for one in many[:40]:
                await one.send(GET[i : i + 1])
            await asyncio.sleep(0.04)
        assert all(await asyncio.gather(*(one.is_closed() for one in many[:40])))


async def test_answers_that_are_not_read(abused: Bench) -> None:
    body = (
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[750000,2],"parameters":{"binary_data_size":6000000}}],'
        b'"outputs":[{"name":"x","parameters":{"binary_data":true}}]}'
    )
    request = post(body + bytes(6_000_000), b"Inference-Header-Content-Length: %d" % len(body))
    async with (
        abused.attack("rest", grown_mib=250),
        raw(abused.address("rest"), 25, greets=False, reads=False) as many,
    ):
        for one in many:
            await one.send(request)
            await asyncio.sleep(0.03)
        assert await until(lambda: abused.server.descriptors < 30, "who reads nothing is dropped") < 3.0


async def test_hoarded_bodies_leave_room_for_others(patient: Bench) -> None:
    async with patient.attack("rest", grown_mib=100), raw(patient.address("rest"), 20, greets=False) as many:
        for one in many:
            await one.send(INFER + b"Content-Length: %d\r\n\r\n" % (7 * MEBIBYTE) + bytes(6 * MEBIBYTE))
        await until(lambda: sum(b"429" in one.received for one in many) > 5, "six hoards are refused")


async def test_connections_beyond_the_bound(abused: Bench) -> None:
    async with abused.attack("rest"), raw(abused.address("rest"), 320, greets=False) as many:
        await asyncio.sleep(0.1)
        assert abused.server.descriptors < 330
        assert await many[-1].is_closed()
        assert all(await asyncio.gather(*(one.is_closed() for one in many)))
