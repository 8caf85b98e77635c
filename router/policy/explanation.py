"""A decision with the terms of every candidate it was made among."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from router.policy.candidates import Candidates
from router.policy.choose import judge
from router.policy.facts import Decision, RequestFacts, Send, Terms
from router.policy.state import VersionState


def explain(
    now: float, facts: RequestFacts, decision: Decision, tables: Sequence[tuple[str, Candidates]], limit_s: float
) -> Decision:
    """The same decision with its terms. `tables` are what it was made among, each with its model ("" = as asked)."""
    chosen = (decision.model, decision.version, decision.target) if isinstance(decision, Send) else None
    terms = tuple(
        _judge(now, version, facts, limit_s, model, is_chosen=(model, version.version, version.target.name) == chosen)
        for model, table in tables
        for version in table.versions
    )
    return msgspec.structs.replace(decision, terms=terms)


def _judge(
    now: float, version: VersionState, facts: RequestFacts, limit_s: float, model: str, *, is_chosen: bool
) -> Terms:
    terms = judge(now, version, facts.size_bytes, limit_s, version.target.name if is_chosen else "")
    verdict = terms.verdict
    if version.quality < facts.quality_min:
        verdict = "low_quality"
    elif facts.price_max is not None and version.price > facts.price_max:
        verdict = "too_expensive"
    return msgspec.structs.replace(terms, model=model, verdict=verdict)
