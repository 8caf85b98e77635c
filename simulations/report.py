"""What a run says: percentiles, the share inside the objective, and the hash that proves which run it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy in one scenario. Latencies in ms; shares in [0, 1]; a refusal misses the objective."""

    policy: str
    requests: int
    refused: int
    p50_ms: float
    p99_ms: float
    slo_share: float
    slo_share_in_fault: float
    hedge_share: float
    trace_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One scenario: the same seed for every policy."""

    scenario: str
    seed: int
    slo_ms: float
    policies: tuple[PolicyResult, ...]


def quantile(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of values in rising order; NaN of none."""
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
