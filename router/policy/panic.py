"""When ejections are to be ignored: too few targets of a tier are left, and the other tiers cannot take its load.

Envoy's rule: a tier counts as whole while 1 / 1.4 of it is healthy; only where all tiers together do not make one whole
tier, those with less than half of their targets healthy use the others, too. A dead sinkhole beside a healthy cloud
therefore stays set aside.
"""

from __future__ import annotations

from collections.abc import Mapping

_OVERPROVISIONING = 1.4
_HEALTHY_MIN = 0.5


def tiers_in_panic(healthy: Mapping[str, int], total: Mapping[str, int]) -> frozenset[str]:
    """The tiers whose ejections are ignored, from the healthy and all targets of each."""
    shares = {tier: healthy.get(tier, 0) / count for tier, count in total.items() if count}
    if sum(min(1.0, _OVERPROVISIONING * share) for share in shares.values()) >= 1.0:
        return frozenset()
    return frozenset(tier for tier, share in shares.items() if share < _HEALTHY_MIN)
