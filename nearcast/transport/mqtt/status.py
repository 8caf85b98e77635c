"""What the user properties of an answer say: how it ended, and who gave it. Both ends."""

from __future__ import annotations

from collections.abc import Mapping

from nearcast.errors import CATALOGUE, Code, MeshError
from nearcast.handler import InferResponse, Served

OK = 200
EXPIRED = 408
"""The deadline passed before the model ran. 504 = it ran, and took too long."""
STATUS: Mapping[Code, int] = {
    **{code: entry.http for code, entry in CATALOGUE.items()},
    Code.UNAUTHENTICATED: 403,
    Code.VERSION_MISMATCH: 404,
    Code.UNSUPPORTED: 415,
    Code.UNTRUSTED: 503,
    Code.CANCELLED: 503,
}
"""The closed set that a device has to know: 200 400 403 404 408 409 413 415 429 500 503 504. `code` says more."""


def success(response: InferResponse) -> dict[str, str]:
    """The properties of an answer: status, version, and whether the edge or the cloud gave it, by which node."""
    served = response.served
    user = {
        "status": "200",
        "model-version": served.version or response.version,
        "served-by": "cloud" if served.tier == "cloud" else "edge",
    }
    if served.node:
        user["node"] = served.node
    if served.tier:
        user["tier"] = served.tier
    return user


def failure(status: int, code: str, reason: str, retry_after_ms: int | None = None) -> dict[str, str]:
    """The properties of a refusal or a failure."""
    user = {"status": str(status), "code": str(code), "status-message": reason}
    if retry_after_ms is not None:
        user["retry-after-ms"] = str(retry_after_ms)
    return user


def require_success(user: Mapping[str, str]) -> Served:
    """Who gave an answer, read from its properties.

    Raises:
        MeshError: what the mesh answered instead; INTERNAL if the properties do not say.
    """
    if user.get("status") == "200":
        return Served(node=user.get("node", ""), tier=user.get("tier", ""), version=user.get("model-version", ""))
    code, retry = user.get("code", ""), user.get("retry-after-ms", "")
    raise MeshError(
        Code(code) if code in CATALOGUE else Code.INTERNAL,
        user.get("status-message", "The answer has no status."),
        retry_after_ms=int(retry) if retry.isascii() and retry.isdigit() and len(retry) < 10 else None,
    )
