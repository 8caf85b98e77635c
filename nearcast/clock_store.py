"""The durable floor of the clock."""

from __future__ import annotations

from pathlib import Path

import msgspec

from nearcast.clock import Clock
from nearcast.clock_floor import BUILD_TIME, Reading, effective_now, raise_floor
from nearcast.durable import write_file


class ClockFloor:
    """Which time to use, and never one before what was seen.

    `build_time` (seconds since 1970) is the earliest believable time; 0 = that of this release.
    """

    def __init__(self, path: Path, clock: Clock, *, build_time: int) -> None:
        self._path = path
        self._clock = clock
        self.floor = max(float(build_time or BUILD_TIME), _read(path))

    def read(self) -> Reading:
        """The time to use now."""
        return effective_now(self._clock.wall(), self.floor)

    @property
    def is_behind(self) -> bool:
        """Whether the machine's clock shows a time that has passed for certain."""
        return self._clock.wall() < self.floor

    def verified(self, reading: Reading) -> None:
        """Metadata was fresh at `reading`: time cannot fall behind it any more."""
        floor = raise_floor(self.floor, reading)
        if floor != self.floor:
            self.floor = floor
            write_file(self._path, msgspec.json.encode({"floor": floor}))


def _read(path: Path) -> float:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, float]).get("floor", 0.0)
    except (FileNotFoundError, msgspec.DecodeError):
        return 0.0
