"""What the policy is asked and what it answers.

These are built for each request on the hot path; `msgspec.Struct` builds a frozen object in a fifth of a dataclass's
time.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from nearcast.errors import Code


class RequestFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request as the policy sees it: never its tensors.

    Attributes:
        version: the release wanted; "" = the newest that is hot.
        pinned: the client itself named the version; a sequence then never continues with another one.
        fallbacks: releases that may answer instead, in order, if no target of `version` can.
        size_bytes: of the encoded request.
        remaining_s: seconds until the deadline; None = no deadline.
        stateful: the client says that the model keeps state; a report that says so is enough, too.
        idempotent: may be executed twice. True for every stateless model unless the client forbids it.
        priority: 0 = default, 1 = highest, larger is lower; from 2 on a request must fit with its 95th percentile.
        sequence: requests of one sequence go to one target if the model keeps state; "" = none.
        tenant: whose request it is; sequences of two tenants never meet.
        quality_min: an answer of less quality than this is worth nothing; in [0, 1].
        price_max: a target that asks more for 1000 answers is no candidate; None = whatever it costs.
    """

    model: str
    version: str = ""
    pinned: bool = False
    fallbacks: tuple[str, ...] = ()
    size_bytes: int = 0
    remaining_s: float | None = None
    stateful: bool = False
    idempotent: bool = True
    priority: int = 0
    sequence: str = ""
    tenant: str = "local"
    quality_min: float = 0.0
    price_max: float | None = None


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """How one candidate was judged. Times in milliseconds; `verdict` is a reason code.

    `load` requests are believed to be there, `in_flight` of them our own, on `slots` model runs; `error` is the
    smoothed share of failures, `report_age_ms` the time since its last report (None = it has sent none).
    `model` stands in for the one asked for; "" = it is that one.
    """

    target: str
    tier: str
    version: str
    rtt_ms: float
    transfer_ms: float
    wait_ms: float
    service_ms: float
    t50_ms: float
    t95_ms: float
    cost_ms: float
    load: float
    verdict: str
    in_flight: int = 0
    slots: int = 1
    error: float = 0.0
    price: float = 0.0
    quality: float = 1.0
    report_age_ms: float | None = None
    model: str = ""


class Send(msgspec.Struct, frozen=True, omit_defaults=True):
    """Send the request to `target` as `version`.

    `hedge_after_s` is the delay after which `Policy.hedge` wants to be asked; None = never. `alternatives` are the
    names of the next best targets. `missed`: the version asked for had no feasible target and a fallback answers.
    `model` is the model that answers in place of the one asked for; "" = that one itself.
    """

    target: str
    version: str
    hedge_after_s: float | None = None
    alternatives: tuple[str, ...] = ()
    reason: str = "best"
    missed: bool = False
    terms: tuple[Terms, ...] = ()
    model: str = ""


class Reject(msgspec.Struct, frozen=True, omit_defaults=True):
    """Refuse the request now, because waiting would not help. `retry_after_ms` None = do not try again."""

    code: Code
    message: str
    retry_after_ms: int | None = None
    reason: str = ""
    terms: tuple[Terms, ...] = ()


Decision: TypeAlias = Send | Reject
