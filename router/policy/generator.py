"""A seeded generator of the policy's own, because the pure part draws from nothing global."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_SCALE = 2.0**-53


class SplitMix:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): 64 bits of `state`, good enough to break ties."""

    __slots__ = ("state",)

    def __init__(self, seed: int) -> None:
        self.state = seed & _MASK

    def random(self) -> float:
        """The next number in [0, 1)."""
        self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((z ^ (z >> 31)) >> 11) * _SCALE
