"""Which time to believe. A gateway without a battery boots in 1970, where no signature has expired yet.

The rule is `now = max(clock, floor)`: the floor is durable and never falls. A clock far in the future is not believed
either: it would condemn fresh metadata, so the node serves on and installs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

AHEAD_S_MAX = 5 * 365.25 * 86_400.0
"""A clock this many seconds beyond the floor is called wrong: a node in a drawer for longer joins again."""
BUILD_TIME = 1_767_225_600
"""2026-01-01: no release of this code is older."""
FLOOR_STEP_S = 3600.0
"""The stored floor rises in steps of at least this, to spare the flash."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The time to use, in seconds since 1970, whether to act on it, and in words what is wrong with the clock."""

    now: float
    trusted: bool = True
    reason: str = ""


def effective_now(clock: float, floor: float) -> Reading:
    """The time against which metadata expires. Both arguments in seconds since 1970."""
    if clock < floor:
        return Reading(
            now=floor,
            reason="The clock of this node is behind the time it has seen already; it uses that time for signatures. "
            "Set the clock: until then other nodes and this one refuse each other's certificates.",
        )
    if clock > floor + AHEAD_S_MAX:
        return Reading(
            now=floor,
            trusted=False,
            reason="The clock of this node is years ahead of the time it has seen; it serves on and installs nothing. "
            "Set the clock.",
        )
    return Reading(now=clock)


def raise_floor(floor: float, reading: Reading) -> float:
    """The floor after metadata verified at `reading`: higher by at least an hour, or unchanged."""
    if reading.trusted and reading.now >= floor + FLOOR_STEP_S:
        return reading.now
    return floor
