"""Which nodes install a candidate. No coordinator: every node computes its own place from its name and the salt."""

from __future__ import annotations

import hashlib


def seed(node: str, salt: str) -> float:
    """The place of a node in a rollout, uniform in [0, 1) over nodes and independent between salts."""
    digest = hashlib.sha256(f"wave\0{salt}\0{node}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def in_wave(node: str, salt: str, wave: float) -> bool:
    """Whether the node belongs to the wave. A larger wave of the same rollout contains every smaller one."""
    return seed(node, salt) < wave
