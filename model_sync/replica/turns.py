"""Whose turn it is at the origin. No coordinator: every node computes its own place from the names of the members."""

from __future__ import annotations

import hashlib
from collections.abc import Collection


def turns_of(node: str, members: Collection[str], sha256: str, chunks: int) -> tuple[int, ...]:
    """For each chunk, how many members come before `node` at the origin.

    All nodes put the members in the same order, by a hash with the payload's digest, and start the line for chunk `i`
    at place `i · n / chunks`: nobody coordinates, and each member is first for an equal share of the chunks.
    """
    order = sorted({*members, node}, key=lambda name: hashlib.sha256(f"{sha256}\0{name}".encode()).digest())
    place, count = order.index(node), len(order)
    return tuple((place - chunk * count // chunks) % count for chunk in range(chunks))


def neighbourhood(node: str, members: Collection[str], size_max: int) -> tuple[str, ...]:
    """The members that share an origin's first copies with `node`: all of a small mesh, one part of a large one.

    Parts come from the names alone, so that all nodes of a part agree on it while the same members are there.
    """
    parts = -(-len({*members, node}) // size_max)
    if parts <= 1:
        return tuple(sorted({*members} - {node}))

    def part(name: str) -> int:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big") * parts >> 56

    own = part(node)
    return tuple(sorted(name for name in {*members} - {node} if part(name) == own))
