"""What runs say, and how sure it is: percentiles of each replication, their mean, 95 % intervals across them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulations.experiment import Run
from simulations.scenario import Scenario

HEDGE_WINDOW_S = 10.0
_T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_975_LAST = 1.96
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The mean over all replications, and half the width of its 95 % interval (NaN from one replication)."""

    value: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.value:.1f}" if math.isnan(self.half_width) else f"{self.value:.1f} ±{self.half_width:.1f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One policy in one scenario over some seeds. Times in ms, infinite where that many requests had no answer."""

    scenario: str
    policy: str
    seeds: tuple[int, ...]
    requests: int
    unanswered: int
    p50_ms: Estimate
    p99_ms: Estimate
    p999_ms: Estimate
    slo_share: Estimate
    slo_share_in_fault: float
    hedge_share: float
    hedge_share_max: float
    codes: dict[str, int]
    trace_hash: str


def summarize(scenario: Scenario, runs: Sequence[Run]) -> Summary:
    """Runs of one policy in one scenario, one per seed. `trace_hash` is that of the first."""
    latency_ms = np.concatenate([run.latency_s for run in runs]) * 1e3
    codes: dict[str, int] = {}
    for run in runs:
        for code, count in run.codes.items():
            codes[code] = codes.get(code, 0) + count
    begin_s, end_s = fault_span_s(scenario)
    in_fault = np.concatenate([run.latency_s[(run.at_s >= begin_s) & (run.at_s < end_s)] for run in runs]) * 1e3
    hedges = [hedge_shares(run, scenario) for run in runs]
    return Summary(
        scenario=scenario.name,
        policy=runs[0].policy,
        seeds=tuple(run.seed for run in runs),
        requests=len(latency_ms),
        unanswered=int(np.isinf(latency_ms).sum()),
        p50_ms=_percentile(runs, 0.50),
        p99_ms=_percentile(runs, 0.99),
        p999_ms=_percentile(runs, 0.999),
        slo_share=estimate([float(np.mean(run.latency_s * 1e3 <= scenario.slo_ms)) for run in runs]),
        slo_share_in_fault=float(np.mean(in_fault <= scenario.slo_ms)) if len(in_fault) else math.nan,
        hedge_share=sum(count for count, _, _ in hedges) / max(1, len(latency_ms)),
        hedge_share_max=max(worst for _, _, worst in hedges),
        codes=codes,
        trace_hash=runs[0].trace_hash,
    )


def fault_span_s(scenario: Scenario) -> tuple[float, float]:
    """The windows of the first fault, from its first begin to its last end; nothing without faults."""
    if not scenario.faults:
        return 0.0, 0.0
    windows = scenario.faults[0].windows_s
    return windows[0][0], windows[-1][1]


def hedge_shares(run: Run, scenario: Scenario) -> tuple[int, float, float]:
    """Hedges sent, as a share of the requests that count, and the worst share in any window of ten seconds."""
    hedged = np.array([at for at, _, kind in run.sends if kind == "hedge" and at >= scenario.warmup_s])
    worst = 0.0
    for start in np.arange(scenario.warmup_s, scenario.duration_s - HEDGE_WINDOW_S + 0.5, 0.5):
        asked = np.searchsorted(run.at_s, start + HEDGE_WINDOW_S) - np.searchsorted(run.at_s, start)
        copied = np.searchsorted(hedged, start + HEDGE_WINDOW_S) - np.searchsorted(hedged, start)
        worst = max(worst, float(copied / max(1, asked)))
    return len(hedged), len(hedged) / max(1, len(run.at_s)), worst


def send_share(runs: Iterable[Run], node: str, from_s: float, to_s: float) -> float:
    """Share of all sends between two instants that went to one node."""
    here = every = 0
    for run in runs:
        for at, name, _ in run.sends:
            if from_s <= at < to_s:
                every += 1
                here += name == node
    return here / max(1, every)


def recovery_s(runs: Sequence[Run], scenario: Scenario, end_s: float, *, window_s: float = 1.0) -> float:
    """Seconds from the end of a fault until the objective is met as before it, by windows over all replications.

    The first window of `window_s`, moved by a tenth of that, whose share inside the objective is no less than in the
    undisturbed time before the first fault, less one and a half standard errors of such a window. Counts
    from `end_s` to the begin of that window; infinite if there is none.
    """
    at = np.concatenate([run.at_s for run in runs])
    met = np.concatenate([run.latency_s for run in runs]) * 1e3 <= scenario.slo_ms
    begin_s = fault_span_s(scenario)[0]
    normal = float(np.mean(met[(at >= scenario.warmup_s) & (at < begin_s)]))
    for start in np.arange(end_s, scenario.duration_s - window_s, window_s / 10):
        inside = (at >= start) & (at < start + window_s)
        slack = 1.5 * math.sqrt(normal * (1.0 - normal) / max(1, int(inside.sum())))
        if inside.any() and float(np.mean(met[inside])) >= normal - slack:
            return float(start - end_s)
    return math.inf


def estimate(replications: Sequence[float]) -> Estimate:
    """The mean with Student's 95 % interval across replications. One infinite replication makes it infinite."""
    count = len(replications)
    value = float(np.mean(replications))
    if count < 2 or not all(map(math.isfinite, replications)):
        return Estimate(value=value, half_width=math.nan)
    t = _T_975[count - 2] if count - 2 < len(_T_975) else _T_975_LAST
    return Estimate(value=value, half_width=t * float(np.std(replications, ddof=1)) / math.sqrt(count))


def quantile(ordered: Sequence[float] | Floats, q: float) -> float:
    """The nearest-rank quantile of values in rising order; NaN of none."""
    if not len(ordered):
        return float("nan")
    return float(ordered[min(len(ordered) - 1, int(q * len(ordered)))])


def _percentile(runs: Sequence[Run], q: float) -> Estimate:
    return estimate([quantile(np.sort(run.latency_s), q) * 1e3 for run in runs])
