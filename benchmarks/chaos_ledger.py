"""The ledger on every disk that a power cut may leave: recorded with `strace`, replayed without what was not synced.

The trace holds what the node read and said on its connection too, so at each system call it is known what it had
promised by then. The real ledger opens each image and is asked the same questions again.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import mqtt5

from benchmarks.chaos_history import digest_of
from benchmarks.chaos_proxy import take_frames
from benchmarks.chaos_wire import PUBACK, PUBLISH, read_puback, read_publish, request_of
from benchmarks.crash_disk import Disk, Image
from benchmarks.crash_disk import digest_of as image_digest
from benchmarks.crash_trace import Call
from edge_node.mqtt.admission import Request, admit
from edge_node.mqtt.ledger.ledger import Ledger
from edge_node.mqtt.limits import LedgerLimits, MessageLimits
from nearcast.errors import MeshError
from nearcast.transport.mqtt.message import Message
from nearcast.transport.mqtt.packets import decode

LEDGER = "node/inbox.sqlite"
WAL = f"{LEDGER}-wal"
BOOT = "the same boot"
OWED_MAX, OWED_BYTES_MAX = 100_000, 1 << 30
TRIES = 6
"""Images drawn for each one that is wanted; the others were seen before."""
WORTH_A_CUT = frozenset({"mkdir", "write", "truncate", "unlink", "sync", "send"})
NOTHING = Call(name="nothing", path="")
CONNECT = 1
Mutate: TypeAlias = Callable[[Sequence[Call]], list[Call]]


@dataclass(slots=True)
class Promise:
    """What a node has said on its connections, and so must keep, whatever happens to its power.

    Attributes:
        questions: by correlation, as the broker delivered them, and as the node admitted them.
        accepted: those that it has acknowledged. answers: what it has said to whom.
        confirmed: whose answers the broker has acknowledged.
        commits: times that the log was written and then synced. unsynced: PUBACKs that no such time preceded.
    """

    questions: dict[bytes, tuple[Message, Request]] = field(default_factory=dict)
    accepted: set[bytes] = field(default_factory=set)
    answers: dict[bytes, str] = field(default_factory=dict)
    confirmed: set[bytes] = field(default_factory=set)
    commits: int = 0
    unsynced: int = 0
    _is_dirty: bool = False
    _commits_before: dict[bytes, int] = field(default_factory=dict)
    _buffers: dict[tuple[str, str], bytearray] = field(default_factory=dict)
    _asked: dict[tuple[str, int], bytes] = field(default_factory=dict)
    _answered: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def store(self, call: Call) -> None:
        """Count commits: what was written to the log and is synced now."""
        if call.path == WAL and call.name in ("write", "sync"):
            self.commits += self._is_dirty and call.name == "sync"
            self._is_dirty = call.name == "write"

    def follow(self, call: Call) -> None:
        """Take in what went through a socket."""
        buffer = self._buffers.setdefault((call.path, call.name), bytearray())
        buffer += call.data
        for frame in take_frames(buffer):
            kind = frame[0] >> 4
            if kind == PUBLISH and call.name == "receive":
                self._receive(call.path, frame)
            elif kind == PUBLISH:
                self._answer(call.path, frame)
            elif kind == PUBACK and call.name == "send":
                self._accept(self._asked.get((call.path, read_puback(frame).packet_id)))
            elif kind == PUBACK:
                key = self._answered.get((call.path, read_puback(frame).packet_id))
                self.confirmed |= set() if key is None else {key}

    def _accept(self, key: bytes | None) -> None:
        if key is not None:
            self.unsynced += key not in self.accepted and self._commits_before[key] >= self.commits
            self.accepted.add(key)

    def _receive(self, path: str, frame: bytes) -> None:
        packet = read_publish(frame)
        key = packet.correlation_data
        if request_of(packet) is not None and key:
            self._asked[path, packet.packet_id or 0] = key
            if key not in self.questions:
                message = decode(packet)
                request = admit(message, 0.0, MessageLimits(), nonce=key)
                assert isinstance(request, Request)
                self.questions[key] = message, request
            # One that comes again may be in the ledger already: then there is nothing to sync.
            self._commits_before[key] = -1 if key in self._commits_before else self.commits

    def _answer(self, path: str, frame: bytes) -> None:
        packet = read_publish(frame)
        if packet.correlation_data:
            self._answered[path, packet.packet_id or 0] = packet.correlation_data
            self.confirmed.discard(packet.correlation_data)
            content = digest_of(packet.payload, packet.content_type or "", packet.user_properties)
            self.answers.setdefault(packet.correlation_data, content)

    @property
    def size(self) -> tuple[int, int, int]:
        """Changes whenever the promise does."""
        return len(self.accepted), len(self.answers), len(self.confirmed)


def broker_sockets(calls: Iterable[Call]) -> frozenset[str]:
    """Those sockets over which the node said CONNECT."""
    return frozenset(call.path for call in calls if call.name == "send" and call.data and call.data[0] >> 4 == CONNECT)


@dataclass(slots=True)
class Replayed:
    """What a replay found: images judged, faults and a few of them in words.

    Attributes:
        sends: times that something was promised. accepted: requests in the end.
        unsynced: PUBACKs that no write and sync of the log preceded.
    """

    images: int = 0
    violations: int = 0
    examples: list[str] = field(default_factory=list)
    sends: int = 0
    accepted: int = 0
    unsynced: int = 0


def replay(calls: Sequence[Call], folder: Path, *, per_position: int, near: Iterable[int] | None = None) -> Replayed:
    """Judge images at every position, and at those of `near` only if it is given. Stops a mutant at its first fault."""
    found, disk, promise = Replayed(), Disk(), Promise()
    sockets, wanted = broker_sockets(calls), None if near is None else frozenset(near)
    seen: set[object] = set()
    with asyncio.Runner() as runner:
        for index, call in enumerate(calls):
            before = promise.size
            if call.name in ("send", "receive"):
                if call.path in sockets:
                    promise.follow(call)
            else:
                disk.apply(call)
                promise.store(call)
            if call.name not in WORTH_A_CUT or (wanted is not None and index not in wanted):
                continue
            promised = promise.size != before and call.name == "send"
            count = 3 * per_position if promised else per_position
            for number, image in enumerate(_new_images(disk, index, promise.size, count, seen)):
                faults = runner.run(judge_image(image, promise, folder))
                found.images += 1
                found.violations += len(faults)
                found.sends += promised and number == 0
                found.examples += [f"call {index} {call.name} {call.path}: {fault}" for fault in faults[:3]]
                del found.examples[20:]
            if wanted is not None and found.violations:
                break
    found.accepted, found.unsynced = len(promise.accepted), promise.unsynced
    return found


def _new_images(disk: Disk, seed: int, promised: object, wanted: int, seen: set[object]) -> Iterator[Image]:
    taken = 0
    for tried, image in enumerate(disk.images(seed)):
        if taken >= wanted or tried >= TRIES * wanted:
            return
        key = image_digest(image), promised
        if key not in seen:
            seen.add(key)
            taken += 1
            yield image


async def judge_image(image: Image, promise: Promise, folder: Path) -> list[str]:
    """Open the ledger on an image and ask it everything again."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in image.items():
        if content is None:
            (folder / path).mkdir(parents=True, exist_ok=True)
        elif isinstance(content, bytes):
            (folder / path).write_bytes(content)
    ledger = Ledger(folder / LEDGER, boot=BOOT, limits=LedgerLimits())
    try:
        return await _question(ledger, promise)
    except MeshError as error:
        return [f"the ledger does not open: {error.message}"]
    finally:
        await ledger.close()


