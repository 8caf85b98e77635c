"""What each candidate costs: two small functions over plain numbers, the hot path of the whole mesh.

They read parallel arrays (the columns of `Candidates`) and write one, so that CPython runs them fast on lists and
`numba.njit` compiles them unchanged for arrays: the live router and a fast simulator can decide by the same code.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

INFINITY = float("inf")


def score(
    size_bytes: float, limit_s: float, toll: float, queues: Sequence[float], places: Sequence[int],
    base95: Sequence[float], cost: Sequence[float], drain: Sequence[float], crowding: Sequence[float],
    crowding95: Sequence[float], s_per_byte: Sequence[float], hot_above: Sequence[float],
    costs: MutableSequence[float],
) -> tuple[int, int, bool]:  # fmt: skip
    """Cost every candidate and find the two best. Times are seconds.

    Constraints come first: who cannot answer within `limit_s` at the 95th percentile, or is hot (Prequal's rule:
    Wydrowski et al., NSDI 2024), costs infinity.

    Args:
        size_bytes: of the request.
        limit_s: finite; a candidate whose `base95` is infinite is never chosen.
        toll: what a second of waiting in a queue costs on top, because whoever waits also delays those behind.
        queues: by target: how many more requests it has, this one included, than it runs at the same time.
        places: by candidate, as all that follows: the index of its target in `queues`.
        base95: 95th percentile of the answer of an idle target to an empty message.
        cost: what that answer costs: median, tail, price, quality and errors, in seconds.
        drain: what each request in the queue adds.
        crowding: what the median takes longer than that where no slot is free.
        crowding95: what the 95th percentile takes longer.
        s_per_byte: of the way there.
        hot_above: the length of the queue, never negative, above which the target is hot; infinite = never.
        costs: is filled with the cost of each candidate.

    Returns:
        The indices of the cheapest and the second cheapest (-1 = none), and whether a hot one was left out.
    """
    infinity = best = second = INFINITY
    best_at = second_at = -1
    skipped = False
    for i in range(len(places)):
        total = t95 = size_bytes * s_per_byte[i]
        queue = queues[places[i]]
        if queue > 0.0:
            wait = queue * drain[i]
            t95 += wait + crowding95[i]
            total += wait + wait * toll + crowding[i]
            if queue > hot_above[i] and base95[i] + t95 <= limit_s:
                skipped = True
                costs[i] = infinity
                continue
        if base95[i] + t95 > limit_s:
            costs[i] = infinity
        else:
            costs[i] = total = total + cost[i]
            if total < second:
                if total < best:
                    second = best
                    second_at = best_at
                    best = total
                    best_at = i
                else:
                    second = total
                    second_at = i
    return best_at, second_at, skipped


def draw(
    costs: Sequence[float], bound: float, queues: Sequence[float], places: Sequence[int], slots: Sequence[float],
    first: float, second: float,
) -> int:  # fmt: skip
    """Two of those that cost at most `bound`, drawn in proportion to their slots; of the two, the shorter queue.

    Power of two choices (Mitzenmacher, 2001) among near ties only: nobody herds on a stale minimum, and a far target
    is never sampled for its own sake. `first` and `second` are uniform in [0, 1); -1 = nobody costs so little.
    """
    weight = 0.0
    for i in range(len(costs)):
        if costs[i] <= bound:
            weight += slots[i]
    a = b = last = -1
    at_a = first * weight
    at_b = second * weight
    passed = 0.0
    for i in range(len(costs)):
        if costs[i] <= bound:
            passed += slots[i]
            last = i
            if a < 0 and at_a < passed:
                a = i
            if b < 0 and at_b < passed:
                b = i
    if last < 0:
        return -1
    if a < 0:
        a = last
    if b < 0:
        b = last
    return a if queues[places[a]] * slots[b] <= queues[places[b]] * slots[a] else b
