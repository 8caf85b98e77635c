"""Whether the event loop's thread may go before everything ordinary: only while it uses little of its core.

Pure. A loop that waits most of the time harms nobody by being first; one under a flood would starve the models and the
rest of the machine. So it begins ordinary, is first once it has shown that it uses little, and is ordinary again one
short window after it uses more. While a version is loaded it is first at once, and up to a higher share: the loader
takes all that it gets, but for milliseconds.
"""

from __future__ import annotations

BUSY_SHARE = 0.4
"""Of a core, above which it is first no longer: two nodes on one core leave some of it."""
QUIET_SHARE = 0.2
"""Below which it is first again; less than the other, so that a load between the two changes nothing."""
LOADING_SHARE = 0.8
"""Above which it is first no longer while a version is loaded: the rest is for that and for the models."""
FIRST_WINDOW_S = 0.2
"""How often a loop that is first is looked at: for so long can a flood keep others from the core. Five times a second
costs an idle node 0.05 % of a core."""
ORDINARY_WINDOW_S = 1.0
"""How long an ordinary one must be quiet: a flood that comes and goes is first a sixth of the time at most."""
ORDINARY_WINDOW_S_MAX = 32.0
"""Twice as long each time that it did not stay quiet for one window as the first: what gets little is not quiet."""


class LoopRank:
    """Looked at after each `window_s`. Args: the instant, and the processor time that the thread has used so far.

    Attributes:
        is_first: whether it may go before everything ordinary.
        share: of a core, in the last window.
    """

    __slots__ = ("_looked", "_ordinary_s", "_used_s", "_was_first", "is_first", "share")

    def __init__(self, now: float, used_s: float) -> None:
        self._looked = now
        self._used_s = used_s
        self._ordinary_s = ORDINARY_WINDOW_S
        self._was_first: bool | None = None  # before the load that goes on
        self.is_first = False
        self.share = 0.0

    @property
    def window_s(self) -> float:
        """When to look again."""
        return FIRST_WINDOW_S if self.is_first else self._ordinary_s

    def look(self, now: float, used_s: float) -> bool:
        """Judge the time since the last look; whether `is_first` has changed."""
        if now <= self._looked:
            return False
        was_first, is_loading = self.is_first, self._was_first is not None
        self.share = (used_s - self._used_s) / (now - self._looked)
        self._looked, self._used_s = now, used_s
        self.is_first = self.share <= (LOADING_SHARE if is_loading else BUSY_SHARE if was_first else QUIET_SHARE)
        if self.is_first and not is_loading:
            # Doubled beforehand, for if it does not last.
            self._ordinary_s = ORDINARY_WINDOW_S if was_first else min(ORDINARY_WINDOW_S_MAX, 2 * self._ordinary_s)
        return self.is_first is not was_first

    def begin_load(self, now: float, used_s: float) -> None:
        """First from now on, until `end_load` or until it uses too much even for that."""
        self._looked, self._used_s = now, used_s
        self._was_first, self.is_first = self.is_first, True

    def end_load(self, now: float, used_s: float) -> None:
        """As before; what it used meanwhile says nothing about how quiet it is."""
        self._looked, self._used_s = now, used_s
        self.is_first, self._was_first = self.is_first and self._was_first is True, None
