"""How long to wait before trying again. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random


def full_jitter_s(attempt: int, generator: Random, *, base_s: float, max_s: float) -> float:
    """A wait in seconds before try number `attempt` (from 0): uniform in (0, min(max, base · 2^attempt)].

    "Full jitter" of Brooker, Exponential Backoff and Jitter (AWS Architecture Blog, 2015): clients that lost the same
    broker at the same moment do not come back together.
    """
    ceiling_s = min(max_s, base_s * 2.0 ** min(attempt, 32))
    return ceiling_s * (1.0 - generator.random())


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconnectLimits:
    """How soon a connection is made again.

    Attributes:
        base_s, max_s: full jitter over an exponential.
        stable_s: a connection that lived this long was no flap: the next wait is the shortest again.
    """

    base_s: float = 0.2
    max_s: float = 10.0
    stable_s: float = 5.0


class Reconnects:
    """The waits between one party's connections.

    Args:
        limits: bounds.
        generator: of the jitter.
    """

    def __init__(self, limits: ReconnectLimits, generator: Random) -> None:
        self._limits = limits
        self._generator = generator
        self.attempt = 0
        """Connections in a row that were not had, or not for long."""

    def wait_s(self, lived_s: float) -> float:
        """How long to wait behind a connection that lived so long; 0 = it was never had."""
        limits = self._limits
        self.attempt = 0 if lived_s > limits.stable_s else self.attempt + 1
        return full_jitter_s(self.attempt, self._generator, base_s=limits.base_s, max_s=limits.max_s)
