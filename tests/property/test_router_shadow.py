"""P11: a shadow changes nothing for its user: the same answers and errors, and no copy before the answer is out."""

from __future__ import annotations

import asyncio
from typing import Any, Literal, TypeAlias

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nearcast.errors import Code, MeshError
from nearcast.handler import InferRequest, InferResponse, RequestContext, Served
from nearcast.load import NodeReport, VersionReport
from nearcast.wire.request import TensorRequest
from nearcast.wire.response import TensorResponse
from router.policy import Policy, PolicyConfig
from router.router import Router
from router.shadow import ShadowConfig, ShadowLimits

Behaviour: TypeAlias = Literal["answer", "nonsense", "fail", "refuse", "raise", "hang"]
BEHAVIOURS: tuple[Behaviour, ...] = ("answer", "nonsense", "fail", "refuse", "raise", "hang")
SHADOW = ShadowConfig(model="m", to_version="2", share=1.0, compare="y")


class TwoVersions:
    """Release 1 is the user's, release 2 the shadow's. Each request carries the number of its behaviours."""

    def __init__(self, users: list[Behaviour], shadows: list[Behaviour]) -> None:
        self.copied: list[int] = []
        self._behaviours = {"1": users, "2": shadows}

    async def infer(self, request: InferRequest, context: RequestContext) -> InferResponse:
        number = int(request.decode()["x"][0])
        if context.version == "2":
            self.copied.append(number)
        behaviour = self._behaviours[context.version][number]
        if behaviour == "fail":
            raise MeshError(Code.INVALID_REQUEST, "This tensor is wrong.")
        if behaviour == "refuse":
            raise MeshError(Code.OVERLOADED, "Busy.", retry_after_ms=1)
        if behaviour == "raise":
            raise RuntimeError("a fault in the node")
        if behaviour == "hang":
            await asyncio.sleep(3600)
        y = np.zeros((2, 0) if behaviour == "nonsense" else 3, np.float32)
        served = Served(node="a", version=context.version, compute_us=100)
        return TensorResponse(model="m", version=context.version, outputs={"y": y + number}, served=served)

    def stream(self, requests: Any, context: RequestContext) -> Any:
        raise NotImplementedError

    async def metadata(self, model: str, version: str) -> Any:
        raise NotImplementedError


async def ask_all(users: list[Behaviour], shadows: list[Behaviour] | None) -> list[object]:
    """What the users get, one after the other."""
    node = TwoVersions(users, shadows or [])
    router = Router(Policy(PolicyConfig(), 1))
    if shadows is not None:
        router.shadow((SHADOW,), ShadowLimits(timeout_ms=50.0))
    router.attach("a", node, "peer")
    versions = tuple(VersionReport(model="m", version=v, service_p50_us=100, service_p95_us=200) for v in ("1", "2"))
    router.policy.on_report(router.now(), "a", NodeReport(node="a", role="edge", slots=64, versions=versions))
    got: list[object] = []
    for number in range(len(users)):
        request = TensorRequest(model="m", version="1", inputs={"x": np.array([number], np.float32)})
        try:
            response = await router.infer(request, RequestContext(deadline=router.now() + 30.0))
            got.append((response.version, response.decode()["y"].tolist()))
        except MeshError as error:
            got.append((error.code, error.message))
        assert number not in node.copied, "the copy began before the answer was out"
        for _ in range(3):
            await asyncio.sleep(0)
    if shadows is not None:
        assert router.policy.outstanding == sum(shadows[number] == "hang" for number in node.copied)
    await router.close()
    assert router.policy.outstanding == 0
    return got


@settings(max_examples=25, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from(["answer", "answer", "answer", "fail"]), st.sampled_from(BEHAVIOURS)),
        min_size=1,
        max_size=8,
    )
)
def test_a_shadow_changes_nothing_for_its_user(pairs: list[tuple[Behaviour, Behaviour]]) -> None:
    users, shadows = [user for user, _ in pairs], [shadow for _, shadow in pairs]
    with_shadow = asyncio.run(ask_all(users, shadows))
    assert with_shadow == asyncio.run(ask_all(users, None))
