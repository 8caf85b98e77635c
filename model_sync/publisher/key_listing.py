"""What `nearcast keys list` shows."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from model_sync.publisher.control_client import ControlClient
from model_sync.publisher.key_ring import KeyRing
from model_sync.publisher.roles import ONLINE, Roles, now, read_roles


def list_roles(client: ControlClient, operator: Path) -> list[dict[str, Any]]:
    """Each role with threshold, keys and expiry; for a key, where its private half was last seen, and when (ISO 8601).

    Raises:
        MeshError: UNTRUSTED if the controller shows roles that this operator's root does not vouch for.
    """
    roles, ring = read_roles(client, operator), KeyRing(operator)
    expiries: dict[str, datetime] = {name: role.signed.expires for name, role in roles.present().items()}
    # The three online roles have one key; the first of them to expire is what counts.
    expiries[ONLINE] = min(roles.online.values())
    return [
        {
            "role": name,
            "threshold": roles.role(name).threshold,
            "expires": expires.isoformat(),
            "keys": _list_keys(name, roles, ring),
        }
        for name, expires in expiries.items()
    ]


def _list_keys(name: str, roles: Roles, ring: KeyRing) -> list[dict[str, str]]:
    files, rows = ring.files(), []
    for key in roles.keys(name):
        note = ring.last_seen(key.keyid)
        place, seen = (note.uri, note.seen.isoformat()) if note else ("", "")
        if key.keyid in files:
            place, seen = str(files[key.keyid]), now().isoformat()
        elif name == ONLINE:
            place = "the controller"
        rows.append({"id": key.keyid, "place": place or "in other hands", "seen": seen})
    return rows
