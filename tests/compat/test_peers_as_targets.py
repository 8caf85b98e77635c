"""MLServer and Triton's core as targets of our router, where `make bench-peers` has installed them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import MLSERVER, TRITON, mlserver, triton
from nearcast.errors import Code, MeshError
from nearcast.handler import RequestContext
from nearcast.wire.request import TensorRequest
from router.config import ProbeConfig, TargetConfig
from router.policy import Policy, PolicyConfig
from router.router import Router
from router.target import configured_views
from router.targets import ChannelFactory, TargetSet
from tests.compat.contract import ADD
from tests.compat.servers import mlserver_server, triton_server

START_TIMEOUT_S = 20.0
FOLDERS = {"mlserver": MLSERVER, "triton": TRITON}


@contextmanager
def serving(peer: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The contract's model `add` behind the peer."""
    if peer == "mlserver":
        mlserver_server.write_models(folder)
        with mlserver(folder, runtime=mlserver_server.RUNTIME, parallel_workers=0) as where:
            yield where
    else:
        models = folder / "models"
        models.mkdir()
        put, tensors = triton_server.put, triton_server.tensors
        sides = [("input", "a"), ("input", "b"), ("output", "sum"), ("output", "difference")]
        put(models, ADD, "add", "".join(tensors(side, (name, "FP32", "4")) for side, name in sides), batch=16)
        with triton(models) as where:
            yield where


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["mlserver", "triton"])
async def test_a_peer_is_found_and_answers(peer: str, tmp_path: Path) -> None:
    if not FOLDERS[peer].exists():
        pytest.skip(f"{FOLDERS[peer]} is missing: make bench-peers makes it")
    router = Router(Policy(PolicyConfig(), seed=1), node="r")
    targets = TargetSet(router, ChannelFactory("ngh2", None), config=ProbeConfig(report_ms=50, drain_ms=200))
    with serving(peer, tmp_path) as where:
        try:
            targets.update(configured_views([TargetConfig(name="box", kind="oip", address=where["grpc"])]))
            async with asyncio.timeout(START_TIMEOUT_S):
                while not router.policy.holders(ADD, "1"):
                    await asyncio.sleep(0.02)
            a = np.float32([[1, 2, 3, 4]])  # type: ignore[arg-type]
            context = RequestContext(deadline=time.monotonic() + 5, tenant="acme", idempotency_key="k")
            asked = TensorRequest(model=ADD, inputs={"a": a, "b": a[:, ::-1]})  # type: ignore[dict-item,call-overload]
            answers = await asyncio.gather(*(router.infer(asked, context) for _ in range(8)))
            assert [answer.decode()["sum"].tolist() for answer in answers] == [[[5.0] * 4]] * 8
            assert {(answer.served.node, answer.served.version) for answer in answers} == {("box", "1")}
            with pytest.raises(MeshError) as caught:
                await router.infer(TensorRequest(model=ADD, inputs={"a": a}), context)  # type: ignore[dict-item]
            assert caught.value.code in (Code.INVALID_REQUEST, Code.INTERNAL)
            assert router.policy.outstanding == 0
        finally:
            await targets.close()
            await router.close()
