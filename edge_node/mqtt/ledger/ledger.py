"""The ledger: what was accepted, what was answered, what the brokers have not yet taken.

*Accepted* means that the row is committed. A result, its row's change to `done` (or a stream's new state) and the
outbox rows are one transaction; an outbox row goes only after the broker's PUBACK. So a crash at any point leaves
either work that is not done, which runs after the restart, or a message that is sent again: never nothing, and never
two different answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from edge_node.mqtt.admission import Request
from edge_node.mqtt.group_commit import GroupCommit, ignore_failure
from edge_node.mqtt.ledger.changes import Changes
from edge_node.mqtt.ledger.letters import Letters
from edge_node.mqtt.ledger.outbox import Outbox
from edge_node.mqtt.ledger.records import (
    LINK_BITS,
    Admission,
    Advance,
    Committed,
    Event,
    Input,
    Intake,
    Link,
    Outgoing,
    Page,
    Recovered,
    Reply,
    Revived,
    StoredInput,
    Unanswered,
)
from edge_node.mqtt.ledger.requests import Key, Requests
from edge_node.mqtt.ledger.schema import SCHEMA, UPGRADES, VERSION
from edge_node.mqtt.ledger.streams import Streams
from edge_node.mqtt.limits import LedgerLimits
from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import Code, MeshError
from nearcast.transport.mqtt import topics


class Ledger:
    """The worker's memory on disk. Every method but `open` and `close` returns a future, which resolves after the
    commit and in the order of the calls; it fails with UNAVAILABLE if nothing could be stored.

    Args:
        path: the SQLite file.
        node: this node's name, under which dead letters are announced.
        tenant: whose topic gets the announcements that belong to no single device.
        boot: identity of this boot of the machine; monotonic instants of another boot mean nothing here.
        limits: bounds of age, rows and bytes, and of a transaction.
        links: to whom events and dead letters are owed.
        clock: its wall time dates dead letters.
    """

    def __init__(
        self,
        path: Path,
        *,
        boot: str,
        limits: LedgerLimits,
        node: str = "edge",
        tenant: str = "local",
        links: Sequence[Link] = ("device",),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._node = node
        self._tenant = tenant
        self._boot = boot
        self._limits = limits
        self._links = links
        self._clock = clock
        self._changes = Changes()
        self._listeners: list[Callable[[Committed], None]] = []
        self._commits = GroupCommit(path, SCHEMA, batch_max=limits.commit_batch_max, watcher=self)
        self._is_open = False
        self._outbox: Outbox
        self._requests: Requests
        self._streams: Streams
        self._letters: Letters

    async def open(self, now: float) -> Recovered:
        """Open the file and read what is unfinished.

        Raises:
            MeshError: UNAVAILABLE if the file cannot be used.
        """
        await self._commits.open()
        return await self._commits.submit(lambda connection: self._recover(connection, now))

    def _recover(self, connection: sqlite3.Connection, now: float) -> Recovered:
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found > VERSION:
            raise MeshError(Code.UNAVAILABLE, f"The ledger has format {found}; this release reads {VERSION}.")
        if not connection.execute("SELECT 1 FROM pragma_table_info('inbox') WHERE name = 'begun'").fetchone():
            raise MeshError(Code.UNAVAILABLE, "The ledger has an earlier format; move its file away to begin anew.")
        for statement in UPGRADES.get(found, ()):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("INSERT OR IGNORE INTO boots (name) VALUES (?)", (self._boot,))
        (boot,) = connection.execute("SELECT number FROM boots WHERE name = ?", (self._boot,)).fetchone()
        connection.execute("DELETE FROM boots WHERE number < ?", (boot,))  # all that matters is whether it is this one
        crashed = not connection.execute("INSERT OR IGNORE INTO running VALUES (1)").rowcount
        self._outbox = Outbox(boot, self._links, now, self._limits, self._changes)
        self._letters = Letters(self._node, self._limits, self._outbox, self._clock)
        self._requests = Requests(boot, self._limits, self._outbox, self._letters)
        self._streams = Streams(boot, self._limits, self._outbox, self._letters, now, self._changes)
        self._is_open = True
        return Recovered(
            self._requests.recover(connection, now, crashed=crashed),
            self._streams.recover(connection, crashed=crashed),
            self._outbox.recover(connection),
            crashed=crashed,
        )

    # -- requests -----------------------------------------------------------------------------------------------------

    def knows(self, key: Key) -> bool:
        """Whether a request may have come before; only `accept` knows for sure. False is certain."""
        return self._requests.knows(key)

    def expect(self, key: Key) -> None:
        """From now on `knows` says yes: the request has begun and will be stored."""
        self._requests.expect(key)

    def forget(self, key: Key) -> None:
        """Take `expect` back: nothing of the request was or will be stored."""
        self._requests.forget(key)

    def doubt(self, key: Key) -> None:
        """The request could not be stored: take `expect` back, unless a copy of it was stored meanwhile."""
        self._commits.submit(lambda c: self._requests.doubt(c, key), urgent=False).add_done_callback(ignore_failure)

    def accept(
        self, request: Request, payload: bytes, *, has_room: bool = True, attempts: int = 0
    ) -> asyncio.Future[Admission]:
        """Commit a request, unless it is known already or there is no room for a new one.

        `attempts`: crashes that it may have caused before it came here.
        """
        return self._commits.submit(
            lambda c: self._requests.accept(c, request, payload, has_room=has_room, attempts=attempts)
        )

    def answer(
        self, request: Request, reply: Reply, now: float
    ) -> asyncio.Future[tuple[Admission, Sequence[Outgoing]]]:
        """Commit a request together with its answer and the order to send it, unless it is known already."""
        return self._commits.submit(lambda c: self._requests.answer(c, request, reply, now))

    def begin(self, row: int) -> asyncio.Future[None]:
        """Note that a request with `attempts` is tried now: if the node crashes, it is to blame.

        Try such requests one at a time, so that no innocent one is blamed.
        """
        return self._commits.submit(lambda c: self._requests.begin(c, row))

    def finish(self, row: int, reply: Reply, now: float, *, buried: str = "") -> asyncio.Future[Sequence[Outgoing]]:
        """Commit the answer of a request together with the order to send it; the first of what is returned is it.

        Args:
            row: of the request.
            reply: its answer.
            now: monotonic.
            buried: the reason why it becomes a dead letter too.
        """
        return self._commits.submit(lambda c: self._requests.finish(c, row, reply, now, buried=buried))

    # -- streams ------------------------------------------------------------------------------------------------------

    def take(self, item: Input, payload: bytes, *, again: bool = False) -> asyncio.Future[Intake]:
        """Commit a stream's message, unless it came before or there is no room.

        After a failure all fail until one comes `again`, which is to be the oldest: else a younger one that could be
        stored would make those before it duplicates.
        """
        return self._commits.submit(lambda c: self._streams.take(c, item, payload, again=again))

    def inputs(self, after: int, limit: int, *, key: str = "") -> asyncio.Future[Page[StoredInput]]:
        """Waiting messages behind the row `after`, in the order in which they were taken: of all streams, or of the one
        with the `Input.key`.
        """
        return self._commits.submit(lambda c: self._streams.page(c, after, limit, key))

    def begin_input(self, row: int) -> asyncio.Future[None]:
        """Note that a stream's message is tried now, as `begin` does for a request."""
        return self._commits.submit(lambda c: self._streams.begin(c, row))

    def advance(
        self, row: int, now: float, *, state: bytes | None = None, events: Sequence[Event] = (), buried: str = ""
    ) -> asyncio.Future[Sequence[Outgoing]]:
        """Commit what a stream's message has brought about, in one transaction: the message goes, the stream has its
        new state (None: the old one), every event is owed to every link.

        Args:
            row: of the message.
            now: monotonic.
            state: the stream's explicit state behind it.
            events: what is sent, in this order.
            buried: the reason why the message becomes a dead letter.

        Returns:
            The outbox rows; empty if the message was dropped meanwhile.
        """
        return self._commits.submit(
            lambda c: self._streams.advance(c, row, now, state=state, events=events, buried=buried)
        )

    def advance_all(
        self, steps: Sequence[Advance], now: float, *, state: bytes | None = None
    ) -> asyncio.Future[Sequence[Outgoing]]:
        """The same for messages of one stream that follow each other, in one transaction: all of it or nothing.

        Args:
            steps: what each has brought about, in order.
            now: monotonic.
            state: the stream's explicit state behind the last of them.
        """
        return self._commits.submit(lambda c: self._streams.advance_all(c, steps, now, state=state))

    def stream_state(self, tenant: str, device: str, stream: str) -> asyncio.Future[bytes | None]:
        """The explicit state that the last `advance` of this stream wrote; None if there is none."""
        return self._commits.submit(lambda c: self._streams.state(c, tenant, device, stream))

    # -- what is owed -------------------------------------------------------------------------------------------------

    def owed(self, link: Link, after: int, rows_max: int, bytes_max: int) -> asyncio.Future[Page[Outgoing]]:
        """Messages for `link` behind the outbox row `after`, within the bounds, at least one if there is one."""
        return self._commits.submit(lambda c: self._outbox.page(c, link, after, rows_max, bytes_max))

    def delivered(self, rows: Iterable[int], link: Link = "device") -> asyncio.Future[None]:
        """Forget outbox rows that `link` has taken, or that have expired."""
        ids = list(rows)
        return self._commits.submit(lambda c: self._outbox.delivered(c, link, ids), urgent=False)

    @property
    def event_bytes(self) -> int:
        """What the waiting events take on disk."""
        return self._outbox.event_bytes

    def on_commit(self, listener: Callable[[Committed], None]) -> None:
        """`listener` is told on the loop what each transaction did, in their order, before its futures resolve."""
        self._listeners.append(listener)

    def committed(self) -> Callable[[], None] | None:
        """For the commits: what to tell on the loop."""
        committed = self._changes.committed()
        return None if committed is None else lambda: self._tell(committed)

    def rolled_back(self) -> None:
        """For the commits: nothing of what was counted may have happened."""
        self._changes.rolled_back()
        if self._is_open:
            self._outbox.forget_size()
            self._streams.rolled_back()

    def _tell(self, committed: Committed) -> None:
        for listener in self._listeners:
            listener(committed)

    # -- dead letters -------------------------------------------------------------------------------------------------

    def refuse(self, row: int, link: Link, reason: str, now: float) -> asyncio.Future[Sequence[Outgoing]]:
        """Bury an event that a link does not take, and announce it; what is itself such an announcement just goes."""
        return self._commits.submit(lambda c: self._refuse(c, row, link, reason, now))

    def _refuse(
        self, connection: sqlite3.Connection, row: int, link: Link, reason: str, now: float
    ) -> Sequence[Outgoing]:
        taken = self._outbox.take_out(connection, link, row)
        if taken is None:
            return ()
        event, payload = taken
        _nc, _v1, tenant, device, *_rest = event.topic.split("/")
        if event.topic == topics.dead_letter_topic(tenant, self._node):
            return ()
        letter = self._letters.letter("outgoing", tenant, device, link, reason, 0)
        return self._letters.bury(connection, letter, now, head=msgspec.msgpack.encode(event), payload=payload)

    def revive(self, now: float, ttl_s: float) -> asyncio.Future[Revived]:
        """Take the dead letters that are marked for another try back as new rows, to be executed or sent.

        One for a link that this node does not have, or for which there is no room, stays what it is, and marked.

        Args:
            now: monotonic; the requests arrive now.
            ttl_s: and have this long.
        """
        return self._commits.submit(lambda c: self._revive(c, now, ttl_s))

    def _revive(self, connection: sqlite3.Connection, now: float, ttl_s: float) -> Revived:
        requests, inputs, outgoing, revived = [], [], [], []
        for letter, head in self._letters.marked(connection, self._links):
            if letter.kind == "request":
                payload = self._letters.payload(connection, letter.id)
                request = msgspec.msgpack.decode(head, type=Request)
                request = msgspec.structs.replace(request, arrived=now, deadline=now + ttl_s)
                # The first request keeps its answer; this is another one, which says so, with the same correlation.
                key = request.correlation + b"/replay/%d" % letter.id
                row = self._requests.insert(connection, request, payload, key)
                if row is not None:
                    requests.append(Unanswered(row, request, payload, 0, same_boot=True))
            elif letter.kind == "input":
                payload = self._letters.payload(connection, letter.id)
                item = msgspec.structs.replace(msgspec.msgpack.decode(head, type=Input), boot="", seq=None, arrived=now)
                inputs.append(StoredInput(self._streams.put_back(connection, item, payload), item, payload))
            elif head:
                event = msgspec.msgpack.decode(head, type=Event)
                if not self._outbox.has_room(connection, event, letter.size_bytes - len(head)):
                    continue  # it waits for room, as a letter, and its payload stays on disk
                event = msgspec.structs.replace(event, payload=self._letters.payload(connection, letter.id))
                link: Link = "upstream" if letter.name == "upstream" else "device"
                sent = self._outbox.offer(connection, event, now, links=LINK_BITS[link])
                assert sent is not None
                outgoing.append(sent)
            revived.append(letter.id)
        self._letters.remove(connection, revived)
        return Revived(requests, inputs, outgoing)

    # -- upkeep -------------------------------------------------------------------------------------------------------

    def prune(self, now: float) -> asyncio.Future[int]:
        """Forget answers that are too old or too many, and what waited too long; returns how many went, a bounded
        number at a time.
        """
        return self._commits.submit(
            lambda c: self._requests.prune(c, now) + self._outbox.prune(c, now) + self._streams.prune(c, now)
        )

    def tell_drops(self, now: float) -> asyncio.Future[Sequence[Outgoing]]:
        """A dead letter, without payloads, for everything that was dropped since the last one; none if nothing was."""
        return self._commits.submit(lambda c: self._bury_drops(c, now))

    def _bury_drops(self, connection: sqlite3.Connection, now: float) -> Sequence[Outgoing]:
        untold = self._changes.untold
        if not untold:
            return ()
        what = ", ".join(f"{count} {reason}" for reason, count in sorted(untold.items()))
        letter = self._letters.letter("dropped", self._tenant, "", self._node, f"Messages were dropped: {what}.", 0)
        announced = self._letters.bury(connection, letter, now, head=b"", payload=b"")
        untold.clear()
        return announced

    async def close(self) -> None:
        """Commit what waits, note that this was no crash, and close the file."""
        with contextlib.suppress(MeshError):  # the next start takes it for a crash
            await self._commits.submit(lambda c: c.execute("DELETE FROM running"))
        await self._commits.close()


def boot_identity() -> str:
    """The kernel's name for this boot; monotonic time is one clock for all processes of a boot, and for no other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"process-{uuid.uuid4()}"
