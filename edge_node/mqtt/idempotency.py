"""What to do with a request that may have come before. Pure: the inbox asks inside its transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["pending", "done"]
Verdict: TypeAlias = Literal["accept", "pending", "replay", "conflict", "full"]


@dataclass(frozen=True, slots=True)
class Known:
    """What the inbox remembers under one (tenant, device, correlation)."""

    digest: bytes
    state: State


def decide(known: Known | None, digest: bytes, *, has_room: bool) -> Verdict:
    """Judge a request by what is remembered under its key.

    Returns:
        `accept`: never seen, or forgotten; execute it. `full`: the same, but there is no room for it. `pending`: it
        runs already and its one answer will come. `replay`: answered before; send the same answer. `conflict`: the
        key belongs to a different request.
    """
    if known is None:
        return "accept" if has_room else "full"
    if known.digest != digest:
        return "conflict"
    return "replay" if known.state == "done" else "pending"


def digest_of(fields: Iterable[tuple[str, str]], payload: bytes) -> bytes:
    """32 bytes that bind a correlation to one request: SHA-256 over length-prefixed fields, then the payload."""
    state = hashlib.sha256()
    for name, value in fields:
        for text in (name.encode(), value.encode()):
            state.update(len(text).to_bytes(4, "big"))
            state.update(text)
    state.update(b"\xff\xff\xff\xff")
    state.update(payload)
    return state.digest()
