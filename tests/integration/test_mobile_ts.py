"""A router and three nodes as processes, of which some hang or are killed: a client in TypeScript and the SDK go on."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearcast.client import AsyncClient, ClientLimits
from nearcast.errors import MeshError
from tests.integration.lease_parts import ROOT, LeaseMesh, lease_mesh

BUILT = ROOT / ".venv-mobile-ts"
REQUESTS = 200
X = {"x": np.array([21.0], np.float32)}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LeaseMesh]:
    with lease_mesh(tmp_path_factory.mktemp("mesh"), nodes=3) as found:
        yield found


def test_a_client_in_typescript_outlives_a_node_that_hangs_and_one_that_dies(mesh: LeaseMesh) -> None:
    node = shutil.which("node") or shutil.which("nodejs")
    if node is None or not (BUILT / ".npm").exists():
        pytest.skip("the example is not built; `make mobile-ts` does it, with npm (on Debian: apt-get install npm)")
    command: list[str | Path] = [node, BUILT / "dist" / "main.js", mesh.address, ROOT / "proto", str(REQUESTS), "4"]
    hanging = killed = ""
    said: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            said = json.loads(line)
            if not hanging:
                hanging = said["servedBy"]
                mesh.children[hanging].send_signal(signal.SIGSTOP)
            elif not killed and said["answered"] >= REQUESTS // 2:
                killed = said["servedBy"]
                mesh.kill(killed)
    mesh.children[hanging].send_signal(signal.SIGCONT)
    assert said["failures"] == []
    assert said["answered"] == said["asked"] == REQUESTS
    assert said["leases"] >= 2
    assert said["routed"] == 0  # everything went straight to a node
    assert set(said["served"]) == {"n0", "n1", "n2"}


async def test_a_node_is_killed_and_then_the_router_and_nobody_notices(mesh: LeaseMesh) -> None:
    limits = ClientLimits(lease_timeout_s=0.3)
    async with AsyncClient(mesh.address, limits=limits) as client:
        await client.infer("digits", X)
        assert client.counts.leases == 1
        served: list[str] = []
        failures: list[MeshError] = []

        async def one() -> None:
            try:
                served.append((await client.infer("digits", X, deadline_ms=3000)).served_by)
            except MeshError as error:
                failures.append(error)

        tasks = []
        for number in range(150):
            tasks.append(asyncio.ensure_future(one()))
            if number == 50:
                mesh.kill(served[-1])
            if number == 100:
                mesh.kill("r")
            await asyncio.sleep(0.004)
        await asyncio.gather(*tasks)
        assert failures == []
        assert len(served) == 150
