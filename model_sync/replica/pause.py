"""How long an agent waits before it asks again. Full jitter after the cap: who was offline together returns spread out.

Source: M. Brooker, "Exponential backoff and jitter", AWS Architecture Blog, 2015; the jitter comes after the cap,
because after a long outage the whole fleet stands at the cap.
"""

from __future__ import annotations

from collections.abc import Callable

PAUSE_S_MIN = 0.05
DOUBLINGS_MAX = 16


def check_pause_s(
    draw: Callable[[], float], *, poll_s: float, failures: int = 0, backoff_base_s: float = 1.0, retry_s: float = 0.0
) -> float:
    """Seconds to the next check: `poll_s` on average, less after the first failures, `retry_s` more if asked to wait.

    `draw` gives uniform numbers in [0, 1).
    """
    span = 2.0 * poll_s
    if failures:
        span = min(span, backoff_base_s * 2.0 ** min(failures, DOUBLINGS_MAX))
    return max(PAUSE_S_MIN, retry_s + span * draw())


def hint_pause_s(draw: Callable[[], float], *, failures: int, cap_s: float, retry_s: float = 0.0) -> float:
    """Seconds to the next long poll after `failures` in a row."""
    return max(PAUSE_S_MIN, retry_s + min(cap_s, 2.0 ** min(failures, DOUBLINGS_MAX)) * draw())
