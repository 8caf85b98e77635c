"""Which versions answer by default, and to which share: read from the pointers that the agent writes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import msgspec

from nearcast.clock import SYSTEM_CLOCK, Clock
from nearcast.errors import MeshError
from nearcast.store import Store
from nearcast.store.manifest import is_model_name
from nearcast.store.pointer import Pointer
from nearcast.telemetry import get_logger

_MODELS_MAX = 1024
_log = get_logger(__name__)


class Split(msgspec.Struct, frozen=True):
    """One model's pointer, in the words of the wire: versions as text, "" = none."""

    stable: str = ""
    candidate: str = ""
    share: float = 0.0
    salt: str = ""
    last_good: str = ""


NO_SPLIT = Split()


class SplitSource(Protocol):
    """Where a router learns what a channel serves."""

    def split(self, model: str) -> Split:
        """The split of a model; `NO_SPLIT` where nothing is known."""
        ...

    def alias(self, model: str, version: str) -> str:
        """The release that another name of a version, such as its semver, stands for; "" if none."""
        ...

    def refresh(self, model: str | None = None) -> None:
        """Forget what was read: of one model or of all."""
        ...


class NoSplits:
    """Knows no pointer: the newest hot version answers."""

    def split(self, model: str) -> Split:
        return NO_SPLIT

    def alias(self, model: str, version: str) -> str:
        return ""

    def refresh(self, model: str | None = None) -> None:
        return


class _Entry:
    __slots__ = ("aliases", "checked_at", "split")

    def __init__(self, checked_at: float, split: Split) -> None:
        self.checked_at = checked_at
        self.split = split
        self.aliases: dict[str, str] | None = None


class StoreSplits:
    """Pointers of a store, read at most every `interval_s` seconds per model. A torn one leaves the last good word."""

    def __init__(self, store: Store, *, interval_s: float = 0.25, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._interval_s = interval_s
        self._now = clock.monotonic
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    def split(self, model: str) -> Split:
        entry = self._entries.get(model)
        if entry is None and not is_model_name(model):
            return NO_SPLIT  # nothing of a client's is remembered that may be of any length
        if entry is None or self._now() - entry.checked_at >= self._interval_s:
            entry = self._read(model, entry)
        return entry.split

    def alias(self, model: str, version: str) -> str:
        self.split(model)
        entry = self._entries.get(model)
        if entry is None:
            return ""
        if entry.aliases is None:
            entry.aliases = self._read_aliases(model)
        return entry.aliases.get(version, "")

    def refresh(self, model: str | None = None) -> None:
        for name in [model] if model is not None else list(self._entries):
            if name in self._entries:
                self._entries[name].checked_at = float("-inf")

    def _read(self, model: str, entry: _Entry | None) -> _Entry:
        split = NO_SPLIT if entry is None else entry.split
        try:
            split = _from_pointer(self._store.pointer(model))
        except MeshError as error:
            _log.warning("pointer_unreadable", model=model, error=error.message)
        fresh = _Entry(self._now(), split)
        self._entries[model] = fresh
        self._entries.move_to_end(model)
        if len(self._entries) > _MODELS_MAX:
            self._entries.popitem(last=False)
        return fresh

    def _read_aliases(self, model: str) -> dict[str, str]:
        aliases: dict[str, str] = {}
        try:
            for release in self._store.releases(model):
                aliases[self._store.manifest(model, release).semver] = str(release)
        except MeshError as error:
            _log.warning("manifest_unreadable", model=model, error=error.message)
        return aliases


def _from_pointer(pointer: Pointer | None) -> Split:
    if pointer is None:
        return NO_SPLIT
    return Split(
        stable=_text(pointer.stable),
        candidate=_text(pointer.candidate),
        share=pointer.share,
        salt=pointer.salt,
        last_good=_text(pointer.last_good),
    )


def _text(release: int | None) -> str:
    return "" if release is None else str(release)
