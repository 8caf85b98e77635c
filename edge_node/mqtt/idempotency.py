"""What to do with a request that may have come before. Pure: the ledger asks inside its transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

BOOTS_MAX = 4
"""Boots of its device that a stream remembers."""
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


class Position(NamedTuple):
    """How far a stream is in one boot of its device."""

    boot: str
    seq: int


@dataclass(frozen=True, slots=True)
class Step:
    """A message that moves a stream on to `positions`; the device skipped `lost` numbers before it."""

    positions: tuple[Position, ...]
    lost: int = 0


def follow(known: tuple[Position, ...], boot: str, seq: int | None) -> Step | None:
    """Judge a stream's message by how far the stream is; None if it came before.

    A message without a number is taken as it comes and moves nothing. A new boot starts a sequence of its own, and what
    was lost before its first number is not known. What is left of a former boot may come later: a broker that does not
    know that it was taken sends it again, and before what followed it. `known` are the positions in the boots that are
    remembered, the newest boot first.
    """
    if seq is None:
        return Step(known)
    last = next((position for position in known if position.boot == boot), None)
    moved = Position(boot, seq)
    if last is None:
        return Step((moved, *known)[:BOOTS_MAX])
    if seq <= last.seq:
        return None
    return Step(tuple(moved if position is last else position for position in known), seq - last.seq - 1)


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
