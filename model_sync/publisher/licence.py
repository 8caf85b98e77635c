"""Which licences an operator publishes: SPDX expressions against an allow-list."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from license_expression import ExpressionError, Licensing, get_spdx_licensing  # type: ignore[import-untyped]

from nearcast.config import read_toml
from nearcast.errors import Code, MeshError

POLICY_FILE = "policy.toml"
EXPRESSION_CHARS_MAX = 512
LICENCES_ALLOWED = (
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC-BY-4.0",
    "CC0-1.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0", "ISC", "MIT", "MIT-0", "PDDL-1.0", "Unlicense", "Zlib",
)  # fmt: skip
"""Without a policy of the operator's own: those that allow use in a product and ask for no more than a notice."""
_OWN = re.compile(r"(DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+")


class PublishPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator lets into the repository.

    Attributes:
        licences_allowed: SPDX licences, also `X WITH exception` and `LicenseRef-…` for terms of your own.
    """

    licences_allowed: tuple[str, ...] = LICENCES_ALLOWED


def read_policy(operator: Path) -> PublishPolicy:
    """The policy in an operator's folder; the default one if there is none.

    Raises:
        MeshError: INVALID_REQUEST if the file does not fit.
    """
    path = operator / POLICY_FILE
    if not path.exists():
        return PublishPolicy()
    try:
        return msgspec.convert(read_toml(path), PublishPolicy)
    except msgspec.ValidationError as error:
        raise MeshError(Code.INVALID_REQUEST, f"The policy {path} does not fit: {error}.") from error


def require_licence(expression: str, policy: PublishPolicy) -> str:
    """Refuse a licence that is not allowed; answers the expression in SPDX's own spelling.

    Of `A OR B` one must be allowed, of `A AND B` both.

    Raises:
        MeshError: INVALID_REQUEST if it is no SPDX expression, FORBIDDEN if it is not allowed.
    """
    parsed = _parse(expression)
    allowed = {str(_parse(each)) for each in policy.licences_allowed}
    if not _is_allowed(parsed, allowed):
        raise MeshError(
            Code.FORBIDDEN,
            f"The licence {expression!r} is not on the allow-list; to allow it, add it to `licences_allowed` in "
            f"operator/{POLICY_FILE}.",
        )
    return str(parsed)


def _parse(expression: str) -> Any:
    licensing = _licensing()
    try:
        parsed = licensing.parse(expression[: EXPRESSION_CHARS_MAX + 1], strict=True)
    except (ExpressionError, RecursionError) as error:
        raise _malformed(expression) from error
    if parsed is None or len(expression) > EXPRESSION_CHARS_MAX:
        raise _malformed(expression)
    unknown = [key for key in licensing.unknown_license_keys(parsed) if _OWN.fullmatch(key) is None]
    if unknown:
        raise MeshError(Code.INVALID_REQUEST, f"The licence {expression!r} names {unknown[0]!r}, which SPDX has not.")
    return parsed


def _is_allowed(node: Any, allowed: set[str]) -> bool:
    licensing = _licensing()
    if isinstance(node, licensing.OR):
        return any(_is_allowed(each, allowed) for each in node.args)
    if isinstance(node, licensing.AND):
        return all(_is_allowed(each, allowed) for each in node.args)
    return str(node) in allowed


def _malformed(expression: str) -> MeshError:
    return MeshError(
        Code.INVALID_REQUEST, f"{expression[:80]!r} is no SPDX licence expression, such as `Apache-2.0 OR MIT`."
    )


@cache
def _licensing() -> Licensing:
    return get_spdx_licensing()
