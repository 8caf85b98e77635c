"""How long a model runs on a target, by the size of the request and by the load that it met there."""

from __future__ import annotations

from router.policy.config import PolicyConfig
from router.policy.window import Window

_SAMPLES_MIN = 8
_SAMPLES_FEW = 4
_FLOOR_RISE_PER_S = 0.02
_TAIL_FACTOR = 2.0


class Service:
    """How long one version runs for one size of request, seen from here: from the last byte there to the answer.

    Two windows, as Prequal does by load at arrival: with a slot free then, waiting for a batch included; and without,
    less the queue. `floor_s` is the best it has been; that memory fades in about a minute. `best_s` is the same of
    medians of enough samples alone: what a few lucky ones say is no measure for those that follow. `guessed`: there
    never were enough samples for a 95th percentile.
    """

    __slots__ = ("best_s", "busy", "floor_s", "free", "guessed", "p50_s", "p95_s")

    def __init__(self, config: PolicyConfig) -> None:
        age_s, pause_s = config.window_age_ms_max / 1e3, config.forgive_ms / 1e3
        self.free = Window(size=config.window_size, age_max_s=age_s, pause_s=pause_s)
        self.busy = Window(size=config.window_size, age_max_s=age_s, pause_s=pause_s)
        self.p50_s = self.p95_s = self.floor_s = self.best_s = 0.0
        self.guessed = True

    def add(self, now: float, value_s: float, waiting: float) -> bool:
        """Take a sample of when `waiting` more were there than slots; True if it ended what was known before."""
        mine, other = (self.busy, self.free) if waiting > 0.0 else (self.free, self.busy)
        changed = mine.add(now, value_s)
        if changed:
            other.clear()
        return changed

    def estimate(self, elapsed_s: float) -> bool:
        """Renew median and 95th percentile; False if nothing has ever been measured."""
        ordered = self.free.ordered
        count = len(ordered)
        if count >= _SAMPLES_MIN or count >= len(self.busy.ordered):
            window = self.free
        else:
            window = self.busy
            ordered = window.ordered
            count = len(ordered)
        if count >= _SAMPLES_MIN:
            # What `quantile` says, without the calls: a row is settled for every other answer.
            self.p50_s, self.p95_s = ordered[count // 2], ordered[19 * count // 20]
            self.guessed = False
            best = self.best_s or self.p50_s
            self.best_s = min(self.p50_s, best + _FLOOR_RISE_PER_S * elapsed_s * (self.p50_s - best))
        elif count:
            ratio = self.p95_s / self.p50_s if self.p50_s > 0.0 else _TAIL_FACTOR
            # Of very few the smallest: the first may have waited for what is made only once.
            self.p50_s = window.quantile(0.5 if count >= _SAMPLES_FEW else 0.0)
            self.p95_s = max(window.quantile(0.95), self.p50_s * ratio)
        if count:
            p50 = self.p50_s
            floor = self.floor_s or p50
            floor += _FLOOR_RISE_PER_S * elapsed_s * (p50 - floor)
            if floor > p50:
                floor = p50
            self.floor_s = floor
        return self.p50_s > 0.0

    def crowding_s(self) -> tuple[float, float]:
        """How much longer median and 95th percentile are when every slot is busy."""
        free, busy = self.free, self.busy
        if len(busy.ordered) < _SAMPLES_MIN or len(free.ordered) < _SAMPLES_MIN:
            return 0.0, 0.0
        middle = max(0.0, busy.quantile(0.5) - free.quantile(0.5))
        return middle, max(middle, busy.quantile(0.95) - free.quantile(0.95))
