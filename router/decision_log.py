"""The decision log on disk: a bounded ring of files, written by a thread of its own.

A slow or full disk costs records, never a request: what does not fit into the queue is counted, and nothing more is
written until the next checkpoint, because without what is missing the rest could not be replayed anyway.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from nearcast import __version__
from nearcast.metrics import Collector, Registry
from nearcast.telemetry import get_logger
from router.policy import Policy, PolicyConfig
from router.policy.log import FORMAT, Checkpoint, Record, Start, encode
from router.policy.recorded import RecordedPolicy

if TYPE_CHECKING:
    from prometheus_client import Metric

SUFFIX = ".decisions"
_FRAME_RECORDS = 256
_CLOSE_TIMEOUT_S = 2.0
_log = get_logger(__name__)


class DecisionLogConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whether and how decisions are written down, in `<data_dir>/decisions`.

    Attributes:
        enabled: a request then costs a few microseconds more.
        file_bytes_max: a file ends at the first report after this size, and at twice of it in any case.
        files_max: the oldest files beyond this number are deleted, those of earlier runs included.
        pending_max: records that wait for the disk.
        flush_ms: how often they are written.
        retry_ms: pause after a disk that failed.
    """

    enabled: bool = False
    file_bytes_max: Annotated[int, msgspec.Meta(ge=4096)] = 64 * 1024 * 1024
    files_max: Annotated[int, msgspec.Meta(ge=2)] = 4
    pending_max: Annotated[int, msgspec.Meta(ge=1024)] = 32_768
    flush_ms: Annotated[float, msgspec.Meta(gt=0)] = 50.0
    retry_ms: Annotated[float, msgspec.Meta(ge=0)] = 5000.0


class DecisionLog(Collector):
    """Takes records on the loop's thread and writes them on its own. `router.policy.recorded.Sink`.

    Args:
        folder: made if it does not exist.
        start: head of the first file.
    """

    def __init__(self, folder: Path, config: DecisionLogConfig, start: Start) -> None:
        self._folder = folder
        self._config = config
        self._start = start
        self._pending: deque[Record] = deque((start,))
        self._file: int | None = None
        self._size = 0
        self._written = 0
        # Two counters, because two threads count: records that found the queue full, and those that the disk refused.
        self._dropped = self._failed = self._lost_before = 0
        self._accepts = True
        self._turning = False
        self._retry_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Records that are nowhere."""
        return self._dropped + self._failed

    def append(self, record: Record) -> None:
        """Take a record, or drop and count it."""
        if self._accepts and len(self._pending) < self._config.pending_max:
            self._pending.append(record)
        else:
            self._accepts = False
            self._dropped += 1

    def is_due(self, now: float) -> bool:
        """Whether a checkpoint may follow: the file is full, or records were lost and there is room again."""
        if self._turning:
            return False
        if self._accepts:
            return self._size >= self._config.file_bytes_max
        return now >= self._retry_at and len(self._pending) < self._config.pending_max // 2

    def begin(self, record: Checkpoint) -> None:
        """Take a checkpoint; it begins a file."""
        if not self._accepts:
            self._retry_at = record.now + self._config.retry_ms / 1e3
        self._turning = self._accepts = True
        self._pending.append(record)

    def close(self) -> None:
        """Write what is pending. Waits for the disk, but not long."""
        self._stopping.set()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def collect(self) -> Iterator[Metric]:
        """Two counters."""
        from prometheus_client.core import CounterMetricFamily

        yield CounterMetricFamily("nearcast_decision_log_records", "Records written.", value=self._written)
        yield CounterMetricFamily("nearcast_decision_log_lost", "Records that nobody can replay.", value=self.lost)

    # On the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.wait(self._config.flush_ms / 1e3):
            self._drain()
        self._drain()
        self._end_file()

    def _drain(self) -> None:
        batch: list[Record] = []
        for _ in range(len(self._pending)):
            record = self._pending.popleft()
            begins = isinstance(record, Start | Checkpoint)
            if begins or len(batch) >= _FRAME_RECORDS:
                self._write(batch)
                batch = []
            if begins:
                self._begin_file(record)
            batch.append(record)
        self._write(batch)

    def _write(self, batch: list[Record]) -> None:
        if not batch:
            return
        if self._file is not None:
            try:
                frame = encode(batch)
                if self._size + len(frame) > 2 * self._config.file_bytes_max:
                    raise OSError("no report came to begin another file with")
                _write_all(self._file, frame)
                self._size += len(frame)
                self._written += len(batch)
                return
            except (OSError, msgspec.MsgspecError, TypeError) as error:
                self._give_up(error)
        self._failed += len(batch)

    def _begin_file(self, record: Record) -> None:
        self._end_file()
        if isinstance(record, Checkpoint):
            lost = self.lost
            self._start = msgspec.structs.replace(
                self._start, number=self._start.number + 1, lost=lost - self._lost_before
            )
            self._lost_before = lost
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._folder / f"{self._start.run}.{self._start.number:06}{SUFFIX}"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._size = 0
            for old in sorted(self._folder.glob(f"*{SUFFIX}"))[: -self._config.files_max]:
                old.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(error)
        if isinstance(record, Checkpoint):
            self._write([self._start])
        self._turning = False

    def _give_up(self, error: Exception) -> None:
        """The rest of this file would not be replayed: wait for the next checkpoint."""
        _log.warning("decision_log_stops", folder=str(self._folder), error=str(error))
        self._end_file()
        self._accepts = False

    def _end_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def make_policy(
    config: PolicyConfig,
    seed: int,
    decisions: DecisionLogConfig,
    *,
    data_dir: Path,
    node: str,
    registry: Registry | None = None,
) -> tuple[Policy, DecisionLog | None]:
    """A policy, and the log that it writes; None where that is off."""
    if not decisions.enabled:
        return Policy(config, seed), None
    start = Start(
        format=FORMAT,
        run=f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}",
        number=0,
        lost=0,
        node=node,
        release=__version__,
        seed=seed,
        config=msgspec.to_builtins(config),
    )
    log = DecisionLog(data_dir / "decisions", decisions, start)
    if registry is not None:
        registry.register(log)
    return RecordedPolicy(config, seed, log), log


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
