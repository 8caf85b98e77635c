"""Whether the event loop's thread may go before everything ordinary: only while it uses little of its core.

Pure. A loop that waits most of the time harms nobody by being first; one under a flood would starve the models and the
rest of the machine. So it begins ordinary, is first once it has shown that it uses little, and is ordinary again one
short window after it uses more. While a version is loaded it is first at once, and up to a higher share: the loader
takes all that it gets, but for milliseconds. Loads restart no window: however they come, a loop that uses more than
that share whenever it is first is first for a sixth of the time at most, and a window more.
"""

from __future__ import annotations

BUSY_SHARE = 0.4
"""Of a core, above which it is first no longer: two nodes on one core leave some of it."""
QUIET_SHARE = 0.2
"""Below which it is first again; less than the other, so that a load between the two changes nothing."""
LOADING_SHARE = 0.8
"""Above which it is first no longer while a version is loaded: the rest is for that and for the models. After a window
above it no load makes it first for `ORDINARY_WINDOW_S`."""
FIRST_WINDOW_S = 0.2
"""How often a loop that is first is looked at: for so long can a flood keep others from the core. Five times a second
costs an idle node 0.05 % of a core."""
ORDINARY_WINDOW_S = 1.0
"""How long an ordinary one must be quiet: a flood that comes and goes is first a sixth of the time at most."""
ORDINARY_WINDOW_S_MAX = 32.0
"""Twice as long each time that it did not stay quiet for one window as the first: what gets little is not quiet."""
_EARLY_S = 0.002
"""So much before its time can a timer fire."""


class LoopRank:
    """Looked at after each `window_s`. Args: the instant, and the processor time that the thread has used so far.

    Attributes:
        is_first: whether it may go before everything ordinary.
        share: of a core, in the last window.
    """

    __slots__ = (
        "_allowed_s",
        "_first_s",
        "_first_used_s",
        "_is_loading",
        "_is_quiet",
        "_lend_from",
        "_looked",
        "_looked_used_s",
        "_now",
        "_ordinary_s",
        "_used_s",
        "is_first",
        "share",
    )

    def __init__(self, now: float, used_s: float) -> None:
        self._now = self._looked = self._lend_from = now
        self._used_s = self._looked_used_s = used_s
        self._ordinary_s = ORDINARY_WINDOW_S
        self._first_s = self._first_used_s = self._allowed_s = 0.0  # as the first, since that was judged
        self._is_quiet = False  # first without any load
        self._is_loading = False
        self.is_first = False
        self.share = 0.0

    @property
    def window_s(self) -> float:
        """When to look again, from the last call on."""
        first_s = FIRST_WINDOW_S - self._first_s if self.is_first else ORDINARY_WINDOW_S_MAX
        ordinary_s = ORDINARY_WINDOW_S_MAX if self._is_quiet else self._ordinary_s - (self._now - self._looked)
        return min(first_s, ordinary_s)

    def look(self, now: float, used_s: float) -> bool:
        """Judge the windows that are over; whether `is_first` has changed."""
        was_first = self.is_first
        elapsed_s, spent_s = now - self._now, used_s - self._used_s
        self._now, self._used_s = now, used_s
        if was_first:
            self._first_s += elapsed_s
            self._first_used_s += spent_s
            self._allowed_s += elapsed_s * (LOADING_SHARE if self._is_loading else BUSY_SHARE)
        if self._first_s >= FIRST_WINDOW_S - _EARLY_S:
            self._judge_first()
        if not self._is_quiet and now - self._looked >= self._ordinary_s - _EARLY_S:
            self._judge_ordinary()
        return self.is_first is not was_first

    def begin_load(self, now: float, used_s: float) -> None:
        """First from now on, until `end_load` or until it uses too much even for that; not soon after it did."""
        self.look(now, used_s)
        self._is_loading = True
        self.is_first = self.is_first or self._may_lend()

    def end_load(self, now: float, used_s: float) -> None:
        """First only if it is quiet. The window goes on with the next load."""
        self.look(now, used_s)
        self._is_loading = False
        self.is_first = self._is_quiet

    def _judge_first(self) -> None:
        self.share = self._first_used_s / self._first_s
        stays = self._first_used_s <= self._allowed_s
        self._first_s = self._first_used_s = self._allowed_s = 0.0
        if stays:
            if self._is_quiet and self.share <= BUSY_SHARE:
                self._ordinary_s = ORDINARY_WINDOW_S
            return
        if self.share > LOADING_SHARE:
            self._lend_from = self._now + ORDINARY_WINDOW_S
        self._is_quiet = False
        self.is_first = self._is_loading and self._may_lend()
        self._looked, self._looked_used_s = self._now, self._used_s

    def _judge_ordinary(self) -> None:
        self.share = (self._used_s - self._looked_used_s) / (self._now - self._looked)
        self._looked, self._looked_used_s = self._now, self._used_s
        if self.share <= QUIET_SHARE:
            self._is_quiet = self.is_first = True
            # Doubled beforehand, for if it does not last.
            self._ordinary_s = min(ORDINARY_WINDOW_S_MAX, 2 * self._ordinary_s)
        elif self._is_loading and self.share <= LOADING_SHARE:
            self.is_first = self.is_first or self._may_lend()

    def _may_lend(self) -> bool:
        return self._now >= self._lend_from - _EARLY_S
