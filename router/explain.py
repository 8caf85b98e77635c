"""`GET /v2/nearcast/route`: where a request would go now, and why. For the metrics listener of a node that routes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from nearcast.errors import CATALOGUE, Code, MeshError
from router.policy import Reject
from router.router import Router

if TYPE_CHECKING:
    from aiohttp import web

PATH = "/v2/nearcast/route"


def explain_route(router: Router) -> web.RouteDef:
    """The route that answers for `router`."""
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        try:
            body, status = explain(router, dict(request.query)), 200
        except MeshError as error:
            body, status = {"error": error.message, "code": error.code.value}, CATALOGUE[error.code].http
        return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")

    return web.get(PATH, answer)


def explain(router: Router, query: dict[str, str]) -> dict[str, Any]:
    """The decision for `model`, and optionally `version`, `size` (bytes), `deadline_ms` and `principal`, as JSON.

    Raises:
        MeshError: INVALID_REQUEST for a query that makes no sense.
    """
    if unknown := set(query) - {"model", "version", "size", "deadline_ms", "principal"}:
        raise MeshError(
            Code.INVALID_REQUEST, f"Unknown parameter {min(unknown)!r}; use model, version, size, deadline_ms."
        )
    model = query.get("model", "")
    if not model:
        raise MeshError(Code.INVALID_REQUEST, "Say which model: ?model=NAME.")
    deadline_ms = _number(query, "deadline_ms")
    facts, decision = router.explain(
        model,
        version=query.get("version", ""),
        size_bytes=int(_number(query, "size") or 0),
        deadline_s=None if deadline_ms is None else deadline_ms / 1e3,
        principal=query.get("principal", ""),
    )
    described: dict[str, Any] = {
        "node": router.node,
        "model": model,
        "version": facts.version,
        "fallbacks": facts.fallbacks,
        "reason": decision.reason,
        "candidates": [msgspec.to_builtins(terms) for terms in decision.terms],
    }
    if isinstance(decision, Reject):
        refusal = {"code": decision.code.value, "message": decision.message, "retry_after_ms": decision.retry_after_ms}
        return described | {"decision": "reject"} | refusal
    hedge_ms = None if decision.hedge_after_s is None else decision.hedge_after_s * 1e3
    return described | {
        "decision": "send",
        "target": decision.target,
        "answers_as": decision.version,
        "hedge_after_ms": hedge_ms,
        "alternatives": decision.alternatives,
    }


def _number(query: dict[str, str], name: str) -> float | None:
    text = query.get(name, "")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise MeshError(Code.INVALID_REQUEST, f"{name} must be a number from 0 up, not {text!r}.")
    return number