async def _question(ledger: Ledger, promise: Promise) -> list[str]:
    recovered = await ledger.open(0.0)
    pending = {one.request.correlation for one in recovered.requests}
    owed = {one.message.correlation for one in (await ledger.owed("device", 0, OWED_MAX, OWED_BYTES_MAX)).rows}
    keys = [key for key in promise.questions if key in promise.accepted or key in promise.answers]
    faults = []
    asked = [(message.payload, request) for message, request in map(promise.questions.__getitem__, keys)]
    answers = [ledger.accept(request, payload) for payload, request in asked]
    for key, admission in zip(keys, await asyncio.gather(*answers), strict=True):
        name = key.hex()
        if admission.verdict not in ("pending", "replay"):
            faults.append(f"{name} was accepted, and is {admission.verdict!r} now")
        elif key not in promise.confirmed and key not in pending and key not in owed:
            faults.append(f"{name} is neither to be run nor to be answered, and the broker has no answer")
        elif key in promise.answers:
            if admission.replay is None:
                faults.append(f"{name} was answered, and is {admission.verdict!r} now")
            elif _content(admission.replay.message) != promise.answers[key]:
                faults.append(f"{name} has another answer now")
    return faults


def _content(message: Message) -> str:
    return digest_of(message.payload, message.content_type, message.user.items())


# Mutants.


def _without_sync(concerns: Callable[[str], bool]) -> Mutate:
    return lambda calls: [NOTHING if call.name == "sync" and concerns(call.path) else call for call in calls]


def _acknowledge_early(calls: Sequence[Call]) -> list[Call]:
    """PUBACK at once."""
    made: list[Call] = []
    for call in calls:
        made.append(call)
        if call.name == "receive":
            frames = take_frames(bytearray(call.data))
            mids = [read_publish(frame).packet_id or 0 for frame in frames if frame[0] >> 4 == PUBLISH]
            made += [replace(call, name="send", data=mqtt5.PubAckPacket(mid).write()) for mid in mids if mid]
    return made


def _answer_early(calls: Sequence[Call]) -> list[Call]:
    """Answers before the last sync that they waited for."""
    made = list(calls)
    for at, call in enumerate(calls):
        if call.name == "send" and call.data and call.data[0] >> 4 == PUBLISH:
            synced = max((n for n in range(at) if calls[n].name == "sync" and calls[n].path == WAL), default=at)
            made[synced : at + 1] = [call, *made[synced:at]]
    return made


def _forget_early(calls: Sequence[Call]) -> list[Call]:
    """The broker's PUBACKs never come, and the answers are forgotten all the same."""
    made = []
    for call in calls:
        if call.name == "receive":
            frames = [frame for frame in take_frames(bytearray(call.data)) if frame[0] >> 4 != PUBACK]
            call = replace(call, data=b"".join(frames))  # noqa: PLW2901 (the same call without them)
        made.append(call)
    return made


MUTANTS: dict[str, Mutate] = {
    "the log is not synced": _without_sync(lambda path: path == WAL),
    "names are not synced": _without_sync(lambda path: "." not in path),
    "the database is not synced before the log begins anew": _without_sync(lambda path: path == LEDGER),
    "a PUBACK goes out before the commit": _acknowledge_early,
    "an answer goes out before the commit": _answer_early,
    "an answer is forgotten before the broker has it": _forget_early,
}


def moments(calls: Sequence[Call]) -> list[int]:
    """Where something is promised, or has become durable."""
    return [at for at, call in enumerate(calls) if call.name in ("send", "sync")]


def first_fault_of(name: str, calls: Sequence[Call], folder: Path) -> str:
    """The first fault by which a mutant is found out, "" if it goes unnoticed."""
    made = MUTANTS[name](calls)
    found = replay(made, folder, per_position=2, near=moments(made))
    return found.examples[0] if found.examples else ""
