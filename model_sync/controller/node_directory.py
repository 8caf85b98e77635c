"""Which nodes are there, by their own word: kept in memory, forgotten when a node falls silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from nearcast.errors import Code, MeshError

AddressName = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,31}\Z")]
AddressText = Annotated[str, msgspec.Meta(max_length=256)]
SETTLING_S = 30.0
"""Six announcements: a node that is silent for longer after the controller's start is not there."""


class Announcement(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a node says about itself: its listeners by name (grpc, http, mesh, metrics, mqtt) and its models."""

    addresses: Annotated[dict[AddressName, AddressText], msgspec.Meta(max_length=16)] = {}
    models: Annotated[dict[str, Any], msgspec.Meta(max_length=256)] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    role: str
    announcement: Announcement
    seen: float


class NodeDirectory:
    """At most `nodes_max` nodes, each for `ttl_s` seconds after its last word. Instants are monotonic seconds.

    It `began` empty: for `SETTLING_S` seconds it may lack nodes that are there and have not spoken since.
    """

    def __init__(self, *, nodes_max: int, ttl_s: float, began: float) -> None:
        self._began = began
        self._nodes_max = nodes_max
        self._ttl_s = ttl_s
        self._entries: dict[str, _Entry] = {}

    def announce(self, now: float, name: str, role: str, announcement: Announcement) -> None:
        """Take a node's word. Name and role come from its certificate.

        Raises:
            MeshError: OVERLOADED if the directory is full.
        """
        if name not in self._entries and len(self._entries) >= self._nodes_max:
            self._expire(now)
            if len(self._entries) >= self._nodes_max:
                raise MeshError(Code.OVERLOADED, f"The directory is full: {self._nodes_max} nodes.")
        self._entries[name] = _Entry(role=role, announcement=announcement, seen=now)

    def is_complete(self, now: float) -> bool:
        """Whether every living node has had the time to speak."""
        return now - self._began >= SETTLING_S

    def remove(self, name: str) -> None:
        """Forget a node, if it is there."""
        self._entries.pop(name, None)

    def rows(self, now: float) -> list[dict[str, Any]]:
        """Every live node by name, in the form of `GET /v1/nodes`."""
        self._expire(now)
        return [
            {
                "name": name,
                "role": entry.role,
                "addresses": entry.announcement.addresses,
                "seen_s_ago": round(now - entry.seen, 3),
                "models": entry.announcement.models,
            }
            for name, entry in sorted(self._entries.items())
        ]

    def _expire(self, now: float) -> None:
        for name in [name for name, entry in self._entries.items() if now - entry.seen > self._ttl_s]:
            del self._entries[name]
