"""How the process that applies a delta is started, watched and ended, and what its end means."""

from __future__ import annotations

import hashlib
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from model_sync.agent.install.bases import Base
from model_sync.agent.install.patch import NOTES_SIZE_BYTES_MAX, PatchOrder, Refusal
from model_sync.agent.install.shorter_ways import DeltaError, ShorterWay
from model_sync.delta.limits import PIECE_SIZE_BYTES, refused
from nearcast.errors import Code, MeshError
from nearcast.serving.gate_child import describe_end, gate_environment
from nearcast.store import Manifest

ADDRESS_SPACE_BYTES = 1024**3
"""What the process may reserve beside the files; numpy alone takes some hundred MB."""
ADDRESS_SPACE_FACTOR = 8
"""And this many times the old and the new file."""
ANSWER_SIZE_BYTES_MAX = 64 * 1024
"""The longest list of what is lacking."""
POLL_S = 0.05
"""A wish to stop is seen within this time."""
_RANGES: msgspec.json.Decoder[tuple[tuple[int, int], ...] | None] = msgspec.json.Decoder(
    tuple[tuple[int, int], ...] | None
)


class PatchChild:
    """Applies deltas to the files of one version, each in a process of its own.

    Args:
        store: folder of the store.
        manifest: of the new version, verified.
        staged: folder where payloads and parts lie.
        tenant_keys: folder of the keys that open sealed versions.
        stop: set from another thread to kill the process.
    """

    def __init__(
        self, store: Path, manifest: Manifest, staged: Path, *, tenant_keys: Path | None, stop: threading.Event
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._staged = staged
        self._tenant_keys = tenant_keys
        self._stop = stop

    def make(self, shorter: ShorterWay, bases: tuple[Base, ...], *, deadline: float) -> Iterator[bytes]:
        """The signed file, piece by piece; it is that only if no error follows the last one.

        Args:
            shorter: the way, of which payload and parts were fetched.
            bases: what it starts from.
            deadline: by `time.monotonic`; then the process is killed.

        Raises:
            DeltaError: if the process came to no signed file, whatever became of it.
            MeshError: CANCELLED once `stop` is set.
            OSError: if no process could be started.
        """
        digest, left = hashlib.sha256(), shorter.entry.size_bytes
        for piece in self._run(self._order(shorter, bases, deadline), deadline):
            left -= len(piece)
            if left < 0:
                break
            digest.update(piece)
            yield piece
        if left or digest.hexdigest() != shorter.entry.sha256:  # whoever took the process over may write anything
            raise _failed("its result is not the signed file")

    def measure(self, shorter: ShorterWay, bases: tuple[Base, ...], *, deadline: float) -> tuple[tuple[int, int], ...]:
        """(start, size in bytes) of the parts of the new file that `chunks` does not find at hand.

        Raises:
            DeltaError: UNSUPPORTED if this node cannot know, TOO_LARGE if they are too many; else as `make`.
            MeshError, OSError: as `make`.
        """
        order = msgspec.structs.replace(self._order(shorter, bases, deadline), measures=True)
        answer = bytearray()
        for piece in self._run(order, deadline):
            answer += piece
            if len(answer) > ANSWER_SIZE_BYTES_MAX:
                raise _failed("nobody can say what is lacking")
        try:
            found: tuple[tuple[int, int], ...] | None = msgspec.json.decode(
                answer, type=tuple[tuple[int, int], ...] | None
            )
        except msgspec.DecodeError:
            raise _failed("nobody can say what is lacking") from None
        if found is None:
            raise DeltaError(Code.TOO_LARGE, "The files at hand lack too many parts of the new one.")
        end = 0
        for start, size_bytes in found:
            if start < end or size_bytes <= 0:
                raise _failed("nobody can say what is lacking")
            end = start + size_bytes
        if end > shorter.entry.size_bytes:
            raise _failed("nobody can say what is lacking")
        return found

    def _order(self, shorter: ShorterWay, bases: tuple[Base, ...], deadline: float) -> PatchOrder:
        assert shorter.way is not None
        size_bytes = shorter.entry.size_bytes + sum(base.entry.size_bytes for base in bases)
        return PatchOrder(
            store=str(self._store.absolute()),
            manifest=self._manifest,
            path=shorter.entry.path,
            way=shorter.way,
            payload=str((self._staged / shorter.payload_name).absolute()),
            lacking=shorter.lacking,
            parts=str((self._staged / shorter.parts_name).absolute()),
            tenant_keys=str(self._tenant_keys.absolute()) if self._tenant_keys is not None else "",
            cpu_s_max=max(1, math.ceil(deadline - time.monotonic())),
            address_space_bytes_max=ADDRESS_SPACE_BYTES + ADDRESS_SPACE_FACTOR * size_bytes,
        )

    def _run(self, order: PatchOrder, deadline: float) -> Iterator[bytes]:
        """What the process writes; it never outlives this."""
        stdin, notes = os.memfd_create("order"), os.memfd_create("notes")
        with os.fdopen(stdin, "w+b") as told, os.fdopen(notes, "rb") as said:
            told.write(msgspec.json.encode(order))
            told.seek(0)
            command = [sys.executable, "-m", "model_sync.agent.install.patch"]
            with subprocess.Popen(
                command, stdin=told, stdout=subprocess.PIPE, stderr=said, env=gate_environment(), start_new_session=True
            ) as child:
                try:
                    yield from self._read(child, deadline)
                    status = self._await_end(child, deadline)
                finally:
                    if child.returncode is None:
                        with suppress(ProcessLookupError):
                            os.killpg(child.pid, signal.SIGKILL)
            if status != 0:
                said.seek(0)
                raise _read_refusal(status, said.read(NOTES_SIZE_BYTES_MAX))

    def _read(self, child: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
        assert child.stdout is not None
        ready = select.poll()
        ready.register(child.stdout, select.POLLIN)
        while True:
            self._require_time(deadline)
            if not ready.poll(POLL_S * 1000):
                continue
            piece = os.read(child.stdout.fileno(), PIECE_SIZE_BYTES)
            if not piece:
                return
            yield piece

    def _await_end(self, child: subprocess.Popen[bytes], deadline: float) -> int:
        while True:
            self._require_time(deadline)
            with suppress(subprocess.TimeoutExpired):
                return child.wait(POLL_S)

    def _require_time(self, deadline: float) -> None:
        if self._stop.is_set():
            raise MeshError(Code.CANCELLED, "The delta was stopped.")
        if time.monotonic() > deadline:
            raise _failed("it took too long")


def _read_refusal(status: int, notes: bytes) -> DeltaError:
    """Why a process that ended with `status` made nothing."""
    try:
        refusal = msgspec.json.decode(notes.strip().rsplit(b"\n", 1)[-1], type=Refusal)
    except msgspec.DecodeError:
        return _failed(f"the process that applied it {describe_end(status)}")
    return DeltaError(refusal.code, refusal.message)


def _failed(reason: str) -> DeltaError:
    return DeltaError(Code.UNTRUSTED, refused(reason).message)
