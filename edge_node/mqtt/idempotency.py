"""What to do with a request that may have come before. Pure: the ledger asks inside its transaction."""

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


@dataclass(frozen=True, slots=True)
class Position:
    """How far a stream is: the device's boot and its number in it. "" and None where the device does not count."""

    boot: str = ""
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A message that moves a stream on to `position`; the device skipped `lost` numbers before it."""

    position: Position
    lost: int = 0


def follow(last: Position, boot: str, seq: int | None) -> Step | None:
    """Judge a stream's message by how far the stream is; None if it came before.

    A message without a number is taken as it comes and moves nothing. A new boot starts a sequence of its own, and what
    was lost before its first number is not known.
    """
    if seq is None:
        return Step(last)
    if last.seq is None or boot != last.boot:
        return Step(Position(boot, seq))
    return None if seq <= last.seq else Step(Position(boot, seq), seq - last.seq - 1)


def digest_of(fields: Iterable[tuple[str, str]], payload: bytes) -> bytes:
    """32 bytes that bind a correlation to one request: SHA-256 over length-prefixed fields, then the payload."""
    pieces: list[bytes] = []
    for field in fields:
        for text in field:
            encoded = text.encode()
            pieces += (len(encoded).to_bytes(4, "big"), encoded)
    pieces.append(b"\xff\xff\xff\xff")
    state = hashlib.sha256(b"".join(pieces))
    state.update(payload)
    return state.digest()
