"""What counts, before anybody reads it: Prometheus' library is a thirteenth of a node's start.

It is imported for the first who reads. A collector imports the families that it makes where it makes them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.registry import Collector
else:
    Collector = object  # the library takes whatever can `collect`

__all__ = ["Collector", "LateRegistry", "Registry"]
_log = logging.getLogger(__name__)


class Registry(Protocol):
    """Where collectors are shown: one of Prometheus' library, or a `LateRegistry`."""

    def register(self, collector: Collector) -> None:
        """Show it from now on."""

    def unregister(self, collector: Collector) -> None:
        """Show it no longer."""


class LateRegistry:
    """Collectors that wait until somebody wants to read them."""

    def __init__(self) -> None:
        self._waiting: list[Collector] = []
        self._refused: list[Collector] = []
        self._made: CollectorRegistry | None = None

    def register(self, collector: Collector) -> None:
        """Show it from now on.

        Raises:
            ValueError: if a metric has that name already; before anybody reads, `made` finds it and leaves it out.
        """
        if self._made is None:
            self._waiting.append(collector)
        else:
            self._made.register(collector)

    def unregister(self, collector: Collector) -> None:
        """Show it no longer."""
        if self._made is None:
            self._waiting.remove(collector)
        elif collector in self._refused:
            self._refused.remove(collector)
        else:
            self._made.unregister(collector)

    def made(self) -> CollectorRegistry:
        """All of them and the process's own in a registry of the library, which is imported for it.

        One that cannot be registered is left out: for its sake the others would not be seen as long as we run.
        """
        if self._made is None:
            from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry

            made = CollectorRegistry(auto_describe=True)
            for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR, *self._waiting):
                try:
                    made.register(collector)
                except Exception:  # noqa: BLE001 - what others have written
                    kind = type(collector)
                    _log.exception("the metrics of %s.%s are not shown", kind.__module__, kind.__qualname__)
                    self._refused.append(collector)
            self._made = made
            self._waiting.clear()
        return self._made
