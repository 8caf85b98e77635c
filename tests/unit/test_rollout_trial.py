"""The test on a trial: its promise by exact enumeration, its power, its gates, and what liars can do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_sync.rollout.gates import failed_gate, trying
from model_sync.rollout.report import ModelReport, ReleaseReport, counted_since
from model_sync.rollout.sequential import STEPS, base_rate, combine, evidence, evidence_above, threshold
from model_sync.rollout.trial import Trial, TrialLimits
from nearcast.serving.statistics import bucket_of

RATES = st.floats(0.0005, 0.9)
NONE = ReleaseReport(release=1)
FAST, SLOW = str(bucket_of(900)), str(bucket_of(90_000))


def binomial(n: int, p: float) -> np.ndarray:
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


@settings(max_examples=200, deadline=None)
@given(
    nc=st.integers(1, 12), ns=st.integers(1, 12), rate=RATES, effect=st.floats(0.001, 0.3),
    p=st.floats(0.0, 1.0), less=st.floats(0.0, 1.0),
)  # fmt: skip
def test_the_expectation_is_at_most_one_for_a_candidate_that_is_not_worse(
    nc: int, ns: int, rate: float, effect: float, p: float, less: float
) -> None:
    bad, stable_bad = (grid.ravel() for grid in np.meshgrid(np.arange(nc + 1), np.arange(ns + 1), indexing="ij"))
    values = np.exp(evidence(np.full(bad.shape, nc), bad, np.full(bad.shape, ns), stable_bad, rate, effect))
    probability = np.outer(binomial(nc, p * less), binomial(ns, p)).ravel()
    assert (probability @ values).max() <= 1.0 + 1e-9


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 20), bound=st.floats(0.001, 0.99), effect=st.floats(0.001, 0.3), less=st.floats(0.0, 1.0))
def test_the_expectation_is_at_most_one_below_the_bound(n: int, bound: float, effect: float, less: float) -> None:
    values = np.exp(evidence_above(np.full(n + 1, n), np.arange(n + 1), bound, effect))
    assert (binomial(n, bound * less) @ values).max() <= 1.0 + 1e-9


def test_no_control_no_evidence() -> None:
    assert evidence([0, 5], [0, 5], [9, 0], [9, 0], 0.01, 0.01).tolist() == [[0.0] * STEPS] * 2


@given(liar=st.floats(-1e18, 1e18), honest=st.lists(st.floats(-30.0, 0.0), min_size=1, max_size=5))
def test_one_node_decides_nothing_and_hides_little(liar: float, honest: list[float]) -> None:
    rest = np.array([[value] * STEPS for value in honest])
    both = np.vstack([rest, np.full((1, STEPS), liar)])
    assert combine(both, 1) <= 1e-9, "however loud"
    loud = np.vstack([np.full((2, STEPS), 20.0), both])
    hidden = combine(np.full((2, STEPS), 20.0), 1) - combine(loud, 1)
    assert hidden <= (len(honest) + 1) * math.log(10) + 1e-6, "a factor of ten a node"


def counts(requests: int, errors: int = 0, slow: int = 0, **fields: int) -> ReleaseReport:
    latency = {FAST: requests - errors - slow, SLOW: slow}
    return ReleaseReport(release=1, requests=requests, errors=errors, latency=latency, **fields)


def run(trial: Trial, nodes: int, rounds: int, candidate: ReleaseReport, stable: ReleaseReport) -> str:
    """The reason after so many equal reports of each node; the same every time, so one round shows the drift."""
    history = counts(10_000, 50, 20)
    for _ in range(rounds):
        for node in range(nodes):
            trial.observe(f"edge-{node}", candidate, stable, history)
    return trial.judge([], nodes).reason


def test_a_good_candidate_goes_on_and_each_fault_is_found() -> None:
    good, stable = counts(100, 1, 1), counts(900, 9, 9)
    assert run(Trial(TrialLimits(), intent=1), 5, 200, good, stable) == ""
    assert "2.00% of 20000 requests fail, of stable 1.00%" in run(
        Trial(TrialLimits(), intent=1), 5, 40, counts(100, 2), stable
    )
    slow = run(Trial(TrialLimits(), intent=1), 5, 10, counts(100, 1, 10), stable)
    assert "slower than stable's p99 allows" in slow
    other = counts(100, 1, 1, compared=50, disagreed=10)
    assert "are answered otherwise, allowed are 5.00%" in run(
        Trial(TrialLimits(), intent=1, disagreement_max=0.05), 5, 10, other, stable
    )
    assert run(Trial(TrialLimits(), intent=1), 5, 10, other, stable) == "", "no bound, no fault"


def test_one_liar_stops_no_rollout_where_two_must_agree() -> None:
    everything = ReleaseReport(release=1, requests=2**53, errors=2**53, compared=2**53, disagreed=2**53)
    trial = Trial(TrialLimits(failed_nodes=2), intent=1, disagreement_max=0.01)
    good, stable, history = counts(100, 1), counts(900, 9), counts(10_000, 50)
    for _ in range(50):
        trial.observe("liar", everything, counts(2**40), history)
        for node in ("edge-1", "edge-2"):
            trial.observe(node, good, stable, history)
    verdict = trial.judge(["failed", "yes", "yes"], 3)
    assert verdict.reason == ""
    assert verdict.findings["errors"].progress < 1
    assert Trial(TrialLimits(failed_nodes=1), intent=1).judge(["failed", "yes", "yes"], 3).reason
    alone = Trial(TrialLimits(failed_nodes=2), intent=1)
    alone.observe("edge-1", everything, counts(2**40), history)
    assert alone.judge([], 5).reason == "", "a wave of one node does not decide for five"
    assert "requests fail" in alone.judge([], 1).reason, "a fleet of one does"


def test_one_liar_hides_no_bad_candidate() -> None:
    trial = Trial(TrialLimits(), intent=1)
    for _ in range(60):
        trial.observe("liar", counts(2**30), counts(2**30, 2**29), counts(10_000, 50))
        for node in range(4):
            trial.observe(f"edge-{node}", counts(100, 3), counts(900, 9), counts(10_000, 100))
    assert "requests fail" in trial.judge([], 5).reason


def test_a_block_waits_until_both_were_asked() -> None:
    trial = Trial(TrialLimits(), intent=1)
    for _ in range(20):
        trial.observe("edge-1", counts(50, 40), NONE, counts(10_000, 50))
    assert trial.judge([], 1).reason == "", "nothing to compare with"
    trial.observe("edge-1", NONE, counts(500, 2), counts(10_000, 50))
    assert trial.judge([], 1).reason


def test_the_gate_asks_for_a_share_and_a_number() -> None:
    assert failed_gate(["failed"] * 2 + ["yes"] * 8, share_min=0.2, nodes_min=2)
    assert not failed_gate(["failed"] * 2 + ["yes"] * 9, share_min=0.2, nodes_min=2)
    assert not failed_gate(["failed", "yes", "no", "no"], share_min=0.2, nodes_min=2)
    assert failed_gate(["failed", "failed", "no"], share_min=1.0, nodes_min=2).startswith("2 of 2 nodes")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"candidate": 2}, "yes"),
        ({"goal": 2, "quarantined": (2,)}, "yes"),
        ({"stable": 1, "quarantined": (2,), "intent": 7}, "failed"),
        ({"stable": 1, "quarantined": (2,), "intent": 6}, "no"),
        ({"stable": 1, "quarantined": (3,), "intent": 9}, "no"),
    ],
)
def test_what_counts_as_a_failed_node(fields: dict, expected: str) -> None:
    assert trying(ModelReport(model="digits", state="IDLE", **fields), 2, 7) == expected


def test_differences_are_never_negative() -> None:
    before = ReleaseReport(release=1, requests=10, errors=3, latency={"5": 4, "6": 3}, compared=5, disagreed=1)
    now = ReleaseReport(release=1, requests=12, errors=9, latency={"5": 6, "6": 1}, compared=2, disagreed=2)
    assert counted_since(before, now) == ReleaseReport(release=1, requests=2, errors=2, latency={"5": 2})
    assert counted_since(None, now) == now


def test_the_threshold_and_the_rate() -> None:
    assert threshold(0.01) == pytest.approx(math.log(300))
    assert base_rate(0, 0) == pytest.approx(0.01)
    assert base_rate(99_900, 999) == pytest.approx(0.01)
