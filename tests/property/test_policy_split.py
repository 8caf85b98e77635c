"""P10: who belongs to a candidate: always the same clients, more of them as the share grows, and as many as it says."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from router.policy import assign

DRAWS = 4000


@settings(max_examples=50)
@given(
    salt=st.text(max_size=20),
    tenant=st.text(max_size=10),
    key=st.text(max_size=30),
    a=st.floats(0, 1),
    b=st.floats(0, 1),
)
def test_split_is_sticky_and_only_grows(salt: str, tenant: str, key: str, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert assign(salt, tenant, key, low) == assign(salt, tenant, key, low)
    assert assign(salt, tenant, key, high) or not assign(salt, tenant, key, low)
    assert not assign(salt, tenant, key, 0.0)
    assert assign(salt, tenant, key, 1.0)


@settings(max_examples=25, deadline=None)
@given(salt=st.integers(0, 10**9), share=st.floats(0.02, 0.98))
def test_split_share_is_binomial(salt: int, share: float) -> None:
    hits = sum(assign(f"rollout-{salt}", "local", f"p:{i}", share) for i in range(DRAWS))
    # Six standard deviations: one false alarm in five hundred million.
    assert abs(hits - DRAWS * share) <= 6 * math.sqrt(DRAWS * share * (1 - share)) + 1
