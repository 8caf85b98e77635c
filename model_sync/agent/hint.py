"""Listening for "something changed". A hint has no authority: all it does is to make the agent check now."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from model_sync.agent.sources.http_source import HttpSource
from model_sync.agent.sources.source import asked_pause_s
from model_sync.replica.pause import hint_pause_s
from nearcast.errors import MeshError

GRACE_S = 10.0
"""How long an answer may take beyond the time that was asked for."""
ANSWER_BYTES_MAX = 4096


class _Answer(msgspec.Struct, frozen=True):
    serial: int


class HintListener:
    """A thread that long-polls the control API and calls `changed(serial)`, from that thread, for each new serial.

    Args:
        wait_s: long-poll time asked for.
        backoff_cap_s: failures wait uniformly in [0, min(cap, 2**n)] seconds; `draw` gives numbers in [0, 1).
    """

    def __init__(
        self,
        source: HttpSource,
        changed: Callable[[int], None],
        *,
        wait_s: float,
        backoff_cap_s: float,
        draw: Callable[[], float],
    ) -> None:
        self._source = source
        self._changed = changed
        self._wait_s = wait_s
        self._backoff_cap_s = backoff_cap_s
        self._draw = draw
        self._stop = threading.Event()
        self._serial = 0
        self._thread = threading.Thread(target=self._listen, name="hint", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def known(self, serial: int) -> None:
        """The agent has checked up to `serial`; only newer ones are worth a call."""
        self._serial = max(self._serial, serial)

    def close(self) -> None:
        """Stop listening, at once."""
        self._stop.set()
        self._source.abort()
        self._thread.join(timeout=2.0)
        self._source.close()

    def _listen(self) -> None:
        failures = 0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                serial = self._ask()
            except (MeshError, msgspec.DecodeError) as error:
                failures += 1
                retry_s = asked_pause_s(error)
                self._stop.wait(hint_pause_s(self._draw, failures=failures, cap_s=self._backoff_cap_s, retry_s=retry_s))
                continue
            failures = 0
            if serial > self._serial:
                self._serial = serial
                self._changed(serial)
            elif time.monotonic() - began < min(1.0, self._wait_s):
                self._stop.wait(1.0)  # a server that does not wait must not be asked in a tight loop

    def _ask(self) -> int:
        path = f"v1/hint?since={self._serial}&wait_s={self._wait_s:g}"
        data = self._source.read(path, size_bytes_max=ANSWER_BYTES_MAX, timeout_s=self._wait_s + GRACE_S)
        return msgspec.json.decode(data, type=_Answer).serial
