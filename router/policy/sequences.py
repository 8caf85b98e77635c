"""Which target holds the state of which sequence."""

from __future__ import annotations

from collections import OrderedDict


class Sequences:
    """A bounded memory of bindings; the least recently used is forgotten first."""

    __slots__ = ("_bound", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bound: OrderedDict[tuple[str, str, str], tuple[str, str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._bound)

    def get(self, tenant: str, model: str, sequence: str) -> tuple[str, str] | None:
        """Target and version of a sequence; None for a new one."""
        key = (tenant, model, sequence)
        found = self._bound.get(key)
        if found is not None:
            self._bound.move_to_end(key)
        return found

    def bind(self, tenant: str, model: str, sequence: str, target: str, version: str) -> None:
        """The state of the sequence lives there from now on."""
        key = (tenant, model, sequence)
        self._bound[key] = (target, version)
        self._bound.move_to_end(key)
        if len(self._bound) > self._limit:
            self._bound.popitem(last=False)
