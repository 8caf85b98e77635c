"""`<store>/.agent/status.json`: what the agent says about itself to the node beside it and to the operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from nearcast.store.pointer import Pointer

STATUS_FILE = "status.json"


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model: state of its machine, its pointer, what is being installed, and the last error in words.

    `reasons`: why each release is in quarantine, by release in decimal.
    """

    state: str
    stable: int | None = None
    candidate: int | None = None
    share: float = 0.0
    last_good: int | None = None
    intent: int = 0
    goal: int | None = None
    error: str = ""
    quarantined: tuple[int, ...] = ()
    reasons: dict[str, str] = {}
    received_bytes: int = 0


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole agent. Times are wall-clock seconds since 1970; 0 = never. `peer`: where it gives chunks to others."""

    node: str
    channel: str
    mode: str
    pid: int = 0
    serial: int = 0
    checked_at: float = 0.0
    succeeded_at: float = 0.0
    error: str = ""
    clock_ok: bool = True
    clock_note: str = ""
    peer: str = ""
    models: dict[str, ModelStatus] = {}


def write_status(folder: Path, status: AgentStatus) -> None:
    """Replace the status file atomically. It is a report: losing it in a power cut is harmless, so no fsync."""
    temporary = folder / f".{STATUS_FILE}.new"
    temporary.write_bytes(msgspec.json.encode(status))
    temporary.replace(folder / STATUS_FILE)


def read_status(store: Path) -> AgentStatus | None:
    """What the agent of the store at `store` last said; None if it never did, or not to us."""
    try:
        data = (store / ".agent" / STATUS_FILE).read_bytes()
        return msgspec.json.decode(data, type=AgentStatus)
    except (OSError, msgspec.DecodeError):
        return None


def pointer_fields(pointer: Pointer) -> dict[str, Any]:
    """The fields of a pointer that the status repeats."""
    return {name: getattr(pointer, name) for name in ("stable", "candidate", "share", "last_good", "intent")}
