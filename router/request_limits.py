"""What a request itself demands of its answer, as parameters of the protocol: `quality_min` and `price_max`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nearcast.errors import Code, MeshError
from nearcast.handler import Parameter


def read_limit(parameters: Mapping[str, Parameter], name: str) -> float | None:
    """A request's own limit, such as `quality_min` or `price_max`; None = it sets none.

    Raises:
        MeshError: INVALID_REQUEST if it is no number from 0 up.
    """
    value = parameters.get(name)
    if value is None:
        return None
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if not limit >= 0.0:
        raise MeshError(Code.INVALID_REQUEST, f"The parameter {name} must be a number from 0 up.")
    return limit
