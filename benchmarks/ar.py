"""Cameras at 30 frames a second, 15 ms for each answer, and twice as many frames as the node can look at.

Overload of 2 means: so many streams that their frames per second are twice the answers per second that the same server
gives to four clients without deadlines, measured just before. Every camera is a real gRPC stream of its own connection
with `nc-latest`, sends a 150 kB frame every 1/30 s whatever happened to the last one, and says as `timeout` what the
15 ms leave after the way to the server. An answer is on budget if it reaches the client within 15 ms of the frame's
sending; a frame is refused at once if that is known within 5 ms. Meanwhile `stalls` notes when the machine itself stood
still: a frame on its way then is late whatever the server does. Then the same without deadlines, where frames wait and
are superseded: each is to be answered once, and a superseded one within 5 ms of the frame that took its place.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import uvloop

from benchmarks.ar_schedule import BUSY, QUIET, Outcome, play
from benchmarks.paced import fill_store, make_request
from benchmarks.paced_load import channel_to, find_work, measure_capacity, on_load_cpu, quantile
from benchmarks.processes import serve
from benchmarks.rows import Row
from benchmarks.stalls import Span, Stalls, watch_stalls
from nearcast.errors import Code, MeshError
from nearcast.handler import Served
from nearcast.transport.oip import MODEL_STREAM_INFER
from nearcast.transport.seam import Channel
from nearcast.transport.stream_answers import decode_answer
from nearcast.wire.framing import encode_field
from nearcast.wire.status import LATEST
from nearcast.wire.v1 import oip_pb2 as pb

FPS = 30.0
BUDGET_MS = 15.0
AT_ONCE_MS = 5.0
MODEL_MS = 5.0
OVERLOAD = 2.0
WARM_S = 2.0
GRACE_S = 2.0


@dataclass(slots=True)
class Frame:
    """One frame: when it left, when its answer came, and which that was; `next_sent` is when the next frame left."""

    sent: float
    came: float = 0.0
    end: str = "unanswered"
    next_sent: float = 0.0


@dataclass(slots=True)
class Camera:
    """One stream and its frames by id. `timeout_s` None = no deadline."""

    channel: Channel
    work: int
    timeout_s: float | None
    phase_s: float
    seconds: float
    frames: dict[str, Frame] = field(default_factory=dict)
    twice: int = 0

    async def film(self) -> None:
        """Send, and read what comes back, until a while after the last frame."""
        replies = self.channel.stream(MODEL_STREAM_INFER, self._send(), metadata=((LATEST, "1"),))
        async for body in replies:
            frame_id, end = _read(body)
            frame = self.frames[frame_id]
            self.twice += frame.end != "unanswered"
            frame.came, frame.end = time.monotonic(), end

    async def _send(self) -> AsyncIterator[Sequence[bytes]]:
        # Encoded once: only the id differs, and in protobuf the last one counts.
        message = make_request(self.work, timeout_s=self.timeout_s)
        began = time.monotonic() + self.phase_s
        last: Frame | None = None
        for index in range(int(self.seconds * FPS)):
            await asyncio.sleep(max(0.0, began + index / FPS - time.monotonic()))
            frame = self.frames[str(index)] = Frame(time.monotonic())
            if last is not None:
                last.next_sent = frame.sent
            last = frame
            yield (message, encode_field(3, str(index).encode()))
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until and any(frame.end == "unanswered" for frame in self.frames.values()):
            await asyncio.sleep(0.02)


def run(*, quick: bool) -> list[Row]:
    """The judgement alone in virtual time; then a real server, with deadlines and without."""
    seconds = 10.0 if quick else 60.0
    rows = judge_played(schedules=2 if quick else 20)
    with tempfile.TemporaryDirectory() as folder, on_load_cpu():
        root = fill_store(Path(folder))
        with serve("benchmarks.paced", root, json.dumps({})) as ready:
            return rows + uvloop.run(measure(ready["address"], ready["pid"], seconds=seconds))


def judge_played(*, schedules: int) -> list[Row]:
    """Who is let in, in virtual time: on a quiet machine, and on one where run times stray far."""
    rows = []
    for name, machine in (("virtual", QUIET), ("virtual_busy", BUSY)):
        played = sum((play(seed, machine) for seed in range(schedules)), Outcome())
        rows += [
            Row(f"ar.{name}_answered_share", played.answered_share, "share"),
            Row(f"ar.{name}_others_at_once_share", played.at_once_share, "share", f"of {played.others}"),
        ]
    return rows


async def measure(address: str, pid: int, *, seconds: float) -> list[Row]:
    """Capacity, then both kinds of streams."""
    async with channel_to(address) as channel:
        work = await find_work(channel, MODEL_MS)
        capacity, ways_ms = await measure_capacity(channel, work, seconds=3.0)
        way_ms = min(BUDGET_MS / 3, quantile(ways_ms, 0.99))
    streams = ceil(OVERLOAD * capacity / FPS)
    rows = [
        Row("ar.capacity_fps", capacity, "1/s", f"{MODEL_MS:g} ms model, four clients"),
        Row("ar.streams", streams, "", f"{FPS:g} fps each: {streams * FPS / capacity:.2f}x capacity"),
        Row("ar.way_ms", way_ms, "ms", "there and back, p99 of the same; the server is told the rest of the budget"),
    ]
    timeout_s = (BUDGET_MS - way_ms) / 1e3
    with watch_stalls(pid) as stalls:
        cameras = await film(address, streams, work, timeout_s, seconds)
    rows += judge(cameras) + explain(cameras, stalls)
    return rows + judge_superseded(await film(address, streams, work, None, seconds / 3))


async def film(address: str, streams: int, work: int, timeout_s: float | None, seconds: float) -> list[Camera]:
    """So many cameras at once, each at a moment of its own."""
    chance = random.Random(2)
    async with AsyncExitStack() as stack:
        cameras = [
            Camera(
                await stack.enter_async_context(channel_to(address)),
                work,
                timeout_s,
                chance.random() / FPS,
                seconds + WARM_S,
            )
            for _ in range(streams)
        ]
        await asyncio.gather(*(camera.film() for camera in cameras))
    return cameras


def judge(cameras: Sequence[Camera]) -> list[Row]:
    """Answers on budget; what became of the others, and how soon."""
    frames = _counted(cameras)
    answers = [frame for frame in frames if frame.end == "answered"]
    others = [frame for frame in frames if frame.end != "answered"]
    took_ms = [(frame.came - frame.sent) * 1e3 for frame in answers] or [math.inf]
    at_once = [frame for frame in others if _is_at_once(frame)]
    return [
        Row("ar.frames", len(frames), "", f"{sum(camera.twice for camera in cameras)} answered twice"),
        Row("ar.answered_share", len(answers) / len(frames), "share", f"{1 / OVERLOAD:g} is all there is"),
        Row("ar.on_budget_share", sum(took <= BUDGET_MS for took in took_ms) / len(took_ms), "share", "of answers"),
        Row("ar.answer_p50_ms", quantile(took_ms, 0.5), "ms"),
        Row("ar.answer_p999_ms", quantile(took_ms, 0.999), "ms"),
        Row("ar.others_at_once_share", len(at_once) / max(1, len(others)), "share", f"within {AT_ONCE_MS:g} ms"),
        Row("ar.others_p50_ms", quantile([_lag_ms(frame) for frame in others if frame.came] or [0.0], 0.5), "ms"),
        Row("ar.expired", sum(frame.end == "expired" for frame in others), "", "ran or waited in vain"),
        Row("ar.unanswered", sum(frame.end == "unanswered" for frame in others), ""),
    ]


def explain(cameras: Sequence[Camera], stalls: Stalls) -> list[Row]:
    """How many of those that were told late were on their way while a core stood still."""
    frames = _counted(cameras)
    late = [_span(frame) for frame in frames if frame.end != "answered" and not _is_at_once(frame)]
    met = sum(stalls.met(*_span(frame)) for frame in frames) / len(frames)
    return [
        Row("ar.machine_stalls", len(stalls.spans), "", str(stalls)),
        Row("ar.others_late", len(late), "", f"a stall met {met:.4f} of all frames"),
        Row("ar.others_late_without_stall", stalls.beyond(late), "", "no core stood still from a run before on"),
    ]


def judge_superseded(cameras: Sequence[Camera]) -> list[Row]:
    """Without deadlines nothing is refused: a frame is answered by the model or gives way."""
    frames = _counted(cameras)
    given_way = [frame for frame in frames if frame.end == "superseded"]
    lags_ms = [_lag_ms(frame) for frame in given_way] or [0.0]
    lost = sum(frame.end not in ("answered", "superseded") for frame in frames)
    return [
        Row("ar.no_deadline_superseded_share", len(given_way) / len(frames), "share", f"of {len(frames)}"),
        Row("ar.no_deadline_superseded_p99_ms", quantile(lags_ms, 0.99), "ms", "after the next frame was sent"),
        Row("ar.no_deadline_lost", lost + sum(camera.twice for camera in cameras), "", "no answer, or two"),
    ]


def _counted(cameras: Sequence[Camera]) -> list[Frame]:
    """Frames after the warm-up."""
    first = int(WARM_S * FPS)
    return [frame for camera in cameras for index, frame in camera.frames.items() if int(index) >= first]


def _is_at_once(frame: Frame) -> bool:
    return frame.end in ("refused", "superseded") and _lag_ms(frame) <= AT_ONCE_MS


def _span(frame: Frame) -> Span:
    """When a stall may have delayed a frame: it may have waited for a run that began before it came."""
    return frame.sent - MODEL_MS / 1e3, frame.came or frame.sent + GRACE_S


def _lag_ms(frame: Frame) -> float:
    """From what decided a frame's end, its own sending or that of the next one, to the client's knowing."""
    return (frame.came - (frame.next_sent if frame.end == "superseded" else frame.sent)) * 1e3


def _read(body: bytes) -> tuple[str, str]:
    try:
        return decode_answer(body, Served()).id, "answered"
    except MeshError as error:
        frame_id = pb.ModelStreamInferResponse.FromString(body).infer_response.id
        if error.code is Code.SUPERSEDED:
            return frame_id, "superseded"
        if error.code is Code.OVERLOADED or (error.code is Code.DEADLINE and "lately needs" in error.message):
            return frame_id, "refused"
        if error.code is Code.DEADLINE:
            return frame_id, "expired"
        raise
