"""Which failures of the mesh a request outlasts, and when it is tried again. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_node.mqtt.limits import RequestLimits
from nearcast.backoff import full_jitter_s
from nearcast.errors import Code, MeshError

if TYPE_CHECKING:
    from random import Random


class Patience:
    """Decides for requests whose model nobody can be asked for now: a link is down, not a model missing.

    Args:
        limits: bounds of the waits, and of those that wait.
        generator: of the jitter: when the link is back, not all ask in the same moment.
    """

    def __init__(self, limits: RequestLimits, generator: Random) -> None:
        self._limits = limits
        self._generator = generator
        self.waiting = 0
        """Requests that wait now. They hold no slot: what the node itself can answer goes on."""

    def wait_s(
        self, error: MeshError, attempt: int, remaining_s: float, *, is_missed: bool, is_safe: bool
    ) -> float | None:
        """Seconds until the next try, or None = this error is the answer.

        The last try is made so early that its error still reaches the device before its deadline.

        Args:
            error: of the last try.
            attempt: how many tries there were before it.
            remaining_s: until the deadline.
            is_missed: the model is not known now, but was, or the mesh cannot be seen: it may come back.
            is_safe: running it twice does no harm.
        """
        limits = self._limits
        is_away = error.code is Code.UNAVAILABLE or (error.code is Code.MODEL_NOT_FOUND and is_missed)
        if not is_away or (error.sent and not is_safe) or self.waiting >= limits.outlasting_max:
            return None
        left_s = remaining_s - limits.answer_margin_s
        if left_s <= 0.0:
            return None
        base_s, max_s = limits.outlast_base_s, limits.outlast_max_s
        return min(left_s, full_jitter_s(attempt, self._generator, base_s=base_s, max_s=max_s))
