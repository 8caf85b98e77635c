"""Is the candidate worse than stable? A test that may be looked at after every report and still keeps its promise.

Each report of a node is one *block*: so many requests of the candidate and so many of stable, in the same minutes on
the same machine, and how many of each were bad. The evidence of a block is the likelihood ratio between the rates of an
alternative and their weighted mean,

    E = (c/m)^kc ((1-c)/(1-m))^(nc-kc) (s/m)^ks ((1-s)/(1-m))^(ns-ks),    m = (nc c + ns s) / (nc + ns),    c > s.

With true rates p <= q of candidate and stable, log E[E] = nc log(1 + x(p-m)(c-m)) + ns log(1 + x(q-m)(s-m)) for
x = 1/(m(1-m)); log(1+y) <= y and nc(c-m) = -ns(s-m) make that at most x nc (c-m)(p-q) <= 0. So E is an e-value for
"the candidate is not worse", whatever the rates are in that block, and products of blocks are a supermartingale as long
as c and s were chosen before the block: by Ville's inequality they ever reach 1/alpha with probability at most alpha.
(Two-sample e-variables: Turner, Ly, Gruenwald, "Generic E-variables for exact sequential k-sample tests", 2024; the
mixture over effects is Robbins' method.) No base rate need be known, none need stay constant.

Nodes are believed about themselves alone, and not too much: see `combine`.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

STEPS = 8
"""Effects of the mixture: the smallest one worth finding and its doublings."""
TESTS = 3
"""Errors, latency, disagreement: each may raise a third of the false alarms (Bonferroni)."""
_WEIGHTS = np.array([0.5] + [0.5 / (STEPS - 1)] * (STEPS - 1))
_DOUBLINGS = 2.0 ** np.arange(STEPS)
_RATE_MAX = 0.999
_PRIOR_REQUESTS, _PRIOR_BAD = 100.0, 1.0
_NINE_IN_TEN = 1.2816
_MARGIN = 1.25
_HELD_BACK = 0.1
"""Share of a node's stake that is never risked: what it says against an alarm weighs at most a factor of ten."""


def base_rate(requests: npt.ArrayLike, bad: npt.ArrayLike) -> Array:
    """A node's own bad share of stable so far, near 1 % while it has seen little: what the next block bets on."""
    return (np.asarray(bad, float) + _PRIOR_BAD) / (np.asarray(requests, float) + _PRIOR_REQUESTS)


def evidence(
    candidate: npt.ArrayLike,
    candidate_bad: npt.ArrayLike,
    stable: npt.ArrayLike,
    stable_bad: npt.ArrayLike,
    rate: npt.ArrayLike,
    effect: float,
) -> Array:
    """Log evidence of blocks that the candidate is worse than stable, per effect of the mixture.

    Args:
        candidate: requests of the candidate in the block; arrays of one shape (...), as the three that follow.
        candidate_bad: the bad ones of these.
        stable: requests of stable in the block.
        stable_bad: the bad ones of these.
        rate: what stable's bad share is expected to be, from earlier blocks alone.
        effect: the smallest difference of the shares that is worth finding.

    Returns:
        Shape (..., STEPS); zero where one of the two had no request.
    """
    nc, kc, ns, ks = (np.asarray(one, float)[..., None] for one in (candidate, candidate_bad, stable, stable_bad))
    low = np.minimum(np.asarray(rate, float)[..., None], _RATE_MAX / 2)
    high = np.minimum(low + effect * _DOUBLINGS, _RATE_MAX)
    middle = (nc * high + ns * low) / np.maximum(nc + ns, 1.0)
    middle = np.where((nc > 0) & (ns > 0), middle, low)
    ratio = _log_ratio(nc, kc, high, middle) + _log_ratio(ns, ks, low, middle)
    return np.where((nc > 0) & (ns > 0), ratio, 0.0)


def evidence_above(requests: npt.ArrayLike, bad: npt.ArrayLike, bound: float, effect: float) -> Array:
    """Log evidence of blocks that the bad share is above `bound` in (0, 1), per effect; shape (..., STEPS)."""
    n, k = (np.asarray(one, float)[..., None] for one in (requests, bad))
    high = np.minimum(bound + effect * _DOUBLINGS, max(_RATE_MAX, (1.0 + bound) / 2))
    return _log_ratio(n, k, high, np.full_like(high, bound))


def combine(nodes: npt.ArrayLike, liars_max: int) -> Array:
    """Log evidence of a fleet from that of its nodes, shape (..., nodes, STEPS) to (...).

    A node stakes nine tenths of what it has, so that no word of it can undo more than a factor of ten. And the
    `liars_max` nodes that speak loudest for each effect do not count: what is left is at most the product of the honest
    ones, so that the false alarms stay bounded whatever so many nodes report.
    """
    staked = np.logaddexp(math.log(_HELD_BACK), math.log1p(-_HELD_BACK) + np.asarray(nodes, float))
    if liars_max > 0:
        staked = np.sort(staked, axis=-2)
        staked[..., -liars_max:, :] = np.minimum(staked[..., -liars_max:, :], 0.0)
    total = staked.sum(axis=-2)
    largest = total.max(axis=-1, keepdims=True)
    mixed: Array = largest[..., 0] + np.log((_WEIGHTS * np.exp(total - largest)).sum(axis=-1))
    return mixed


def threshold(false_alarm: float, tests: int = TESTS) -> float:
    """Log evidence at which one of `tests` alarms, so that together they raise at most `false_alarm`."""
    return math.log(tests / false_alarm)


def requests_needed(base: float, effect: float, share: float, *, nodes: int, liars_max: int) -> int:
    """Requests of the candidate at which `effect` over `base` is found in nine runs of ten; 1 % of false alarms.

    The log evidence of the right alternative is a random walk with mean mu and deviation sigma per request of the
    candidate. It starts log 2 below (its weight in the mixture), pays log(1 / 0.9) a node, and `liars_max` of the
    `nodes` do not count. The count solves mu n - 1.28 sigma sqrt(n) = threshold; a quarter comes on top, because the
    loudest node holds more than its share and the base rate is learnt on the way. `benchmarks canary` measures it.
    """
    ratio = (1.0 - share) / share
    high = base + effect
    middle = (high + ratio * base) / (1.0 + ratio)
    mu = variance = 0.0
    for weight, p in ((1.0, high), (ratio, base)):
        bad, good = math.log(p / middle), math.log((1 - p) / (1 - middle))
        mu += weight * (p * bad + (1 - p) * good)
        variance += weight * p * (1 - p) * (bad - good) ** 2
    goal = threshold(0.01) + math.log(2.0) - nodes * math.log1p(-_HELD_BACK)
    spread = _NINE_IN_TEN * math.sqrt(variance)
    root = (spread + math.sqrt(spread * spread + 4.0 * mu * goal)) / (2.0 * mu)
    return math.ceil(_MARGIN * root * root * nodes / (nodes - liars_max))


def _log_ratio(n: Array, k: Array, rate: Array, null: Array) -> Array:
    return k * np.log(rate / null) + (n - k) * np.log((1.0 - rate) / (1.0 - null))
