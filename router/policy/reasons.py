"""Every reason code that a decision may carry, with its meaning: for `route explain`, logs and metrics by reason."""

from __future__ import annotations

from typing import Final

SENDS: Final[dict[str, str]] = {
    "best": "the cheapest target that is in time at its 95th percentile",
    "fallback": "no target of the version wanted is in time; another version answers",
    "late": "no target is in time at its 95th percentile; this one is at its median",
    "panic": "too few targets are healthy; one that is set aside is tried all the same",
    "sequence": "the target that holds the state of the sequence",
    "moved": "the target that held the sequence is lost; another one answers, or says that it knows no such sequence",
    "smaller": "nothing of the model asked for is in time; the model that stands in for it answers",
    "hedge": "a copy, because the first send takes longer than nearly all do",
    "retry": "once more elsewhere, after a failure",
    "second_opinion": "once more elsewhere, after the model failed; if it fails again the request is to blame",
}
"""Reasons of `Send`."""

REFUSALS: Final[dict[str, str]] = {
    "unknown_model": "no target holds the model",
    "unknown_version": "targets hold the model, none this version",
    "not_ready": "no version of the model is ready yet",
    "unreachable": "the targets are known, none can be reached now",
    "pushed_back": "every target that can be reached has asked to be left alone for a while",
    "saturated": "every queue is too long for the deadline",
    "deadline_too_short": "even an idle target would be too slow",
    "shed": "a queue stands, and what is left of it is kept for more important requests",
    "tenant_share": "a queue stands, and this tenant already has more than its share of the model",
    "not_offered": "no target gives the quality asked for at the price offered",
}
"""Reasons of `Reject`."""

VERDICTS: Final[dict[str, str]] = {
    "chosen": "the request goes here",
    "feasible": "in time at the 95th percentile",
    "hot": "in time, but among the most loaded of its tier",
    "late_at_p95": "in time at the median only",
    "infeasible": "not in time even at the median",
    "draining": "ends soon and takes nothing new",
    "gone": "has left",
    "connection_lost": "the connection is lost; a probe or time opens it again",
    "pushed_back": "has asked to be left alone for a while",
    "away": "said lately that it cannot serve the version",
    "not_resident": "does not have the version in memory",
    "breaker_open": "failed too often in a row",
    "slow": "far slower than its like, or than it has been itself",
    "tier_open": "the whole tier answered too late for a while",
    "tier_starting": "the tier has just come back and is given few requests at first",
    "full": "takes no more at the same time than it has learnt to be good for",
    "low_quality": "answers with less quality than asked for",
    "too_expensive": "asks more than the request offers",
}
"""Verdicts of `Terms`."""

REASONS: Final[dict[str, str]] = SENDS | REFUSALS | VERDICTS
"""All of them by code."""
