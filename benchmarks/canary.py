"""How fast a bad candidate is found, and how often a good one is stopped: simulated fleets, the real sequential test.

Ten nodes report a hundred times each; a tenth of the requests goes to the candidate, and after every report the test is
looked at, as the controller does. One node in ten may lie (`failed_nodes` = 2), so the loudest one never counts.

Stated counts: +0.5 percentage points of errors are found, in at least nine runs of ten, within 12 500 requests of the
candidate where stable fails 0.5 %, and within 21 500 where it fails 1 % (`sequential.requests_needed` derives them).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.rows import Row
from model_sync.rollout.sequential import (
    STEPS,
    base_rate,
    combine,
    evidence,
    evidence_above,
    requests_needed,
    threshold,
)
from model_sync.rollout.trial import TrialLimits

NODES, REPORTS, SHARE = 10, 100, 0.1
NULL_RUNS = 1_000
STATED = {0.005: 12_500, 0.01: 21_500}
BOUND = 0.02
"""Share of the answers that may differ."""
LIMITS = TrialLimits()
Counts = npt.NDArray[np.int64]
Array = npt.NDArray[np.float64]


def run(quick: bool) -> list[Row]:
    """Power at stated counts, then null runs of the longer length with all three tests. `quick`: fewer of the first."""
    rng = np.random.default_rng(5)
    runs = 500 if quick else 2_000
    rows: list[Row] = []
    for base, stated in STATED.items():
        found = find_errors(rng, runs, base, LIMITS.error_effect, stated)
        reached = np.sort(found)[int(0.9 * runs)]
        derived = requests_needed(base, LIMITS.error_effect, SHARE, nodes=NODES, liars_max=LIMITS.failed_nodes - 1)
        name = f"canary.base_{base * 1000:.0f}_per_mille"
        note = f"of {runs} runs within {stated:,} requests of the candidate; derived: {derived:,}"
        rows += [
            Row(f"{name}_found_share", float(np.isfinite(found).mean()), "share", note),
            Row(f"{name}_requests_p50", float(np.median(found)), "requests", "until the alarm"),
            Row(f"{name}_requests_p90", float(reached), "requests", "until the alarm"),
        ]
    length = max(STATED.values())
    alarms = find_false_alarms(rng, NULL_RUNS, length)
    note = f"in {NULL_RUNS} runs of {length:,} candidate requests, {REPORTS * NODES} looks each"
    rows.append(Row("canary.false_alarm_share", float(alarms.mean()), "share", note))
    lied = find_errors(rng, NULL_RUNS, 0.01, 0.0, length, liars=1)
    rows.append(Row("canary.false_alarm_share_one_liar", float(np.isfinite(lied).mean()), "share", "it claims 100 %"))
    return rows


class Fleet:
    """Traffic of `runs` fleets at once, and the evidence of one test on errors or on slow requests."""

    def __init__(self, rng: np.random.Generator, runs: int, length: int) -> None:
        self._rng = rng
        self._mean = length / SHARE / REPORTS / NODES
        self._shape = (runs, NODES)
        self.log_evidence: Array = np.zeros((runs, NODES, STEPS))
        self.requests: Array = np.zeros(self._shape)
        self._stable: Counts = np.zeros(self._shape, np.int64)
        self._stable_bad: Counts = np.zeros(self._shape, np.int64)

    def report(self, node: int, base: float, worse_by: float, *, drifts: bool, liar: bool = False) -> None:
        """One node's report. `drifts`: its base rate is another in every block, up to twice as high."""
        runs = self._shape[0]
        total = self._rng.poisson(self._mean, runs)
        candidate = self._rng.binomial(total, SHARE)
        stable = total - candidate
        rate = base * self._rng.uniform(0.0, 2.0, runs) if drifts else np.full(runs, base)
        bad = candidate if liar else self._rng.binomial(candidate, rate + worse_by)
        stable_bad = self._rng.binomial(stable, 0.0 if liar else rate)
        expected = base_rate(self._stable[:, node], self._stable_bad[:, node])
        self.log_evidence[:, node] += evidence(candidate, bad, stable, stable_bad, expected, LIMITS.error_effect)
        self.requests[:, node] += candidate
        self._stable[:, node] += stable
        self._stable_bad[:, node] += stable_bad

    def alarms(self) -> npt.NDArray[np.bool_]:
        """Which of the runs have reached the threshold now."""
        return combine(self.log_evidence, LIMITS.failed_nodes - 1) >= threshold(LIMITS.false_alarm)


def find_errors(
    rng: np.random.Generator, runs: int, base: float, worse_by: float, length: int, *, liars: int = 0
) -> Array:
    """Requests of the candidate until each run's first alarm, infinite without one; looks after every report."""
    fleet = Fleet(rng, runs, length)
    found = np.full(runs, np.inf)
    for turn in range(REPORTS * NODES):
        node = turn % NODES
        fleet.report(node, base, worse_by, drifts=False, liar=node < liars)
        new = fleet.alarms() & np.isinf(found)
        found[new] = fleet.requests[new].sum(axis=-1)
    return found


def find_false_alarms(rng: np.random.Generator, runs: int, length: int) -> npt.NDArray[np.bool_]:
    """Whether any of the three tests ever alarms on a candidate that is as good as stable.

    Half of the runs have base rates that drift; the answers differ exactly as often as they may.
    """
    alarmed = np.zeros(runs, bool)
    tests = [(Fleet(rng, runs // 2, length), drifts) for drifts in (False, True) for _ in range(2)]
    bases = (LIMITS.error_effect, 0.01)
    differing: Array = np.zeros((runs, NODES, STEPS))
    for turn in range(REPORTS * NODES):
        node = turn % NODES
        for index, (fleet, drifts) in enumerate(tests):
            fleet.report(node, bases[index % 2], 0.0, drifts=drifts)
            half = slice(runs // 2, None) if drifts else slice(0, runs // 2)
            alarmed[half] |= fleet.alarms()
        compared = rng.poisson(length / REPORTS / NODES, runs)
        differing[:, node] += evidence_above(compared, rng.binomial(compared, BOUND), BOUND, LIMITS.disagreement_effect)
        alarmed |= combine(differing, LIMITS.failed_nodes - 1) >= threshold(LIMITS.false_alarm)
    return alarmed
