"""Who else is in the mesh and gives chunks, by the node directory. A stale view costs time, nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from model_sync.agent.sources.http_source import HttpSource
from nearcast.errors import MeshError

FRESH_S = 10.0
"""How long one answer of the directory is used."""
TIMEOUT_S = 5.0
LISTING_BYTES_MAX = 4 * 1024 * 1024
ADDRESS = "peer"
"""Under this name a node announces where its agent gives chunks."""


class _Row(msgspec.Struct, frozen=True):
    name: str
    addresses: dict[str, str] = {}


class _Listing(msgspec.Struct, frozen=True):
    nodes: list[_Row] = []


class Neighbours:
    """The other nodes that give chunks; safe from any thread.

    Args:
        node: our own name.
        make_control: a connection to the control API.
    """

    def __init__(self, node: str, make_control: Callable[[], HttpSource]) -> None:
        self._node = node
        self._make_control = make_control
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        self._asked_at = -FRESH_S

    def addresses(self) -> dict[str, str]:
        """`host:port` by name; the last view if the control API does not answer."""
        with self._lock:
            if time.monotonic() - self._asked_at >= FRESH_S:
                self._asked_at = time.monotonic()
                self._ask()
            return dict(self._known)

    def _ask(self) -> None:
        control = self._make_control()
        try:
            data = control.read("v1/nodes", size_bytes_max=LISTING_BYTES_MAX, timeout_s=TIMEOUT_S)
            rows = msgspec.json.decode(data, type=_Listing).nodes
        except (MeshError, msgspec.DecodeError):
            return
        finally:
            control.close()
        self._known = {
            row.name: row.addresses[ADDRESS] for row in rows if row.name != self._node and ADDRESS in row.addresses
        }
