"""A model host over a store, and requests for it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.serving import HostLimits, ModelHost
from nearcast.serving.slots import VersionStatus
from nearcast.store import Store
from nearcast.wire.request import TensorRequest
from tests.tiny_models import tensor

X = np.arange(4, dtype=np.float32).reshape(1, 4)
CONTEXT = RequestContext()
THREADED = HostLimits(inline_us_max=0.0, slots=2)


@contextlib.asynccontextmanager
async def running(store: Store, limits: HostLimits | None = None, **options: Any) -> AsyncIterator[ModelHost]:
    host = ModelHost(store, node="edge-1", tier="local", limits=limits, **options)
    await host.start()
    try:
        yield host
    finally:
        await host.close()


def refused(code: Code, match: str | None = None) -> Any:
    return pytest.RaisesExc(MeshError, match=match, check=lambda error: error.code is code)


def request(x: Any = X, *, model: str = "affine", **fields: Any) -> TensorRequest:
    return TensorRequest(model=model, inputs={"x": x}, **fields)


def stats(host: ModelHost, model: str) -> dict[int, VersionStatus]:
    return {each.release: each for each in host.status(model)}


def wide(width: int) -> dict[str, Any]:
    return {"inputs": (tensor("x", "FP32", (-1, width)),), "outputs": (tensor("y", "FP32", (-1, width)),)}


def states(host: ModelHost) -> dict[int, str]:
    return {release: status.state for release, status in stats(host, "affine").items()}
