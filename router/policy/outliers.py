"""Healthy but slow: who answers far slower than its like, or than it used to, is set aside for a while.

Error counts do not see such a target. A standard score needs a crowd, and an edge site has one to four nodes: with
fewer than three of the same tier a target is measured against the best that it has been itself. What a target costs
is part of every choice anyway, so only the extreme is set aside, and never more than a share of a model's targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

_CROWD = 3
_MAD_TO_SIGMA = 1.4826
_SIGMA_MIN = 0.25
"""In logarithms: a quarter either way is nothing special among equal machines."""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How fast one target answers for one version: the median now and the best that it has been; seconds."""

    tier: str
    p50_s: float
    best_s: float
    set_aside: bool = False


def scores(paces: Sequence[Pace]) -> list[float]:
    """The robust standard score of each target's median, in logarithms: against its tier, or against its own past.

    A median and its absolute deviations, as one slow target must not hide another (Iglewicz and Hoaglin, 1993).
    """
    by_tier: dict[str, list[float]] = {}
    for pace in paces:
        by_tier.setdefault(pace.tier, []).append(math.log(pace.p50_s))
    found: list[float] = []
    for pace in paces:
        value = math.log(pace.p50_s)
        crowd = by_tier[pace.tier]
        if len(crowd) < _CROWD:
            found.append((value - math.log(pace.best_s)) / _SIGMA_MIN)
            continue
        middle = _median(crowd)
        sigma = max(_SIGMA_MIN, _MAD_TO_SIGMA * _median([abs(other - middle) for other in crowd]))
        found.append((value - middle) / sigma)
    return found


def slow(paces: Sequence[Pace], *, score_max: float, share_max: float) -> list[int]:
    """Which targets to set aside now, the slowest first: beyond `score_max`, at most `share_max` of all at a time."""
    room = int(share_max * len(paces)) - sum(pace.set_aside for pace in paces)
    found = [(score, i) for i, score in enumerate(scores(paces)) if score > score_max and not paces[i].set_aside]
    return [i for _, i in sorted(found, reverse=True)[: max(0, room)]]


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2.0
