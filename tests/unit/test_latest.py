"""The mailbox of a stream of which only the newest frame counts, and its shell on a loop without sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearcast.errors import MeshError
from nearcast.transport.latest import REPLIES_MAX, Frame, LatestStream, Mailbox
from nearcast.transport.seam import Reply


@given(st.lists(st.sampled_from(["put", "finish", "drop"]), max_size=40))
def test_every_frame_ends_once_and_only_newer_ones_pass_it(events: list[str]) -> None:
    mailbox: Mailbox[int] = Mailbox()
    count, running, waiting, ended = 0, None, None, []
    for event in events:
        if event == "put":
            start, superseded = mailbox.put(count)
            assert start == (count if running is None else None)
            assert superseded == (waiting if running is not None else None)
            if superseded is not None:
                ended.append(superseded)
            running, waiting = (count, None) if running is None else (running, count)
            count += 1
        elif event == "finish" and running is not None:
            ended.append(running)
            running, waiting = waiting, None
            assert mailbox.finish() == running
        elif event == "drop" and waiting is not None:
            assert not mailbox.drop(-1)
            assert mailbox.drop(waiting)
            ended.append(waiting)
            waiting = None
        assert mailbox.is_idle == (running is None)
        assert mailbox.waiting == waiting
    assert sorted(ended + [each for each in (running, waiting) if each is not None]) == list(range(count))


class Camera:
    """Frames of one byte each; the answer to frame n is released by hand."""

    def __init__(self, deadline_s: float | None = None) -> None:
        self.bodies: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.release = asyncio.Semaphore(0)
        self.deadline_s = deadline_s
        self.began: list[bytes] = []
        self.stream = LatestStream(self.read).run(self.messages())

    def read(self, body: bytes) -> Frame | Reply:
        if body == b"?":
            return Reply((b"malformed",))
        deadline = None if self.deadline_s is None else time.monotonic() + self.deadline_s
        return Frame(deadline, partial(self.answer, body), lambda error: Reply((body, str(error.code).encode())))

    async def answer(self, body: bytes) -> Reply:
        self.began.append(body)
        await self.release.acquire()
        if body == b"!":
            raise ZeroDivisionError
        return Reply((body, b"OK"))

    async def messages(self) -> AsyncIterator[bytes]:
        while (body := await self.bodies.get()) is not None:
            yield body

    def send(self, *bodies: bytes | None) -> None:
        for body in bodies:
            self.bodies.put_nowait(body)

    async def replies(self, count: int) -> list[bytes]:
        async with asyncio.timeout(5):
            return [b" ".join((await anext(self.stream)).body) for _ in range(count)]


async def test_a_waiting_frame_gives_way_and_is_told_at_once() -> None:
    camera = Camera()
    camera.send(b"1", b"2", b"?", b"3", b"4")
    assert await camera.replies(3) == [b"malformed", b"2 SUPERSEDED", b"3 SUPERSEDED"]
    assert camera.began == [b"1"]
    camera.send(None)
    camera.release.release()
    camera.release.release()
    assert await camera.replies(2) == [b"1 OK", b"4 OK"]
    with pytest.raises(StopAsyncIteration):
        await anext(camera.stream)


async def test_a_waiting_frame_is_told_when_its_deadline_passes_though_another_is_stuck() -> None:
    camera = Camera(deadline_s=0.02)
    camera.send(b"1", b"2")
    assert await camera.replies(1) == [b"2 DEADLINE"]
    camera.send(b"3", b"4")
    assert await camera.replies(2) == [b"3 SUPERSEDED", b"4 DEADLINE"]
    await camera.stream.aclose()
    assert camera.began == [b"1"]


async def test_a_client_that_does_not_read_stops_the_reading() -> None:
    camera = Camera()
    await asyncio.wait([asyncio.ensure_future(anext(camera.stream))], timeout=0)
    camera.send(*[b"x"] * (REPLIES_MAX * 3))
    for _ in range(REPLIES_MAX * 10):
        await asyncio.sleep(0)
    assert camera.bodies.qsize() >= REPLIES_MAX
    assert await camera.replies(REPLIES_MAX * 2) == [b"x SUPERSEDED"] * REPLIES_MAX * 2


async def test_what_breaks_ends_the_stream_and_leaves_no_task() -> None:
    camera = Camera()
    camera.send(b"!", b"2")
    camera.release.release()
    with pytest.raises(ZeroDivisionError):
        await camera.replies(1)
    broken = Camera()

    async def refuse() -> AsyncIterator[bytes]:
        raise MeshError("INVALID_REQUEST", "bad")  # type: ignore[arg-type]
        yield b""

    with pytest.raises(MeshError, match="bad"):
        await anext(LatestStream(broken.read).run(refuse()))
    assert len(asyncio.all_tasks()) == 1
