"""One thread that owns one SQLite file; what waits is committed together.

A commit with `synchronous=FULL` costs an fsync. While one runs the next operations gather, and go into one transaction:
no timer, no added latency when idle, and under load the cost of the fsync is shared.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from nearcast.durable import make_folder
from nearcast.errors import Code, MeshError

R = TypeVar("R")
Operation: TypeAlias = Callable[[sqlite3.Connection], Any]
_Waiting: TypeAlias = "tuple[Operation, asyncio.Future[Any]]"
Outcome: TypeAlias = Callable[[], None]
"""What to do on the loop: tell of a transaction, or resolve one future."""
_log = logging.getLogger("nearcast.mqtt")

PATIENCE_S = 0.02
"""A commit that nobody waits for would only delay the next one that somebody does wait for."""
PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",
    "PRAGMA busy_timeout=2000",
    "PRAGMA foreign_keys=ON",
    "PRAGMA secure_delete=FAST",  # Debian's default overwrites what is deleted: a quarter more writes in a drain
)


class _UnusableError(Exception):
    """The transaction as a whole could not be begun or committed."""


class Watcher(Protocol):
    """Told on the file's thread how transactions end: what operations keep in memory follows what is on disk."""

    def committed(self) -> Callable[[], None] | None:
        """After a commit; returns what to do on the loop before the futures of this transaction resolve."""
        ...

    def rolled_back(self) -> None:
        """Operations ran, and have not happened."""
        ...


class GroupCommit:
    """Runs operations in order on its own thread, many to a transaction.

    Its queue is bounded by the caller: each operation belongs to a request that admission has counted.
    """

    def __init__(self, path: Path, schema: str, *, batch_max: int, watcher: Watcher) -> None:
        self._path = path
        self._schema = schema
        self._batch_max = batch_max
        self._watcher = watcher
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._patient: list[_Waiting] = []
        self._thread = threading.Thread(target=self._run, name="mqtt-inbox", daemon=True)
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._closed = False

    async def open(self) -> None:
        """Open or create the file.

        Raises:
            MeshError: UNAVAILABLE if it cannot be opened.
        """
        self._thread.start()
        await self._opened

    def submit(self, operation: Callable[[sqlite3.Connection], R], *, urgent: bool = True) -> asyncio.Future[R]:
        """Queue an operation; the future resolves after its commit, in the order of the calls.

        It fails with UNAVAILABLE if the storage fails, and then nothing of the operation remains. What is not `urgent`
        shares the transaction of the next operation, or has one of its own after `PATIENCE_S`.
        """
        future: asyncio.Future[R] = self._loop.create_future()
        if self._closed:
            future.set_exception(MeshError(Code.UNAVAILABLE, "The inbox is closed."))
        elif urgent:
            self._pass_on()
            self._queue.put((operation, future))
        else:
            if not self._patient:
                self._loop.call_later(PATIENCE_S, self._pass_on)
            self._patient.append((operation, future))
        return future

    def _pass_on(self) -> None:
        for waiting in self._patient:
            self._queue.put(waiting)
        self._patient.clear()

    async def close(self) -> None:
        """Commit what waits, then close the file."""
        if not self._closed:
            self._closed = True
            self._pass_on()
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            make_folder(self._path.parent)
            connection = sqlite3.connect(self._path, isolation_level=None)
            for statement in PRAGMAS:
                connection.execute(statement)
            connection.executescript(self._schema)
        except (sqlite3.Error, OSError) as error:
            # A DatabaseError itself, none of its kinds: the file is damaged, or something else.
            advice = " Move it away to start with an empty one." if type(error) is sqlite3.DatabaseError else ""
            refusal = MeshError(Code.UNAVAILABLE, f"The ledger {self._path} cannot be used: {error}.{advice}")
            self._tell([partial(_fail, self._opened, refusal)])
            return
        self._tell([partial(_fulfil, self._opened, None)])
        try:
            while (batch := self._gather()) is not None:
                self._tell(self._settle(connection, batch))
        finally:
            connection.close()

    def _settle(self, connection: sqlite3.Connection, batch: list[_Waiting]) -> list[Outcome]:
        try:
            return _commit(connection, batch, self._watcher)
        except Exception as error:  # noqa: BLE001  # without this thread everybody would wait for ever
            return [partial(_fail, future, _told(error)) for _operation, future in batch]

    def _gather(self) -> list[_Waiting] | None:
        """All that waits, up to the bound; blocks for the first. None at the end."""
        first = self._queue.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < self._batch_max:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                break
            if item is None:
                self._queue.put(None)
                break
            batch.append(item)
        return batch

    def _tell(self, outcomes: list[Outcome]) -> None:
        try:
            self._loop.call_soon_threadsafe(_resolve, outcomes)
        except RuntimeError:  # the loop is closed; nobody waits any more
            _log.debug("the loop ended before the inbox")


def _commit(connection: sqlite3.Connection, batch: list[_Waiting], watcher: Watcher) -> list[Outcome]:
    """One transaction for all; where an operation fails each gets a transaction of its own."""
    try:
        results = _transact(connection, batch)
    except Exception as error:  # noqa: BLE001  # handed to the callers
        watcher.rolled_back()
        if len(batch) == 1 or isinstance(error, _UnusableError):
            _log.warning("the ledger cannot be written: %s", error)
            return [partial(_fail, future, _told(error)) for _operation, future in batch]
        return [outcome for each in batch for outcome in _commit(connection, [each], watcher)]
    first = watcher.committed()
    outcomes: list[Outcome] = [
        partial(_fulfil, future, result) for (_, future), result in zip(batch, results, strict=True)
    ]
    return outcomes if first is None else [first, *outcomes]


def _transact(connection: sqlite3.Connection, batch: list[_Waiting]) -> list[Any]:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        raise _UnusableError(error) from error
    try:
        results = [operation(connection) for operation, _future in batch]
    except Exception:
        connection.execute("ROLLBACK")
        raise
    try:
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise _UnusableError(error) from error
    return results


def _resolve(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        try:
            outcome()
        except Exception:  # noqa: BLE001  # whoever is told first must not keep the others waiting
            _log.exception("a commit could not be told")


def _fulfil(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():  # else its waiter was cancelled; the commit stands
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _told(error: Exception) -> Exception:
    if isinstance(error, MeshError):
        return error
    if isinstance(error, sqlite3.Error | _UnusableError):
        return _storage_error(error)
    _log.error("an operation of the ledger failed", exc_info=error)
    return MeshError(Code.INTERNAL, "The node's inbox failed on this; see its log.")


def ignore_failure(done: asyncio.Future[Any]) -> None:
    """For orders that nobody waits for, and that are no loss."""
    if not done.cancelled():
        done.exception()


def _storage_error(error: Exception) -> MeshError:
    return MeshError(Code.UNAVAILABLE, f"The node's inbox cannot be used ({type(error).__name__}); try again later.")
