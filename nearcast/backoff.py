"""How long to wait before trying again. Pure."""

from __future__ import annotations

from random import Random


def full_jitter_s(attempt: int, generator: Random, *, base_s: float, max_s: float) -> float:
    """A wait in seconds before try number `attempt` (from 0): uniform in (0, min(max, base · 2^attempt)].

    "Full jitter" of Brooker, Exponential Backoff and Jitter (AWS Architecture Blog, 2015): clients that lost the same
    broker at the same moment do not come back together.
    """
    ceiling_s = min(max_s, base_s * 2.0 ** min(attempt, 32))
    return ceiling_s * (1.0 - generator.random())
