"""A fleet that lost its controller for half an hour: how its requests come back, by the agent's own rule for pauses."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from random import Random

from model_sync.replica.pause import check_pause_s, hint_pause_s

BUCKET_S = 0.25
CHECK_REQUESTS = 2
"""A check that finds nothing new asks for the next root and for the timestamp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HerdSpec:
    """The setting; seconds. `waiters_max` long polls are open at a time, the rest is refused with `retry_s`."""

    agents: int = 100_000
    poll_s: float = 30.0
    hint_wait_s: float = 25.0
    hint_cap_s: float = 30.0
    waiters_max: int = 10_000
    retry_s: float = 5.0
    outage_s: float = 1_800.0
    observed_s: float = 600.0
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class HerdResult:
    """Requests per second after the outage: the fullest second, and the mean."""

    peak_per_s: float
    mean_per_s: float


def simulate_herd(spec: HerdSpec) -> HerdResult:
    """Each agent checks and long-polls by itself; until `outage_s` every request fails at once."""
    draw = Random(spec.seed).random
    end_s = spec.outage_s + spec.observed_s
    buckets: list[list[int]] = [[] for _ in range(int(end_s / BUCKET_S) + 1)]
    failures = array("H", bytes(2 * 2 * spec.agents))  # checks, then long polls
    requests = [0] * (int(spec.observed_s) + 1)
    waiting: list[int] = [0] * (len(buckets) + int(spec.hint_wait_s / BUCKET_S) + 1)
    open_polls = 0
    for loop in range(2 * spec.agents):
        buckets[int(min(spec.poll_s * draw(), end_s) / BUCKET_S)].append(loop)
    for index, due in enumerate(buckets):
        now = index * BUCKET_S
        is_up = now >= spec.outage_s
        open_polls -= waiting[index]
        for loop in due:
            is_check = loop < spec.agents
            refused = not is_up or (not is_check and open_polls >= spec.waiters_max)
            failures[loop] = min(failures[loop] + 1, 1_000) if refused else 0
            if is_up:
                requests[int(now - spec.outage_s)] += CHECK_REQUESTS if is_check else 1
            if is_check:
                pause_s = check_pause_s(draw, poll_s=spec.poll_s, failures=failures[loop])
            elif refused:
                asked_s = spec.retry_s if is_up else 0.0
                pause_s = hint_pause_s(draw, failures=failures[loop], cap_s=spec.hint_cap_s, retry_s=asked_s)
            else:
                pause_s = spec.hint_wait_s
                open_polls += 1
                waiting[index + int(pause_s / BUCKET_S)] += 1
            after = max(index + 1, int((now + BUCKET_S * draw() + pause_s) / BUCKET_S))
            if after < len(buckets):
                buckets[after].append(loop)
        due.clear()
    whole = requests[: int(spec.observed_s)]
    return HerdResult(peak_per_s=max(whole), mean_per_s=sum(whole) / len(whole))
