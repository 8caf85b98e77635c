"""P12: a half-open breaker lets through at most its trials at the same time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.policy.breaker import Breaker


@settings(max_examples=60)
@given(
    failures=st.lists(st.booleans(), min_size=1, max_size=60),
    trials=st.integers(1, 3),
    gaps=st.lists(st.floats(0, 1), min_size=60, max_size=60),
)
def test_half_open_breaker_admits_at_most_its_trials(failures: list[bool], trials: int, gaps: list[float]) -> None:
    breaker = Breaker(failures_max=1, open_s=0.1, open_max_s=0.4, trials_max=trials)
    breaker.open(0.0)
    now, running = 0.0, 0
    for failed, gap in zip(failures, gaps, strict=False):
        now += gap
        while breaker.state != "closed" and breaker.admits(now):
            assert breaker.start_trial()
            running += 1
            assert breaker.trials <= trials
        if running:
            breaker.end_trial()
            running -= 1
            if failed:
                breaker.fail(now, trial=True)
            else:
                breaker.succeed()
        if breaker.state == "closed":
            breaker.open(now)
        assert breaker.trials == running <= trials
