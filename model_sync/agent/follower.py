"""The shell of one model on a node that installs nothing: it writes the pointer that the router splits by."""

from __future__ import annotations

from contextlib import suppress

from model_sync.agent.model_shell import Surroundings
from model_sync.agent.status import ModelStatus, pointer_fields
from model_sync.replica.events import Event, Intended
from model_sync.replica.follow import follow_channel
from model_sync.replica.state import Memory
from model_sync.rollout.report import FOLLOWING
from nearcast.errors import MeshError
from nearcast.store import Pointer
from nearcast.telemetry import get_logger

_log = get_logger("model_sync.agent")


class Follower:
    """One model in follow mode; has the shape of a `ModelShell`."""

    def __init__(self, model: str, around: Surroundings) -> None:
        self.model = model
        self._around = around
        self._memory = around.journal.memories.get(model, Memory(model=model))
        self._pointer = Pointer()
        self._error = ""

    async def boot(self) -> None:
        """Read the pointer that is on the disk."""
        with suppress(MeshError):
            self._pointer = self._around.store.pointer(self.model) or Pointer()

    def send(self, event: Event) -> None:
        """Follow a document; nothing else matters here."""
        if not isinstance(event, Intended):
            return
        memory, pointer, self._error = follow_channel(self._memory, self._pointer, event.want)
        try:
            if memory != self._memory:
                self._around.journal.append(memory)
                self._memory = memory
            if pointer != self._pointer:
                self._around.store.write_pointer(self.model, pointer)
                self._pointer = pointer
                _log.info("pointer_written", model=self.model, **pointer_fields(pointer))
        except (OSError, MeshError) as error:
            self._error = f"{self.model} cannot be followed: {error}. The next check tries again."
            _log.exception("follow_failed", model=self.model)
        self._around.changed()

    @property
    def status(self) -> ModelStatus:
        """What to report."""
        return ModelStatus(state=FOLLOWING, error=self._error, **pointer_fields(self._pointer))

    async def close(self, *, orderly: bool) -> None:
        """Nothing runs here."""
