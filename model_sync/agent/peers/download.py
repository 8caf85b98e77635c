"""A download from many nodes at once: the threads and connections around `replica.swarm`.

It fills the same file that `fetch.Download` completes afterwards, so whatever goes wrong here costs time only.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import msgspec

from model_sync.agent.install.fetch import AllowanceError, Pace, Remote, missing_chunks
from model_sync.agent.peers.holdings import KEPT_BYTES_MAX, Holdings
from model_sync.agent.peers.neighbours import Neighbours
from model_sync.agent.sources.mirrors import Mirrors
from model_sync.agent.sources.source import Source, StatusError
from model_sync.replica.swarm import PEERS_MAX, TICK_S, Ask, Drop, Kind, Look, Swarm, SwarmLimits
from model_sync.replica.turns import neighbourhood, turns_of
from nearcast.durable import sync_folder
from nearcast.errors import Code, MeshError
from nearcast.store.manifest import CHUNK_SIZE_BYTES

ORIGIN = ""
"""The name of the repository among the sources; no node can have it."""
MEMBERS_MAX = 256
"""Nodes that share first copies; a larger mesh falls into parts of about this size."""
SMALL_BYTES = 64 * 1024
"""Not worth asking around for."""
GIVE_UP_S = 20.0
"""Without a chunk for this long the download goes on from the repository alone."""
SYNC_CHUNKS = 4
"""Chunks that a power cut may cost: fewer than are under way at a time."""


class _Outcome(Enum):
    ARRIVED = auto()
    CORRUPT = auto()
    LOST = auto()
    BUSY = auto()
    ABSENT = auto()
    HOLDS = auto()


@dataclass(frozen=True, slots=True)
class _Answer:
    source: str
    chunk: int | None
    outcome: _Outcome
    data: bytes = b""
    held: int = 0


class _Holding(msgspec.Struct, frozen=True):
    held: str


class Peers:
    """What all downloads of one agent share: who is there, how they are reached, and what is here for them.

    Args:
        make_peer: a connection to a node's listener at `host:port`.
        make_origin: a connection to the repository and its mirrors.
        draw: uniform numbers in [0, 1).
    """

    def __init__(
        self,
        node: str,
        neighbours: Neighbours,
        holdings: Holdings,
        *,
        make_peer: Callable[[str], Source],
        make_origin: Callable[[], Mirrors],
        draw: Callable[[], float],
        limits: SwarmLimits | None = None,
    ) -> None:
        self.node = node
        self.holdings = holdings
        self.make_peer = make_peer
        self.make_origin = make_origin
        self.draw = draw
        self.limits = limits or SwarmLimits()
        self._neighbours = neighbours

    def fetch(self, remote: Remote, path: Path, *, pace: Pace, stop: threading.Event) -> int:
        """Bring as many chunks of `remote` into `path` as the nodes and the repository give together.

        Returns the bytes that came over the network. It ends early where others are of no use; the caller completes.

        Raises:
            MeshError: CANCELLED once `stop` is set; AllowanceError as `Pace.take`.
            OSError: if the disk is full.
        """
        if remote.size_bytes <= SMALL_BYTES:
            return 0
        found = self._neighbours.addresses()
        members = neighbourhood(self.node, found, MEMBERS_MAX)
        download = _SwarmDownload(self, remote, {name: found[name] for name in members}, pace, stop)
        return download.run(path) if members else 0

    def keep(self, remote: Remote, path: Path) -> None:
        """Hold a payload that will not stay on the disk, such as a delta, for others."""
        if remote.size_bytes <= KEPT_BYTES_MAX:
            self.holdings.keep(remote, path.read_bytes())


class _SwarmDownload:
    """One file. The worker thread that calls `run` alone touches swarm and file; the others do one request each."""

    def __init__(
        self, peers: Peers, remote: Remote, addresses: dict[str, str], pace: Pace, stop: threading.Event
    ) -> None:
        self._peers = peers
        self._remote = remote
        self._addresses = addresses
        self._pace = pace
        self._stop = stop
        self._answers: queue.SimpleQueue[_Answer | BaseException] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle: defaultdict[str, list[Source]] = defaultdict(list)
        self._busy: dict[tuple[str, int | None], Source] = {}
        self._ended = False
        self._received_bytes = 0
        self._unsynced = 0

    def run(self, path: Path) -> int:
        limits = self._peers.limits
        new = not path.exists()
        pool = ThreadPoolExecutor(limits.requests_max + limits.looks_max, "swarm")
        with path.open("w+b" if new else "r+b") as file:
            if new:
                sync_folder(path.parent)
            swarm = self._make_swarm(path, file.fileno())
            try:
                self._drive(swarm, pool, file.fileno())
            finally:
                self._end(pool)
                self._sync(file.fileno())
        return self._received_bytes

    def _make_swarm(self, path: Path, handle: int) -> Swarm:
        peers, remote = self._peers, self._remote
        count = len(remote.chunks)
        held = (1 << count) - 1
        for chunk in missing_chunks(remote.chunks, remote.size_bytes, handle):
            held &= ~(1 << chunk)
        peers.holdings.begin(remote, path, held)
        turns = turns_of(peers.node, self._addresses, remote.sha256, count)
        swarm = Swarm(
            time.monotonic(), count, remote.size_bytes, held=held, turns=turns, limits=peers.limits, draw=peers.draw
        )
        swarm.join(ORIGIN, Kind.ORIGIN)
        for name in sorted(self._addresses, key=lambda _: peers.draw())[:PEERS_MAX]:
            swarm.join(name, Kind.PEER)
        return swarm

    def _drive(self, swarm: Swarm, pool: ThreadPoolExecutor, handle: int) -> None:
        progress_at = time.monotonic()
        while not swarm.is_complete and time.monotonic() - progress_at < GIVE_UP_S:
            if self._stop.is_set():
                raise MeshError(Code.CANCELLED, "The download was stopped.")
            for request in swarm.next_requests(time.monotonic()):
                match request:
                    case Ask(source, chunk):
                        pool.submit(self._answer, source, chunk)
                    case Look(source):
                        pool.submit(self._answer, source, None)
                    case Drop(source, chunk):
                        self._abort(source, chunk)
            try:
                answer = self._answers.get(timeout=TICK_S)
            except queue.Empty:
                continue
            if isinstance(answer, BaseException):
                raise answer
            if answer.outcome is _Outcome.ARRIVED:
                progress_at = time.monotonic()
            self._take(swarm, answer, handle)

    def _sync(self, handle: int) -> None:
        self._unsynced = 0
        os.fdatasync(handle)

    def _take(self, swarm: Swarm, answer: _Answer, handle: int) -> None:
        now, source, chunk = time.monotonic(), answer.source, answer.chunk
        match answer.outcome:
            case _Outcome.ARRIVED if chunk is not None:
                if not swarm.held >> chunk & 1:
                    os.pwrite(handle, answer.data, chunk * CHUNK_SIZE_BYTES)
                    self._unsynced += 1
                    if self._unsynced >= SYNC_CHUNKS:
                        self._sync(handle)
                    self._peers.holdings.add(self._remote, chunk)
                swarm.arrived(now, source, chunk)
                swarm.holds(now, source, answer.held)
            case _Outcome.CORRUPT if chunk is not None:
                swarm.corrupt(now, source, chunk)
            case _Outcome.BUSY if chunk is not None:
                swarm.busy(now, source, chunk)
            case _Outcome.ABSENT:
                swarm.absent(now, source)
            case _Outcome.HOLDS:
                swarm.holds(now, source, answer.held)
            case _:
                swarm.lost(now, source, chunk)

    # In the threads of the pool.

    def _answer(self, name: str, chunk: int | None) -> None:
        """Carry out one request and say how it went; never raises."""
        try:
            source = self._open(name, chunk)
            if source is None:
                return
            try:
                answer = self._request(source, name, chunk)
            except StatusError:
                raise  # a refusal leaves the connection as it is
            except MeshError:
                source.close()
                raise
            finally:
                self._give_back(name, chunk, source)
            self._answers.put(answer)
        except StatusError as error:
            outcome = {503: _Outcome.BUSY, 404: _Outcome.ABSENT}.get(error.status, _Outcome.LOST)
            if name == ORIGIN or (outcome is _Outcome.BUSY and chunk is None):
                outcome = _Outcome.LOST
            self._answers.put(_Answer(name, chunk, outcome))
        except AllowanceError as error:
            self._answers.put(error)
        except (MeshError, OSError, msgspec.DecodeError, ValueError):
            self._answers.put(_Answer(name, chunk, _Outcome.LOST))
        except BaseException as error:  # noqa: BLE001 (told to the thread that drives)
            self._answers.put(error)

    def _request(self, source: Source, name: str, chunk: int | None) -> _Answer:
        remote, timeout_s = self._remote, self._peers.limits.request_timeout_s
        width = -(-len(remote.chunks) // 8)
        path = f"v1/payloads/{remote.sha256}"
        if chunk is None:
            data = source.read(path, size_bytes_max=64 + 2 * width, timeout_s=timeout_s)
            return _Answer(name, None, _Outcome.HOLDS, held=int(msgspec.json.decode(data, type=_Holding).held, 16))
        start, end = remote.span(range(chunk, chunk + 1))
        if name == ORIGIN:
            data, held = self._read_range(source, start, end), b""
        else:
            body = source.read(f"{path}/{chunk}", size_bytes_max=end - start + width, timeout_s=timeout_s)
            data, held = body[: end - start], body[end - start :]
        self._received_bytes += len(data)
        self._pace.take(len(data), self._stop)
        if hashlib.sha256(data).hexdigest() != remote.chunks[chunk]:
            return _Answer(name, chunk, _Outcome.CORRUPT)
        return _Answer(name, chunk, _Outcome.ARRIVED, data, int.from_bytes(held, "little"))

    def _read_range(self, source: Source, start: int, end: int) -> bytes:
        deadline = time.monotonic() + self._peers.limits.request_timeout_s
        at, pieces = source.get(self._remote.path, start=start, end=end, timeout_s=self._peers.limits.request_timeout_s)
        data = bytearray()
        for piece in pieces:
            data += piece
            if at + len(data) > end or time.monotonic() > deadline:
                source.close()
                break
        return bytes(data[start - at : end - at])

    # Connections.

    def _open(self, name: str, chunk: int | None) -> Source | None:
        with self._lock:
            if self._ended:
                return None
            idle = self._idle[name]
            source = idle.pop() if idle else self._make(name)
            self._busy[name, chunk] = source
            return source

    def _make(self, name: str) -> Source:
        if name != ORIGIN:
            return self._peers.make_peer(self._addresses[name])
        origin = self._peers.make_origin()
        next(origin.attempts())
        return origin

    def _give_back(self, name: str, chunk: int | None, source: Source) -> None:
        with self._lock:
            if self._busy.get((name, chunk)) is source:
                del self._busy[name, chunk]
            if not self._ended:
                self._idle[name].append(source)
                return
        source.close()

    def _abort(self, name: str, chunk: int) -> None:
        with self._lock:
            source = self._busy.get((name, chunk))
        if source is not None:
            source.abort()

    def _end(self, pool: ThreadPoolExecutor) -> None:
        """Threads that still connect end by themselves within their timeout; nobody waits for them."""
        pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._ended = True
            idle = [source for sources in self._idle.values() for source in sources]
            busy = list(self._busy.values())
        for source in busy:
            source.abort()
        for source in idle:
            source.close()
