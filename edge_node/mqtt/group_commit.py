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
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from nearcast.durable import make_folder
from nearcast.errors import Code, MeshError

R = TypeVar("R")
Operation: TypeAlias = Callable[[sqlite3.Connection], Any]
_Waiting: TypeAlias = "tuple[Operation, asyncio.Future[Any]]"
_log = logging.getLogger("nearcast.mqtt")

PATIENCE_S = 0.02
"""A commit that nobody waits for would only delay the next one that somebody does wait for."""
PRAGMAS = ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "PRAGMA busy_timeout=2000", "PRAGMA foreign_keys=ON")


class GroupCommit:
    """Runs operations in order on its own thread, many to a transaction.

    Its queue is bounded by the caller: each operation belongs to a request that admission has counted.
    """

    def __init__(self, path: Path, schema: str, *, batch_max: int) -> None:
        self._path = path
        self._schema = schema
        self._batch_max = batch_max
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
            self._tell([(self._opened, None, _storage_error(error))])
            return
        self._tell([(self._opened, None, None)])
        try:
            while (batch := self._gather()) is not None:
                self._tell(_commit(connection, batch))
        finally:
            connection.close()

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

    def _tell(self, outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
        try:
            self._loop.call_soon_threadsafe(_resolve, outcomes)
        except RuntimeError:  # the loop is closed; nobody waits any more
            _log.debug("the loop ended before the inbox")


def _commit(
    connection: sqlite3.Connection, batch: list[_Waiting]
) -> list[tuple[asyncio.Future[Any], Any, BaseException | None]]:
    outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        for operation, future in batch:
            outcomes.append(_attempt(connection, operation, future))
        connection.execute("COMMIT")
    except sqlite3.Error as error:
        _log.exception("the inbox cannot be written")
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        return [(future, None, _storage_error(error)) for _operation, future in batch]
    return outcomes


def _attempt(
    connection: sqlite3.Connection, operation: Operation, future: asyncio.Future[Any]
) -> tuple[asyncio.Future[Any], Any, BaseException | None]:
    """One operation inside the shared transaction: its failure undoes itself and spares its neighbours."""
    connection.execute("SAVEPOINT one")
    try:
        result = operation(connection)
    except Exception as error:  # noqa: BLE001  # handed to the caller
        connection.execute("ROLLBACK TO one")
        connection.execute("RELEASE one")
        return future, None, _storage_error(error) if isinstance(error, sqlite3.Error) else error
    connection.execute("RELEASE one")
    return future, result, None


def _resolve(outcomes: list[tuple[asyncio.Future[Any], Any, BaseException | None]]) -> None:
    for future, result, error in outcomes:
        if future.done():  # its waiter was cancelled; the commit stands
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _storage_error(error: Exception) -> MeshError:
    return MeshError(Code.UNAVAILABLE, f"The node's inbox cannot be used ({type(error).__name__}); try again later.")
