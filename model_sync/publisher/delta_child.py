"""The search for deltas in a child process: it may take long and much memory, and must be stoppable at any moment."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from model_sync.delta.search import Tried, search


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """The end of one search."""


class DeltaSearch:
    """One child for many searches, within one time budget. Use it in a `with` statement.

    Contents travel through a pipe, so that plain bytes of sealed versions never touch a disk.
    """

    def __init__(self, budget_s: float) -> None:
        self._end = time.monotonic() + budget_s
        context = multiprocessing.get_context("spawn")
        self._pipe, self._far = context.Pipe()
        self._child = context.Process(target=_serve, args=(self._far,), daemon=True)
        self._is_over = False

    def __enter__(self) -> Self:
        self._child.start()
        self._far.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._child.join()
        self._pipe.close()

    def search(self, old: bytes | None, new: bytes) -> Iterator[Tried]:
        """What `model_sync.delta.search` finds, as it is found; nothing more once the time is over."""
        left_s = self._end - time.monotonic()
        if self._is_over or left_s <= 0:
            return
        try:
            self._pipe.send((old, new, left_s))
            while self._pipe.poll(max(0.0, self._end - time.monotonic())):
                found = self._pipe.recv()
                if isinstance(found, _Done):
                    return
                yield found
        except (EOFError, OSError):
            pass  # the child was killed, most likely for its memory: what it found before still counts
        self._stop()

    def _stop(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._child.terminate()


def _serve(pipe: Connection) -> None:
    try:
        while True:
            old, new, budget_s = pipe.recv()
            for found in search(old, new, clock=time.perf_counter, budget_s=budget_s):
                pipe.send(found)
            pipe.send(_Done())
    except (EOFError, KeyboardInterrupt):
        return
