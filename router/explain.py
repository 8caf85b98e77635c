"""`GET /v2/nearcast/route`: where a request would go now, and why. For the metrics listener of a node that routes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.telemetry import Answering
from router.policy import Reject, RequestFacts
from router.policy.reasons import REASONS
from router.router import Router

if TYPE_CHECKING:
    from aiohttp import web

PATH = "/v2/nearcast/route"


def explain_routes(router: Router) -> dict[str, Answering]:
    """What answers for `router`, by path."""

    async def answer(request: web.Request) -> web.Response:
        from aiohttp import web

        try:
            body, status = explain(router, dict(request.query)), 200
        except MeshError as error:
            body, status = {"error": error.message, "code": error.code.value}, CATALOGUE[error.code].http
        return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")

    return {PATH: answer}


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The query: a request as the policy would see it."""

    model: Annotated[str, msgspec.Meta(min_length=1)]
    version: str = ""
    size: Annotated[int, msgspec.Meta(ge=0)] = 0
    deadline_ms: Annotated[float, msgspec.Meta(ge=0)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=0)] = 0
    tenant: str = "local"
    principal: str = ""
    sequence: str = ""
    quality_min: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    price_max: Annotated[float, msgspec.Meta(ge=0)] | None = None


def explain(router: Router, query: dict[str, str]) -> dict[str, Any]:
    """The decision for the request that a `Question` describes, as JSON.

    Raises:
        MeshError: INVALID_REQUEST for a query that makes no sense.
    """
    try:
        asked = msgspec.convert(query, Question, strict=False)
    except msgspec.ValidationError as error:
        names = ", ".join(Question.__struct_fields__)
        raise MeshError(Code.INVALID_REQUEST, f"{error}; the parameters are {names}.") from error
    facts, decision = router.explain(
        RequestFacts(
            model=asked.model,
            version=asked.version,
            size_bytes=asked.size,
            remaining_s=None if asked.deadline_ms is None else asked.deadline_ms / 1e3,
            priority=asked.priority,
            tenant=asked.tenant,
            sequence=asked.sequence,
            quality_min=asked.quality_min,
            price_max=asked.price_max,
        ),
        principal=asked.principal,
    )
    codes = {decision.reason, *(terms.verdict for terms in decision.terms)}
    described: dict[str, Any] = {
        "node": router.node,
        "model": asked.model,
        "version": facts.version,
        "fallbacks": facts.fallbacks,
        "reason": decision.reason,
        "candidates": [msgspec.to_builtins(terms) for terms in decision.terms],
        "meanings": {code: REASONS[code] for code in sorted(codes) if code in REASONS},
    }
    if isinstance(decision, Reject):
        refusal = {"code": decision.code.value, "message": decision.message, "retry_after_ms": decision.retry_after_ms}
        return described | {"decision": "reject"} | refusal
    hedge_ms = None if decision.hedge_after_s is None else decision.hedge_after_s * 1e3
    return described | {
        "decision": "send",
        "target": decision.target,
        "answers_as": decision.version,
        "stand_in": decision.model,
        "hedge_after_ms": hedge_ms,
        "alternatives": decision.alternatives,
    }
