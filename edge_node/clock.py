"""The clock of a node that may boot in 1970: what is certain about the time."""

from __future__ import annotations

from pathlib import Path

from nearcast.clock import Clock
from nearcast.clock_store import ClockFloor


def open_clock(data_dir: Path, clock: Clock) -> ClockFloor:
    """The floor under a node's clock: this release, what the node has seen, and what its agent has verified."""
    verified = ClockFloor(data_dir / "models" / ".agent" / "clock.json", clock, build_time=0).floor
    return ClockFloor(data_dir / "clock.json", clock, build_time=int(verified))
