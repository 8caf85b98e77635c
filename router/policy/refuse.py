"""Why nothing could be chosen, said so that the client knows what to do."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from nearcast.errors import Code
from router.policy.choose import wait_s
from router.policy.facts import Reject, RequestFacts
from router.policy.fleet import ModelIndex
from router.policy.state import VersionState

_NAMES_MAX = 8
_RETRY_UNAVAILABLE_MS = 250
_RETRY_MAX_MS = 30_000


def unknown_model(model: str, models: Collection[str]) -> Reject:
    """No target holds the model."""
    if models:
        names = sorted(models)
        known = ", ".join(names[:_NAMES_MAX]) + (", ..." if len(names) > _NAMES_MAX else "")
        text = f"No target holds the model {model!r}; known models: {known}."
    else:
        text = f"No target holds the model {model!r}; no target has reported any model yet."
    return Reject(Code.MODEL_NOT_FOUND, text, None, "unknown_model")


def unknown_version(model: str, version: str, index: ModelIndex) -> Reject:
    """The model is known, the version is nowhere."""
    known = ", ".join(sorted(index.versions)[:_NAMES_MAX])
    if not version:
        return Reject(
            Code.UNAVAILABLE, f"No version of {model!r} is ready yet; try again.", _RETRY_UNAVAILABLE_MS, "not_ready"
        )
    text = f"No target holds version {version} of {model!r}; versions held: {known}."
    return Reject(Code.VERSION_MISMATCH, text, None, "unknown_version")


def not_offered(facts: RequestFacts, candidates: Sequence[VersionState]) -> Reject:
    """Targets exist, none gives the quality at the price."""
    best = max(version.quality for version in candidates)
    least = min(version.price for version in candidates)
    price = "any price" if facts.price_max is None else f"a price of {facts.price_max:g}"
    text = (
        f"No target of {facts.model!r} gives a quality of {facts.quality_min:g} for {price}; the best quality is "
        f"{best:g}, the lowest price {least:g}."
    )
    return Reject(Code.UNSUPPORTED, text, None, "not_offered")


def nothing_feasible(
    now: float, candidates: Sequence[VersionState], size_bytes: int, limit_s: float, remaining_s: float | None
) -> Reject:
    """Targets exist, none can answer in time: saturated, unreachable, or the deadline is too short."""
    waits: list[float] = []
    usable: list[VersionState] = []
    for version in candidates:
        obstacle, delay_s = version.obstacle(now)
        if not obstacle:
            usable.append(version)
        elif delay_s > 0.0:
            waits.append(delay_s)
    model = candidates[0].model
    if not usable:
        wait_ms = _milliseconds(min(waits)) if waits else _RETRY_UNAVAILABLE_MS
        reasons = {version.obstacle(now)[0] for version in candidates}
        if "pushed_back" in reasons:
            return Reject(
                Code.OVERLOADED, f"All targets of {model!r} that can be reached are overloaded.", wait_ms, "pushed_back"
            )
        return Reject(
            Code.UNAVAILABLE, f"No target of {model!r} can be reached now; try again.", wait_ms, "unreachable"
        )
    idle = min(v.base50 + size_bytes * v.target.s_per_byte for v in usable)
    if idle <= limit_s:
        shortest = min(wait_s(v) for v in usable)
        return Reject(
            Code.OVERLOADED,
            f"All targets of {model!r} are busy; the shortest queue takes {shortest * 1e3:.0f} ms.",
            _milliseconds(shortest),
            "saturated",
        )
    budget_ms = 0.0 if remaining_s is None else remaining_s * 1e3
    text = f"No target can answer within {budget_ms:.1f} ms; the fastest needs about {idle * 1e3:.1f} ms."
    return Reject(Code.DEADLINE, text, None, "deadline_too_short")


def _milliseconds(seconds: float) -> int:
    return min(_RETRY_MAX_MS, max(1, math.ceil(seconds * 1e3)))
